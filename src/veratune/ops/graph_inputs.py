"""Recompute a layer's input in the backward pass from tensors that autograd saves anyway, for `memory="low"`.

The gradients of b and d need the layer's input x. Even in a frozen model, autograd often saves the tensors that x was
computed from: a normalization's input, an activation function's input or output, both factors of a product, or the
output of attention. Recomputing x takes elementwise operations, and no memory between the passes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veratune.utils.torch_private import saved_tensors_are_hooked

# Operations that keep the order of the elements.
_RESHAPING = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0", "AliasBackward0"}
_KEEPS_RESULT = {"ReluBackward0", "TanhBackward0", "SigmoidBackward0"}


def source_of(x: Tensor) -> Callable[[], Tensor] | None:
    """Return a function that recomputes x, or None if autograd does not save the tensors for this.

    The function must be called before the backward pass reaches the operation that computed x. It returns a tensor
    without a graph that equals x, up to rounding if x is the output of a normalization.

    Args:
        x: the output of an operation, possibly reshaped. If it was modified in place, None is returned.
    """
    node: Any = x.grad_fn
    if node is None or x._version or torch.compiler.is_compiling() or saved_tensors_are_hooked():
        return None
    try:
        found = _value(node, _described, shaped=False)
    except AttributeError:  # this version of torch uses a different name for a saved tensor
        return None
    if found is None or found.numel() != x.numel() or found.dtype != x.dtype:
        return None
    shape = x.shape

    def again() -> Tensor:
        value = _value(node, torch.detach, shaped=False)
        assert value is not None
        return value.reshape(shape)

    return again


def _described(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _value(node: Any, read: Callable[[Tensor], Tensor], *, shaped: bool) -> Tensor | None:
    """Recompute the result of an autograd node's operation from the tensors saved by it or its predecessors.

    Args:
        node: the node, or None.
        read: maps a saved tensor to the tensor to compute with: detached, or an empty one on the meta device.
        shaped: whether the result's shape matters, or only the order of its elements.

    Returns:
        The result, or None if the saved tensors do not determine it.
    """
    name = "" if node is None else node.name()
    if name in _RESHAPING:
        return None if shaped and name != "CloneBackward0" else _value(node.next_functions[0][0], read, shaped=shaped)
    if name == "TransposeBackward0":
        value = _value(node.next_functions[0][0], read, shaped=True)
        return None if value is None else value.transpose(_dim(node._saved_dim0), _dim(node._saved_dim1))
    if name in _KEEPS_RESULT:
        return read(node._saved_result)
    if name == "GeluBackward0":
        return F.gelu(read(node._saved_self), approximate=node._saved_approximate)
    if name == "SiluBackward0":
        return F.silu(read(node._saved_self))
    if name == "NativeLayerNormBackward0":
        return _layer_norm(node, read)
    if name == "MulBackward0":
        factors = [
            _value(before, read, shaped=True) if held is None else read(held)
            for held, (before, _) in zip((node._saved_self, node._saved_other), node.next_functions, strict=True)
        ]
        first, second = factors
        return None if first is None or second is None else first * second
    if name.startswith("ScaledDotProduct") and hasattr(node, "_saved_output"):
        return read(node._saved_output)
    return None


def _layer_norm(node: Any, read: Callable[[Tensor], Tensor]) -> Tensor:
    x, mean, reciprocal = (read(held) for held in (node._saved_input, node._saved_result1, node._saved_result2))
    value = (x.to(mean.dtype) - mean) * reciprocal
    if node._saved_weight is not None:
        value = value * read(node._saved_weight).to(mean.dtype)
    if node._saved_bias is not None:
        value = value + read(node._saved_bias).to(mean.dtype)
    return value.to(x.dtype)


def _dim(saved: int) -> int:
    """Return a dimension saved by autograd, which stores negative ones as unsigned 64-bit integers."""
    return saved - (1 << 64) if saved >= 1 << 63 else saved
