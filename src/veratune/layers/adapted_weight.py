"""A stand-in for an adapted layer's weight that is computed only when something is computed with it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# Questions about a tensor that its values do not answer, and the adapters do not change.
_ABOUT = {
    *(
        getattr(Tensor, name).__get__
        for name in ("dtype", "device", "shape", "ndim", "layout", "is_meta", "is_cuda", "is_sparse", "is_quantized")
    ),
    *(
        getattr(Tensor, name)
        for name in ("size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "element_size", "__len__")
    ),
}


class AdaptedWeight(Tensor):
    """A weight with adapters' deltas, not yet added up."""

    _compute: Callable[[], Tensor]

    @staticmethod
    def of(base: Tensor, compute: Callable[[], Tensor]) -> "AdaptedWeight":
        """Return a stand-in that answers for `base` what is asked about it, and with `compute()` all else."""
        stand_in = base.detach().as_subclass(AdaptedWeight)
        stand_in._compute = compute
        return stand_in

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        computed = {name: _added_up(value) for name, value in (kwargs or {}).items()}
        return func(*(_added_up(value) for value in args), **computed)


def _added_up(value: Any) -> Any:
    if isinstance(value, AdaptedWeight):
        return value._compute()
    if isinstance(value, list | tuple) and any(isinstance(part, AdaptedWeight) for part in value):
        return type(value)(_added_up(part) for part in value)
    return value
