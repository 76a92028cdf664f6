"""Tensors as bytes, for digests and files."""

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> bytes:
    """Return a tensor's values as they are in memory, in order; a tensor of any dtype, shape and device."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy(force=True).tobytes()
