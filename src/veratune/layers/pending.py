"""Detect adapters that were removed from a model while a backward pass with gradient checkpointing is pending.

Such a pass recomputes the checkpointed blocks. Adapted layers then raise an error if they would compute differently
than in the forward pass, but layers that were removed from the model cannot: hooks on the remaining modules do instead.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from veratune.layers.base import VeraLayer
from veratune.layers.recomputation import StateLog, recomputed_with_other, recomputing
from veratune.utils.torch_private import (
    may_be_checkpoint,
    next_node_number,
    node_number_of_backward,
    pending_checkpoint,
)

# The largest number of objects to search for the modules that a block computes with.
_MOST = 10_000


@contextmanager
def removal_noticed(model: nn.Module, operation: str) -> Iterator[None]:
    """Make pending backward passes detect that adapters were removed from a model within this context.

    Hooks on the model's modules then raise RuntimeError when a block is recomputed. If no pass is pending (the usual
    case), no hooks are added.

    Args:
        model: the unwrapped model.
        operation: the operation that removes adapters, for the message.

    Raises:
        ValueError: a pass is pending in which a weight is read without calling a module, so that no hook could detect
            the removal.
    """
    blocks = _pending_blocks(model)
    if blocks and any(isinstance(module, VeraLayer) and module.weight_was_read for module in model.modules()):
        raise ValueError(
            f"{operation} cannot work between a forward pass with gradient checkpointing and its backward pass in a"
            " model that reads adapted weights directly, because the backward pass would recompute blocks without the"
            " adapters: call backward() first, or delete the outputs of that forward pass"
        )
    yield
    if blocks:
        RemovalCheck(blocks).watch(model)


class RemovalCheck:
    """A forward pre-hook for all modules of a model, which removes itself once no block is pending.

    Args:
        blocks: the objects that gradient checkpointing keeps for the pending blocks.
    """

    def __init__(self, blocks: list[Any]) -> None:
        self._blocks = [weakref.ref(block) for block in blocks]
        self._number = next_node_number()
        self._handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        self._handles = [module.register_forward_pre_hook(self) for module in model.modules()]

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not recomputing():
            self._leave_when_done(module)
            return
        number = node_number_of_backward()
        if number is not None and number < self._number:
            raise RuntimeError(
                f"{recomputed_with_other(f'a {type(module).__name__}', 'adapters')}: some have been removed from the"
                " model since. Call backward() before removing adapters, or train without gradient checkpointing"
            )

    def _leave_when_done(self, module: nn.Module) -> None:
        kept = (reference() for reference in self._blocks)
        if any(block is not None and pending_checkpoint(block) is not None for block in kept):
            return
        for handle in self._handles:
            handle.remove()
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is self]:  # `module` may be a copy
            del module._forward_pre_hooks[key]

    def __deepcopy__(self, memo: Any) -> "RemovalCheck":
        return RemovalCheck([])  # a copy has no pending passes

    def __reduce__(self) -> Any:
        return RemovalCheck, ([],)


def _pending_blocks(model: nn.Module) -> list[Any]:
    """Return the objects that gradient checkpointing keeps for a model's blocks that are not yet recomputed."""
    holders = list(model.modules())
    logs = [value for holder in holders for value in vars(holder).values() if isinstance(value, StateLog)]
    own = {id(module) for module in holders}
    if not any(log.has_computed() for log in logs) or next(_blocks_of(own), None) is None:
        return []
    gc.collect()  # graphs of earlier passes may be alive in reference cycles
    return list(_blocks_of(own))


def _blocks_of(own: set[int]) -> Iterator[Any]:
    """Yield the object kept for each pending block that computes with one of these modules, given by id."""
    kinds: dict[type, bool] = {}  # there may be millions of objects, of few types
    for candidate in gc.get_objects():
        kind = type(candidate)
        if kind not in kinds:
            kinds[kind] = may_be_checkpoint(kind)
        block = pending_checkpoint(candidate) if kinds[kind] else None
        if block is not None and _computes_with(block, own):
            yield candidate


def _computes_with(block: Any, own: set[int]) -> bool:
    """Return whether a function refers to one of these modules, or True if that cannot be determined."""
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
    """Return the objects that a function or container refers to."""
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
