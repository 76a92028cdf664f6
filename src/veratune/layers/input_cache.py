"""Compute x A^T once for layers that read the same x with the same A (query, key and value; gate and up)."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veratune.utils.torch_private import modes_active, transformations_active


def _can_be_remembered(x: Tensor) -> bool:
    """Return whether a product with x may be reused while x is the same object with the same version.

    While tracing, the compiler merges equal products. Inference tensors have no version, and a product computed in
    inference mode cannot be saved for a backward pass. Some optimizers write to parameters without changing their
    version. Under transformations and modes, x may represent a different tensor.
    """
    if torch.compiler.is_compiling() or transformations_active() or modes_active():
        return False
    if torch.is_inference_mode_enabled():
        return False
    return type(x) is Tensor and not x.is_inference() and not (x.is_leaf and x.requires_grad)


def _stream(x: Tensor) -> int:
    """Return the current CUDA stream; products computed on other streams may not be finished."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


class _Entry(NamedTuple):
    x: "weakref.ref[Tensor]"
    version: int
    pointer: int
    stream: int
    a_projection: Tensor
    xa: Tensor
    exactly: bool
    served: set[str]


class InputCache:
    """One-entry cache of x A^T for a group of layers, keyed by the identity and version of x and the identity of A.

    Each layer is served once per entry, because a second request belongs to another pass. The cache is therefore
    correct under checkpointing (which creates new tensors), in several threads (which at worst compute twice) and in
    replicas. The entry lives no longer than x, and is not copied or pickled.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(
        self, layer: str, x: Tensor, a_projection: Tensor, compute: Callable[[], Tensor], *, exactly: bool = False
    ) -> Tensor:
        """Return the product for x, cached or from `compute`.

        Args:
            layer: the name of the layer.
            x: the input exactly as passed to the layer.
            a_projection: A.
            compute: computes the product.
            exactly: whether the product is in float32 even though x and A are in half precision.
        """
        if not _can_be_remembered(x):
            return compute()
        entry = self._entry
        if (
            entry is not None
            and entry.x() is x
            and entry.version == x._version
            and entry.pointer == x.data_ptr()  # assigning to x.data does not change the version
            and entry.stream == _stream(x)
            and entry.a_projection is a_projection
            and entry.exactly == exactly
            and layer not in entry.served
        ):
            entry.served.add(layer)
            return entry.xa
        xa = compute()
        me = weakref.ref(self)

        def forget(reference: "weakref.ref[Tensor]") -> None:
            memo = me()
            if memo is not None and memo._entry is not None and memo._entry.x is reference:
                memo._entry = None

        self._entry = _Entry(
            weakref.ref(x, forget), x._version, x.data_ptr(), _stream(x), a_projection, xa, exactly, {layer}
        )
        return xa

    def __getstate__(self) -> dict[str, Any]:
        return {"_entry": None}
