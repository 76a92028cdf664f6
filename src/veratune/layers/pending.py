"""Blocks under gradient checkpointing that wait for their backward pass, found before what they need is removed.

Such a block is computed again in the backward pass. Adapted layers notice there that they compute otherwise than in the
forward pass, but what was taken out of the model cannot notice anything.
"""

import gc
from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from veratune.layers.recomputation import StateLog
from veratune.utils.torch_private import may_be_checkpoint, pending_checkpoint

# Objects that are looked at to find the modules that a block computes with.
_MOST = 10_000


def check_nothing_pending(model: nn.Module, operation: str) -> None:
    """Raise ValueError if a checkpointed block of a model with adapters has yet to be computed again.

    Args:
        model: the model.
        operation: what cannot be done then.
    """
    holders = list(model.modules())
    logs = [value for holder in holders for value in vars(holder).values() if isinstance(value, StateLog)]
    own = {id(module) for module in holders}
    if not any(log.has_computed() for log in logs) or not any(_blocks_of(own)):
        return
    gc.collect()  # graphs of earlier passes may wait in cycles
    if any(_blocks_of(own)):
        raise ValueError(
            f"{operation} cannot work between a forward pass with gradient checkpointing and its backward pass, which"
            " computes blocks again and would compute them without what is removed: call backward() first, or delete"
            " the outputs of that forward pass"
        )


def _blocks_of(own: set[int]) -> Iterator[bool]:
    """Yield True for each pending block that computes with one of these modules, given by id."""
    kinds: dict[type, bool] = {}  # there may be millions of objects, of few types
    for candidate in gc.get_objects():
        kind = type(candidate)
        if kind not in kinds:
            kinds[kind] = may_be_checkpoint(kind)
        block = pending_checkpoint(candidate) if kinds[kind] else None
        if block is not None and _computes_with(block, own):
            yield True


def _computes_with(block: Any, own: set[int]) -> bool:
    """Return whether a function reaches one of these modules, or whether that cannot be seen."""
    seen: set[int] = set()
    waiting, any_module = [block], False
    while waiting:
        current = waiting.pop()
        if id(current) in seen or current is None or isinstance(current, str | int | float | type):
            continue
        seen.add(id(current))
        if len(seen) > _MOST:
            return True
        if isinstance(current, nn.Module):
            any_module = True
            if any(id(module) in own for module in current.modules()):
                return True
        else:
            waiting += _parts(current)
    return not any_module


def _parts(value: Any) -> list[Any]:
    """Return what a function or container holds."""
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        used = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
        used = [each for each in used if isinstance(each, nn.Module | list | tuple | dict)]
        return [*(value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *used]
    if isinstance(value, CellType):
        try:
            return [value.cell_contents]
        except ValueError:  # empty
            return []
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    return list(getattr(value, "__dict__", {}).values())
