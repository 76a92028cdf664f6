"""Replace modules in a model, and undo changes that fail halfway."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veratune.layers.base import VeraLayer
from veratune.layers.guards import guard_surgeries
from veratune.layers.recomputation import StateLog
from veratune.utils.torch_private import follow_replacement

# The attribute that disables the fused path in each class. A layer uses the path only if its activation is marked as
# ReLU or GELU; an encoder creates nested tensors, which only the fused path supports, only if `use_nested_tensor` is
# set. The attributes have no other effect.
_SWITCHES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_KEPT = "_veratune_kept_switch"


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Replace modules of a model, given by id, everywhere they are used."""
    if not replacements:
        return
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            # A new wrapper already holds the module that it wraps: do not put the wrapper into itself.
            if id(child) in replacements and replacements[id(child)] is not parent:
                parent._modules[name] = replacements[id(child)]
                follow_replacement(parent)
    prepare(model)


def prepare(model: nn.Module) -> None:
    """Update a model for its current adapted layers: fused fast paths, and methods that replace layers."""
    _choose_paths(model)
    guard_surgeries(model)


def _choose_paths(model: nn.Module) -> None:
    """Disable torch's fused encoder, which reads weights without calling layers, where it has adapted layers.

    Its setting is restored in all others.
    """
    for module in model.modules():
        for encoder, switch, off in _SWITCHES:
            if isinstance(module, encoder) and switch in module.__dict__:
                adapted = any(isinstance(inside, VeraLayer) for inside in module.modules())
                if adapted and _KEPT not in module.__dict__:
                    module.__dict__[_KEPT] = module.__dict__[switch]
                    module.__dict__[switch] = off
                elif not adapted and _KEPT in module.__dict__:
                    module.__dict__[switch] = module.__dict__.pop(_KEPT)


@contextmanager
def undone_on_error(model: nn.Module, *others: object) -> Iterator[None]:
    """Undo all changes to a model's structure on any exception, including out-of-memory errors and Ctrl-C.

    This restores each module's attributes, the contents of its dicts, lists and sets (modules, parameters, buffers,
    hooks, names of adapters), and the `requires_grad` of parameters. It does not restore tensor values: code that
    writes to tensors in place must keep the old values.

    Args:
        model: the root of all modules that may change.
        others: other objects whose attributes may change.
    """
    before = StructureBefore(model, *others)
    try:
        yield
    except BaseException:
        before.put_back()
        raise


class StructureBefore:
    """A snapshot of a model's structure, which `undone_on_error` restores."""

    def __init__(self, model: nn.Module, *others: object) -> None:
        holders: list[Any] = [*model.modules(), *others]
        holders += [value for holder in holders for value in vars(holder).values() if isinstance(value, StateLog)]
        self._kept = [_Kept(holder) for holder in holders]
        parameters = {id(parameter): parameter for part in self._kept for parameter in part.parameters()}
        self._flags = [(parameter, parameter.requires_grad) for parameter in parameters.values()]

    def put_back(self) -> None:
        for part in self._kept:
            part.put_back()
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def kept_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of these tensors if an exception is raised within this context."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, values in kept:
                tensor.copy_(values)
        raise


class _Kept:
    """The attributes of one object, and shallow copies of its containers."""

    def __init__(self, holder: Any) -> None:
        self._own: dict[str, Any] = vars(holder)
        self._attributes = dict(self._own)
        self._dicts = [(value, dict(value)) for value in self._attributes.values() if isinstance(value, dict)]
        self._lists = [(value, list(value)) for value in self._attributes.values() if type(value) is list]
        self._sets = [(value, set(value)) for value in self._attributes.values() if type(value) is set]

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, copied in self._dicts:
            for value in copied.values():
                if isinstance(value, nn.Parameter):
                    yield value

    def put_back(self) -> None:
        for container, copied in (*self._dicts, (self._own, self._attributes)):
            # Only if the contents differ, because assigning to some containers has side effects.
            if not _same(list(container.items()), list(copied.items())):
                container.clear()
                container.update(copied)
        for values, copied_list in self._lists:
            if not _same(list(enumerate(values)), list(enumerate(copied_list))):
                values[:] = copied_list
        for members, copied_set in self._sets:
            members.clear()
            members.update(copied_set)


def _same(first: list[tuple[Any, Any]], second: list[tuple[Any, Any]]) -> bool:
    """Return whether both have the same keys in the same order, with identical values."""
    return len(first) == len(second) and all(
        (a is b or (not isinstance(a, Tensor) and a == b)) and x is y
        for (a, x), (b, y) in zip(first, second, strict=True)
    )
