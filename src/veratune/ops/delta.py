"""Compute an adapter's delta weight, for merging and for code that reads the adapted weight."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veratune.ops import exact
from veratune.ops.factors import Factors, check_values
from veratune.projections.structure import DENSE, Matrix
from veratune.utils.tensors import wide_dtype, without_autocast
from veratune.utils.torch_private import transformations_active


def delta_weight(factors: Factors) -> Tensor:
    """Return delta W = scale * diag(b) B diag(d) A, (out, in), in the projections' dtype.

    If b and d have leading dimensions, (..., out) and (..., r), return one delta for each pair, (..., out, in).
    """
    check_values(factors.A.values, factors.B.values, factors.b, factors.d)
    return factors.folded().gram(factors.A)


def plus_delta(weight: Tensor, folded: Matrix, A: Matrix, *, transposed: bool = False) -> Tensor:  # noqa: N803
    """Return W0 + C^T A, (out, in).

    The result has W0's memory layout, so that products with it sum in the same order and are bit-identical if C = 0.

    Args:
        weight: W0, (out, in), or (in, out) if `transposed`.
        folded: C, (r, out).
        A: (r, in).
        transposed: whether the weight is stored as (in, out).
    """
    if transposed and folded.structure is DENSE:
        return torch.addmm(weight, A.dense().t(), folded.values).t()
    return folded.structure.plus_gram(weight.t() if transposed else weight, folded.values, A)


class _AddDelta(torch.autograd.Function):
    """W0 + delta W, (..., out, in)."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        a_values: Tensor,
        b_values: Tensor,
        b: Tensor,
        d: Tensor,
        scale: float,
        structures: tuple[Any, Any],
    ) -> Tensor:
        ctx.scale, ctx.structures = scale, structures
        ctx.save_for_backward(a_values, b_values, b, d)
        factors = Factors(Matrix(a_values, structures[0]), Matrix(b_values, structures[1]), b, d, scale)
        with without_autocast(weight.device):  # W0 must not be rounded
            if weight.ndim == 2 and weight.dtype == b_values.dtype:
                return plus_delta(weight, factors.folded(), factors.A)
            return (weight + delta_weight(factors)).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a_values, b_values, b, d = ctx.saved_tensors
        need_weight, _, _, need_b, need_d = ctx.needs_input_grad[:5]
        grad_b = grad_d = None
        if need_b or need_d:
            A, B = Matrix(a_values, ctx.structures[0]), Matrix(b_values, ctx.structures[1])  # noqa: N806
            factors = Factors(A, B, b, d, ctx.scale)
            with without_autocast(g.device):
                products = weighted_by_gradient(factors, g.to(a_values.dtype), wide_dtype(b.dtype, a_values.dtype))
                grad_b, grad_d = factors.vector_gradients(products, need_b, need_d)
        return g if need_weight else None, None, None, grad_b, grad_d, None, None


def weighted_by_gradient(factors: Factors, weight_gradient: Tensor, dtype: torch.dtype) -> Matrix:
    """Return P = B * (A G^T), (..., r, out), in `dtype`, from the weight's gradient G, (..., out, in).

    If G is in a wider dtype than A, nothing is rounded to A's dtype.
    """
    A, B = factors.A, factors.B  # noqa: N806
    if weight_gradient.dtype != A.dtype:
        return Matrix(exact.pull_back(B, A, weight_gradient, dtype), B.structure)
    return Matrix(B.structure.pull_back(B.values, A, weight_gradient, dtype), B.structure)


def add_delta(weight: Tensor, factors: Factors) -> Tensor:
    """Return W0 + delta W, (..., out, in), in W0's dtype, for code that reads the weight.

    Differentiable once with respect to weight, b and d. Under torch.compile or torch.func, the result is computed with
    ordinary torch operations, which they differentiate themselves.

    Args:
        weight: W0, (..., out, in).
        factors: A and B in float32 or wider; b (..., out) and d (..., r).
    """
    A, B, b, d, scale = factors  # noqa: N806
    check_values(weight, A.values, B.values, b, d)
    if transformations_active() or torch.compiler.is_compiling():
        folded = (d * scale).unsqueeze(-1) * b.unsqueeze(-2) * B.dense()
        with without_autocast(weight.device):
            return (weight + folded.mT @ A.dense()).to(weight.dtype)
    structures = (A.structure, B.structure)
    added: Tensor = _AddDelta.apply(weight, A.values, B.values, b, d, scale, structures)  # type: ignore[no-untyped-call]
    return added
