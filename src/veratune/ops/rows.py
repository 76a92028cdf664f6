"""Products with different vectors for each row of a batch: experts of a stack, adapters of a bank."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veratune.ops import exact
from veratune.ops.factors import Factors, check_values
from veratune.ops.routes.scaled import up
from veratune.projections.structure import Matrix
from veratune.utils.tensors import cast, wide_dtype, without_autocast
from veratune.utils.torch_private import transformations_active


def _residual(start: Tensor, xa: Tensor, factors: Factors) -> Tensor:
    """Return start + b * ((scale * d * u) B^T), with b (T, out) and d (T, r) for each row."""
    return start + (up(xa, factors) * factors.b).to(start.dtype)


class _StackResidual(torch.autograd.Function):
    """start + x delta W_e^T, where each row of x uses the vectors of one matrix e of a stack."""

    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor,
        x: Tensor,
        a_values: Tensor,
        b_values: Tensor,
        b: Tensor,
        d: Tensor,
        groups: Tensor,
        scale: float,
        structures: tuple[Any, Any],
        exactly: bool,
    ) -> Tensor:
        ctx.scale, ctx.structures, ctx.exactly = scale, structures, exactly
        factors = Factors(Matrix(a_values, structures[0]), Matrix(b_values, structures[1]), b, d, scale)
        with without_autocast(x.device):  # x is already in the compute dtype
            xa = exact.project(x, factors.A) if exactly else factors.A.rmatmul(x)
            ctx.save_for_backward(a_values, b_values, b, d, groups, xa)
            return _residual(start, cast(xa, x.dtype), factors.at(groups))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a_values, b_values, b, d, groups, xa = ctx.saved_tensors
        need_start, need_x, _, _, need_b, need_d = ctx.needs_input_grad[:6]
        A, B = Matrix(a_values, ctx.structures[0]), Matrix(b_values, ctx.structures[1])  # noqa: N806
        rows = Factors(A, B, b, d, ctx.scale).at(groups)
        grad_x = grad_b = grad_d = None
        wide = wide_dtype(b.dtype, g.dtype)
        # The dtype of the products that are summed into the vectors' gradients.
        dtype = wide if ctx.exactly else g.dtype
        with without_autocast(g.device):
            summed = rows._replace(B=Matrix(cast(b_values, dtype), B.structure)) if need_b or need_d else rows
            through = summed.B.rmatmul((g * rows.b).to(summed.B.dtype))
            if need_b:
                products = g.to(wide) * up(cast(xa, dtype), summed)
                grad_b = torch.zeros_like(b, dtype=wide).index_add_(0, groups, products).to(b.dtype)
            if need_d:
                products = xa.to(wide) * through * ctx.scale
                grad_d = torch.zeros_like(d, dtype=wide).index_add_(0, groups, products).to(d.dtype)
            if need_x:
                grad_x = A.matmul((through * (rows.d.to(wide) * ctx.scale)).to(g.dtype))
        return g if need_start else None, grad_x, None, None, grad_b, grad_d, None, None, None, None


def stack_residual(start: Tensor, x: Tensor, factors: Factors, groups: Tensor, *, exactly: bool = False) -> Tensor:
    """Return start + x delta W^T, (T, out), where each row of x uses the vectors of one matrix of a stack.

    All rows share A and B, so this takes two products for any number of matrices. x A^T, (T, r), is saved for the
    backward pass.

    Args:
        start: (T, out), in the compute dtype.
        x: (T, in).
        factors: the adapter, with the vectors b (count, out) and d (count, r) of the entire stack.
        groups: int64 (T,), the index of each row's matrix in the stack.
        exactly: whether to compute the vectors' gradients from products in float32 if the compute dtype is narrower;
            ignored under torch.compile and torch.func.
    """
    A, B, b, d, scale = factors  # noqa: N806
    if transformations_active() or torch.compiler.is_compiling():
        return _residual(start, A.rmatmul(x), factors.at(groups))
    check_values(start, x, b, d)
    arguments = (start, x, A.values, B.values, b, d, groups, scale, (A.structure, B.structure), exactly)
    added: Tensor = _StackResidual.apply(*arguments)  # type: ignore[no-untyped-call]
    return added


def _row_up(xa: Tensor, B: Matrix, d: Tensor) -> Tensor:  # noqa: N803
    scaled = (xa * d.unsqueeze(1)).to(xa.dtype)
    return B.matmul(scaled.flatten(0, 1)).view(*xa.shape[:2], -1)


def row_deltas(xa: Tensor, B: Matrix, b: Tensor, d: Tensor) -> Tensor:  # noqa: N803
    """Return b * ((d * u) B^T), (rows, n, out), in the dtype of u; arguments as for `row_residual`."""
    return _row_up(xa, B, d).mul_(b.unsqueeze(1))


def row_residual(start: Tensor, xa: Tensor, B: Matrix, b: Tensor, d: Tensor) -> Tensor:  # noqa: N803
    """Return start + b * ((d * u) B^T), (rows, n, out), with different vectors for each row. For inference.

    Args:
        start: (rows, n, out), the base layer's output.
        xa: u = x A^T, (rows, n, r), of the same dtype.
        B: rank-major, (r, out), of the same dtype.
        b: the vectors b, (rows, out), of any floating-point dtype.
        d: the vectors d times the projections' scale, (rows, r), of any floating-point dtype.
    """
    z = _row_up(xa, B, d)
    # Compute in the wider of the two dtypes and round once.
    return cast(torch.addcmul(start, z, b.unsqueeze(1)), start.dtype)
