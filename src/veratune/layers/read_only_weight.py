"""Adapted weights for code that reads them without calling their layer; writing to them raises an error."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from veratune.layers.entries import AdapterEntry
from veratune.layers.geometry import Geometry
from veratune.utils.torch_private import modes_active, transformations_active

# Properties of a tensor that do not depend on its values, and that adapters do not change.
ABOUT = {
    *(
        getattr(Tensor, name).__get__
        for name in ("dtype", "device", "shape", "ndim", "layout", "is_meta", "is_cuda", "is_sparse", "is_quantized")
    ),
    *(
        getattr(Tensor, name)
        for name in ("size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "element_size", "__len__")
    ),
}
# Functions that write to their first argument, other than those whose names end in "_".
_WRITING = {
    *("__setitem__", "__delitem__", "__set__", "__delete__"),
    *("__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__"),
    *("__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
}
# Some models call these to keep weights within a range, which usually contains all of their values already.
_LIMITING = {"clamp_", "clamp_min_", "clamp_max_", "clip_"}


class ReadableLayer(Protocol):
    """The part of a `VeraLayer`'s interface that stand-ins for its weight use.

    Attributes:
        out_axis, weight_name, geometry, in_features, entries, added_adapters: as in `VeraLayer`.
        weight_was_read: whether the adapted weight was used in a computation without calling the layer.
    """

    out_axis: Literal[0, 1]
    weight_name: str
    geometry: Geometry
    in_features: int
    entries: dict[str, AdapterEntry]
    added_adapters: list[str]
    weight_was_read: bool

    def vectors(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's vectors by name."""
        ...

    def adapted_part(self, base: Tensor, index: Any) -> Tensor:
        """Return `base`, all of W0 or the matrices of the stack at `index`, with the deltas added."""
        ...

    def product(self, x: Tensor, base: Tensor, index: Any, bias: Tensor | None = None) -> Any:
        """Return x W^T + bias with the adapted weight, or NotImplemented."""
        ...

    def add_rows(self, start: Tensor, x: Tensor, groups: Tensor) -> Tensor:
        """Return start + x delta W^T, where each row of x belongs to one matrix of the stack."""
        ...


class ReadOnlyWeight(Tensor):
    """W0 + delta W of a layer, or a view of it. It behaves like a plain tensor, but refuses writes."""

    _layer: ReadableLayer
    _outside: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if _changes_nothing(func, args, kwargs):
            return args[0]
        check_not_written(func, args, kwargs)
        read: list[ReadOnlyWeight] = []

        def plain(value: Any) -> Any:
            if isinstance(value, ReadOnlyWeight):
                read.append(value)
                value._layer.weight_was_read |= value._outside
                with torch._C.DisableTorchFunctionSubclass():
                    return value.as_subclass(Tensor)
            if isinstance(value, list | tuple) and any(isinstance(part, ReadOnlyWeight) for part in value):
                return type(value)(plain(part) for part in value)
            return value

        computed = {name: plain(value) for name, value in kwargs.items()}
        result = func(*(plain(value) for value in args), **computed)
        for weight in read:
            result = protected(result, weight, weight._layer, outside=weight._outside)
        return result


def read_only(weight: Tensor, layer: ReadableLayer, *, outside: bool) -> ReadOnlyWeight:
    """Return a layer's adapted weight, or a view of it, as a tensor that refuses writes.

    Args:
        weight: W0 + delta W; its graph is kept.
        layer: the layer.
        outside: whether the caller may use the result without calling the layer. Computing with it then sets
            `weight_was_read`.
    """
    protected_weight = weight.as_subclass(ReadOnlyWeight)
    protected_weight._layer, protected_weight._outside = layer, outside
    return protected_weight


def protected(result: Any, weight: Tensor, layer: ReadableLayer, *, outside: bool) -> Any:
    """Make the result of an operation on W0 + delta W read-only if it is a view of W0 + delta W.

    Args:
        result: a tensor, several tensors, or anything else.
        weight: W0 + delta W.
        layer, outside: as for `read_only`.
    """
    if isinstance(result, list | tuple) and type(result) in (list, tuple):
        return type(result)(protected(part, weight, layer, outside=outside) for part in result)
    if type(result) is not Tensor or transformations_active() or modes_active():
        return result
    with torch._C.DisableTorchFunctionSubclass():
        same = result.layout is weight.layout is torch.strided and (
            result.untyped_storage()._cdata == weight.untyped_storage()._cdata
        )
    return read_only(result, layer, outside=outside) if same else result


def _changes_nothing(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call clamps W0 + delta W to a range that already contains all of its values."""
    if getattr(func, "__name__", "") not in _LIMITING or not isinstance(args[0], ReadOnlyWeight):
        return False
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        limited = args[0].as_subclass(Tensor).clone()
        func(limited, *args[1:], **kwargs)
        return torch.equal(limited, args[0].as_subclass(Tensor))


def check_not_written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise RuntimeError if a torch function would write to an adapted weight that was read from a layer.

    Args:
        func, args, kwargs: the arguments of `__torch_function__`.
    """
    name = getattr(func, "__name__", "")
    targets = [kwargs.get("out")]
    if name in _WRITING or (name.endswith("_") and not name.endswith("__")):
        # The functions of torch.nn.init pass the tensor by name.
        targets.append(args[0] if args else kwargs.get("tensor"))
    for target in targets:
        for tensor in target if isinstance(target, list | tuple) else (target,):
            layer = _layer_of(tensor)
            if layer is not None:
                entry = next(iter(layer.entries.values()), None)
                raise RuntimeError(
                    f"{name} would write to {layer.weight_name} of {entry.name if entry else 'a layer'}, which has"
                    " adapters, and the values would be lost: write to the parameter of its base_layer, exclude the"
                    " layer, or remove the adapters first"
                )


def _layer_of(tensor: Any) -> ReadableLayer | None:
    if isinstance(tensor, ReadOnlyWeight):
        return tensor._layer
    view = getattr(tensor, "_view", None) if isinstance(tensor, Tensor) and type(tensor) is not Tensor else None
    layer: ReadableLayer | None = getattr(view, "layer", None)
    return layer
