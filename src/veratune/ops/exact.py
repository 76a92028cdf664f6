"""Gradients of float32 vectors from half-precision tensors, as exact as in float32.

In the compute dtype, x A^T and u^T g are rounded to 8 or 11 bits before the gradients of b and d are summed. The
functions here avoid this rounding. On devices that can return the float32 accumulators of half-precision products, a
float32 operand is split into two half-precision ones, whose products are added; elsewhere operands are cast to float32.
"""

import torch
from torch import Tensor

from veratune.ops.costs import Cost, LayerShape
from veratune.projections.structure import DENSE, Matrix
from veratune.utils.tensors import cast, product, sums_unrounded, wide_dtype, without_autocast


def project(x: Tensor, A: Matrix) -> Tensor:  # noqa: N803
    """Return u = x A^T, (T, r), in float32 or wider."""
    wide = wide_dtype(x.dtype)
    if sums_unrounded(x, wide):
        return A.structure.rmatmul(A.values, x, wide)
    with without_autocast(x.device):
        return _cast(A, wide).rmatmul(x.to(wide))


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """Return G = g^T x, (out, in), in float32 or wider."""
    wide = wide_dtype(x.dtype)
    if sums_unrounded(x, wide):
        return product(g.t(), x, wide)
    return g.to(wide).t() @ x.to(wide)


def outer(B: Matrix, xa: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: N803
    """Return P = B * (u^T g), as `Structure.outer` does, from u in float32 and g in half precision."""
    if not sums_unrounded(g, xa.dtype):
        return B.structure.outer(B.values, xa, g.to(xa.dtype), dtype)
    high, low = split(xa, g.dtype)
    return B.structure.outer(B.values, high, g, dtype).add_(B.structure.outer(B.values, low, g, dtype))


def pull_back(B: Matrix, A: Matrix, gradient: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: N803
    """Return P = B * (A G^T), as `Structure.pull_back` does, from G in float32 and A in half precision."""
    if B.structure is not DENSE or not sums_unrounded(A.values, gradient.dtype):
        return B.structure.pull_back(B.values, _cast(A, gradient.dtype), gradient, dtype)
    high, low = split(gradient, A.dtype)
    total = B.structure.pull_back(B.values, A, high, dtype)
    return total.add_(B.structure.pull_back(B.values, A, low, dtype))


def split(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split a float32 tensor into two in half precision, with a relative error of at most 2^-16 (float16: 2^-22)."""
    high = tensor.to(dtype)
    return high, (tensor - high).to(dtype)


def _cast(matrix: Matrix, dtype: torch.dtype) -> Matrix:
    return Matrix(cast(matrix.values, dtype), matrix.structure)


def add_cost_of_rows(cost: Cost, shape: LayerShape) -> None:
    """Add the extra cost of exact gradients in `ops.rows.stack_residual` over those in the compute dtype."""
    n, m, r, t = shape.in_features, shape.out_features, shape.r, shape.tokens
    size, density = cost.profile.itemsize, shape.density
    for rows, columns, inner in ((t, r, n), (t, r, m), (t, m, r)):
        cost.widen_product(rows, columns, inner, density=density)
    for elements in (t * n, r * (n + m) * density, t * r, t * (m + r)):
        cost.pass_over(elements, 4 + size)


def add_cost(cost: Cost, shape: LayerShape, gradients_from: str, *, output_uses_xa: bool) -> None:
    """Add the extra cost of exact gradients over those that a route computes in the compute dtype.

    Args:
        cost: the running sum to add to.
        shape: the call's dimensions.
        gradients_from: as in `Route`; with "xa" the gradients come from u^T g.
        output_uses_xa: whether the output is computed from u, which then has to be rounded.
    """
    n, m, r, t = shape.in_features, shape.out_features, shape.r, shape.tokens
    density, size = shape.density, cost.profile.itemsize
    returns_sums = cost.profile.returns_sums
    if gradients_from == "xa":
        cost.widen_product(t, r, n, share=shape.sharing, density=density)
        cost.saved_bytes += t * r * (4 - size) // shape.sharing
        if output_uses_xa:
            cost.pass_over(t * r / shape.sharing, 4 + size)
        split_elements, result, inner = t * r, r * m * density, t
        cast_elements = [t * n / shape.sharing, r * n * density, t * m]
    else:
        cost.widen_product(m, n, t)
        density = density**2
        split_elements, result, inner = m * n, r * m * shape.density, n
        cast_elements = [t * n, t * m, r * n * shape.density]
    if returns_sums:
        cost.pass_over(split_elements, 4 + size)
        cost.pass_over(split_elements, 4 + 2 * size)
        cost.product(r, m, inner, density=density)
        cost.pass_over(3 * result, 4)
    else:
        for elements in cast_elements:
            cost.pass_over(elements, 4 + size)
        cost.widen_product(r, m, inner, density=density)
