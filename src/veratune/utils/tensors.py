"""Small tensor helpers: bytes, numpy arrays, and the precision of computations."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from veratune.utils.torch_private import constant_while_compiling, returns_sums

_NOTHING = nullcontext()
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_KNOWN_TO_NUMPY = {torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool}


def bytes_of(tensor: Tensor) -> bytes:
    """Return a tensor's values as contiguous bytes, for any dtype, shape and device."""
    if tensor.dtype in _KNOWN_TO_NUMPY:
        return tensor.numpy(force=True).tobytes()
    return tensor.contiguous().flatten().view(torch.uint8).numpy(force=True).tobytes()


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor contains neither NaN nor infinity, without allocating a mask of its size."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    values = tensor.detach()
    lowest, highest = torch.aminmax(values.float() if values.dtype.itemsize == 1 else values)
    return bool(torch.isfinite(lowest) and torch.isfinite(highest))


def checksum(tensor: Tensor) -> tuple[int, int] | None:
    """Return position-dependent sums of a matrix's bits, or None for a tensor that is not an ordinary matrix.

    The sums are exact, and therefore the same on every device.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.ndim < 2 or not tensor.numel():
        return None
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.itemsize)
    if integers is None:
        return None
    bits = tensor.detach().view(integers).flatten(0, -2)
    sums = (bits.sum(dim, dtype=torch.int64) for dim in (0, 1))
    first, second = ((own * (2 * torch.arange(len(own), device=own.device) + 1)).sum() for own in sums)
    return int(first), int(second)


def float32_of(tensor: Tensor) -> npt.NDArray[np.float32]:
    """Return a floating-point tensor of any dtype and device as a float32 array, sharing its memory if possible."""
    array: npt.NDArray[np.float32] = (
        tensor if tensor.dtype == torch.float32 else tensor.detach().to("cpu", torch.float32)
    ).numpy(force=True)
    return array


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype in which to sum and scale: float32, or a wider dtype if any argument is wider."""
    wide = torch.float32
    for dtype in dtypes:
        if dtype not in _NARROW:
            wide = torch.promote_types(wide, dtype)
    return wide


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor to a dtype. If it has this dtype, skip the call into torch, which takes a microsecond."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def sums_unrounded(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether `product` of operands like this tensor returns its sums in `dtype` without rounding them."""
    if tensor.dtype == dtype:
        return True
    return returns_sums and tensor.is_cuda and dtype == torch.float32 and tensor.dtype.itemsize == 2


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in a dtype at least as wide as that of the operands, unrounded if the device supports this.

    Args:
        a: (..., n, k).
        b: (..., k, m), of the same dtype.
        dtype: the dtype of the result.
    """
    if a.dtype == dtype or not sums_unrounded(a, dtype):
        return cast(a @ b, dtype)
    if a.ndim == b.ndim == 2:
        return torch.mm(a, b, out_dtype=dtype)
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    first, second = (each.expand(*leading, -1, -1).reshape(-1, *each.shape[-2:]) for each in (a, b))
    return torch.bmm(first, second, out_dtype=dtype).view(*leading, a.shape[-2], b.shape[-1])


def gradients_wanted(*values: object) -> bool:
    """Return whether grad mode is enabled and any argument is a tensor that requires a gradient."""
    if torch.is_grad_enabled():
        for value in values:  # a plain loop, because each layer calls this several times per forward pass
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that disables autocast on this device."""
    device_type = device.type
    known = device_type in ("cpu", "cuda") or _supports_autocast(device_type)
    narrowing = known and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if narrowing else _NOTHING


# torch before 2.13 cannot trace this call.
@constant_while_compiling
def _supports_autocast(device_type: str) -> bool:
    """Return whether autocast supports a device type; for "meta", torch would raise an error."""
    return device_type != "meta" and torch.amp.is_autocast_available(device_type)
