"""VeRA's mathematics on plain tensors, with exact hand-written gradients.

One layer computes (Kopiczko et al., ICLR 2024, eq. 2), for a row x of T tokens,

    y = W0 x + bias + diag(b) B diag(d) A x.

Here A is (r, in), B is kept rank-major, (r, out), and `gain` is a number that belongs into B (see `sources`). The two
vectors live in one small matrix

    C = gain * d b^T * B        (r, out; * elementwise)        so that        delta W = C^T A,

which costs r * out, not T * out: no activation is ever scaled. Both vectors' gradients come from one matrix as well,

    P = (A G^T) * B    with    G = g^T x  (out, in),        db = gain * P^T d,        dd = gain * P b,

where A G^T (r, out) may be computed as (x A^T)^T g or as written, whichever is cheaper.

Products run in the compute dtype (that of x); what concerns the vectors alone is done in the vectors' dtype, at least
float32.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veratune.routing import Plan


def fold_vectors(b_projection: Tensor, b: Tensor, d: Tensor, gain: float) -> Tensor:
    """Return C = gain * d b^T * B, (r, out), in B's dtype, rounded once from float32 or wider."""
    wide = torch.promote_types(torch.promote_types(b.dtype, b_projection.dtype), torch.float32)
    folded = torch.outer(d.to(wide) * gain, b.to(wide))
    return folded.mul_(b_projection).to(b_projection.dtype)


def delta_weight(a_projection: Tensor, b_projection: Tensor, b: Tensor, d: Tensor, gain: float) -> Tensor:
    """Return delta W = diag(b) B diag(d) A, (out, in), in the projections' dtype."""
    return fold_vectors(b_projection, b, d, gain).t() @ a_projection


def _adapted_weight(weight: Tensor, folded: Tensor, a_projection: Tensor, transposed: bool) -> Tensor:
    """Return W0 + C^T A, (out, in).

    It has W0's memory layout, so that products with it sum in the same order, and with C = 0 give the same bits.
    """
    if transposed:
        return torch.addmm(weight, a_projection.t(), folded).t()
    return torch.addmm(weight, folded.t(), a_projection)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which no product on this device is narrowed."""
    # Autocast knows nothing of some devices, such as meta, and says so with an error.
    known = device.type != "meta" and torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


class _VeraLinear(torch.autograd.Function):
    """y = start + x C^T A, where start is `x W0^T + bias`, or an output that another module has computed.

    The second output is what the backward pass wants again and the forward pass had anyway: x A^T, or nothing.
    """

    @staticmethod
    def forward(
        x: Tensor,
        start: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        a_projection: Tensor,
        b_projection: Tensor,
        b: Tensor,
        d: Tensor,
        gain: float,
        plan: Plan,
        transposed: bool,
    ) -> tuple[Tensor, Tensor | None]:
        folded = fold_vectors(b_projection, b, d, gain)
        if weight is not None and plan.dense_output:
            return F.linear(x, _adapted_weight(weight, folded, a_projection, transposed), bias), None
        down = x @ a_projection.t()
        if weight is None:
            assert start is not None
            return torch.addmm(start, down, folded), down
        return F.linear(x, weight.t() if transposed else weight, bias).addmm_(down, folded), down

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, _, weight, _, a_projection, b_projection, b, d, ctx.gain, ctx.plan, ctx.transposed = inputs
        down = output[1]
        if down is not None:
            ctx.mark_non_differentiable(down)
        ctx.set_materialize_grads(False)
        wants_vectors = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
        wants_weight = ctx.needs_input_grad[2]
        keep_down = wants_vectors and not ctx.plan.dense_gradients
        keep_x = wants_weight or (wants_vectors and (ctx.plan.dense_gradients or down is None))
        ctx.save_for_backward(
            x if keep_x else None, weight, a_projection, b_projection, b, d, down if keep_down else None
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 11
        # The caller's autocast must not narrow the float32 part.
        with without_autocast(g.device):
            return _backward(ctx, g)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a_projection, b_projection, b, d, down = ctx.saved_tensors
    need_x, need_start, need_weight, need_bias, _, _, need_b, need_d, _, _, _ = ctx.needs_input_grad
    grad_x = grad_weight = grad_b = grad_d = None
    if need_weight or ((need_b or need_d) and ctx.plan.dense_gradients):
        grad_weight = g.t() @ x
    if need_b or need_d:
        if ctx.plan.dense_gradients:
            assert grad_weight is not None
            through_rank = a_projection @ grad_weight.t()
        else:
            through_rank = (x @ a_projection.t() if down is None else down).t() @ g
        wide = torch.promote_types(torch.promote_types(b.dtype, g.dtype), torch.float32)
        products = through_rank.to(wide).mul_(b_projection)
        if need_b:
            grad_b = (products.t() @ (d.to(wide) * ctx.gain)).to(b.dtype)
        if need_d:
            grad_d = (products @ (b.to(wide) * ctx.gain)).to(d.dtype)
    if need_x:
        folded = fold_vectors(b_projection, b, d, ctx.gain)
        if weight is not None and ctx.plan.dense_output:
            grad_x = g @ _adapted_weight(weight, folded, a_projection, ctx.transposed)
        elif weight is not None:
            grad_x = (g @ (weight.t() if ctx.transposed else weight)).addmm_(g @ folded.t(), a_projection)
        else:
            grad_x = (g @ folded.t()) @ a_projection
    return (
        grad_x,
        g if need_start else None,
        None if grad_weight is None or not need_weight else grad_weight.t() if ctx.transposed else grad_weight,
        g.sum(0) if need_bias else None,
        None,
        None,
        grad_b,
        grad_d,
        None,
        None,
        None,
    )


def vera_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_projection: Tensor,
    b_projection: Tensor,
    b: Tensor,
    d: Tensor,
    gain: float,
    plan: Plan,
    *,
    transposed: bool = False,
) -> Tensor:
    """Return y = x (W0 + delta W)^T + bias, (T, out), by the plan's route.

    Args:
        x: (T, in), in the compute dtype.
        weight: W0 (out, in), or (in, out) if `transposed`, in the compute dtype.
        bias: (out,), or None.
        a_projection: A (r, in), in the compute dtype.
        b_projection: B rank-major, (r, out), in the compute dtype.
        b, d: the vectors, (out,) and (r,), of any floating dtype.
        gain: factor that belongs into B.
        plan: the route.
        transposed: whether the weight is stored as (in, out).

    Gradients flow to x, weight, bias, b and d, each computed only where it is wanted. A second differentiation raises
    RuntimeError.
    """
    output: Tensor = _VeraLinear.apply(  # type: ignore[no-untyped-call]
        x, None, weight, bias, a_projection, b_projection, b, d, gain, plan, transposed
    )[0]
    return output


def vera_add(
    start: Tensor,
    x: Tensor,
    a_projection: Tensor,
    b_projection: Tensor,
    b: Tensor,
    d: Tensor,
    gain: float,
    plan: Plan,
) -> Tensor:
    """Return start + x delta W^T, (T, out), through the rank: for a base layer whose weight is not at hand.

    Args:
        start: (T, out), the base layer's output, in the compute dtype.
        x, a_projection, b_projection, b, d, gain: as for `vera_linear`.
        plan: only the route of the gradients counts.
    """
    output: Tensor = _VeraLinear.apply(  # type: ignore[no-untyped-call]
        x, start, None, None, a_projection, b_projection, b, d, gain, plan, False
    )[0]
    return output
