"""VeRA's mathematics on plain tensors, with exact hand-written gradients.

One layer computes (Kopiczko et al., ICLR 2024, eq. 2), for a row x of T tokens,

    y = W0 x + bias + diag(b) B diag(d) A x.

Here A is (r, in), B is kept rank-major, (r, out), and `scale` is a number that belongs into B (see `sources`). The ways
to compute it are told in `routing`. The vectors live in one small matrix

    C = scale * d b^T * B        (r, out; * elementwise)        so that        delta W = C^T A,

which costs r * out, not T * out: no activation is scaled, unless there are fewer of them than ranks. Both vectors'
gradients come from one matrix as well,

    P = (A G^T) * B    with    G = g^T x  (out, in),        db = scale * P^T d,        dd = scale * P b,

where A G^T (r, out) may be computed as u^T g, u = x A^T (T, r), or as written, whichever is cheaper.

Products run in the compute dtype (that of x); what concerns the vectors alone is done in the vectors' dtype, at least
float32.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veratune.ops.planning import Plan, Way
from veratune.utils.torch_private import transformations_active


def gradients_wanted(*values: object) -> bool:
    """Return whether a gradient of any of these is wanted here."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def check_values(x: Tensor, *operands: Tensor | None) -> None:
    """Raise RuntimeError if operands have no values where x has: torch would compute rubbish with some of them."""
    for operand in operands:
        if operand is not None and operand.is_meta != x.is_meta:
            raise RuntimeError(
                "a weight, a vector or an input of an adapted layer is on the meta device, without values, and the"
                " others are not. If accelerate has offloaded it (preload_module_classes, say), call"
                " accelerate.hooks.remove_hook_from_submodules(model), and offload before adding adapters"
            )


def fold_vectors(b_projection: Tensor, b: Tensor, d: Tensor, scale: float) -> Tensor:
    """Return C = scale * d b^T * B, (r, out), in B's dtype, rounded once from float32 or wider.

    With leading dimensions of b and d, (..., out) and (..., r), the same for each pair.
    """
    wide = _wide(b.dtype, b_projection.dtype)
    folded = (d.to(wide) * scale).unsqueeze(-1) * b.to(wide).unsqueeze(-2)
    return folded.mul_(b_projection).to(b_projection.dtype)


def delta_weight(a_projection: Tensor, b_projection: Tensor, b: Tensor, d: Tensor, scale: float) -> Tensor:
    """Return delta W = diag(b) B diag(d) A, (out, in), in the projections' dtype.

    With leading dimensions of b and d, (..., out) and (..., r), a delta for each pair, (..., out, in).
    """
    check_values(a_projection, b_projection, b, d)
    return fold_vectors(b_projection, b, d, scale).mT @ a_projection


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which no product on this device is narrowed."""
    # Autocast knows nothing of some devices, such as meta, and says so with an error.
    known = device.type != "meta" and torch.amp.is_autocast_available(device.type)
    narrowing = known and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if narrowing else nullcontext()


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def _adapted_weight(weight: Tensor, folded: Tensor, a_projection: Tensor, transposed: bool) -> Tensor:
    """Return W0 + C^T A, (out, in).

    It has W0's memory layout, so that products with it sum in the same order, and with C = 0 give the same bits.
    """
    if transposed:
        return torch.addmm(weight, a_projection.t(), folded).t()
    return torch.addmm(weight, folded.t(), a_projection)


def _gradient_way(plan: Plan, xa: Tensor | None) -> Way:
    """Return how the vectors' gradients are computed; a plan that expected none to be wanted takes what there is."""
    return plan.gradients or ("dense" if xa is None else "folded")


def _up(xa: Tensor, b_projection: Tensor, d: Tensor, scale: float) -> Tensor:
    """Return z = (d * u) B^T, (T, out), without b."""
    return (xa * (d.to(_wide(d.dtype)) * scale)).to(xa.dtype) @ b_projection


class _VeraLinear(torch.autograd.Function):
    """y = start + x C^T A, where start is `x W0^T + bias`, or an output that another module has computed.

    `xa` is u = x A^T, a constant as far as autograd is concerned: x gets its whole gradient here. The second output
    is what the plan keeps for the backward pass: the adapted weight, or the product with B.
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
        xa: Tensor | None,
        scale: float,
        plan: Plan,
        transposed: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if plan.output == "dense":
            assert weight is not None
            folded = fold_vectors(b_projection, b, d, scale)
            adapted = _adapted_weight(weight, folded, a_projection, transposed)
            return F.linear(x, adapted, bias), adapted if plan.keep else None
        assert xa is not None
        own = weight is not None
        if weight is not None:
            start = F.linear(x, weight.t() if transposed else weight, bias)
        assert start is not None
        if plan.output == "scaled":
            up = _up(xa, b_projection, d, scale)
            added = (up * b).to(start.dtype)
            return start.add_(added) if own else start + added, up if plan.keep else None
        folded = fold_vectors(b_projection, b, d, scale)
        return start.addmm_(xa, folded) if own else torch.addmm(start, xa, folded), None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, _, weight, _, a_projection, b_projection, b, d, xa, ctx.scale, ctx.plan, ctx.transposed = inputs
        kept = output[1]
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        wants_vectors = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
        way = _gradient_way(ctx.plan, xa)
        from_x = ctx.needs_input_grad[2] or (wants_vectors and way == "dense")
        from_down = wants_vectors and way != "dense"
        ctx.save_for_backward(
            x if from_x else None, weight, a_projection, b_projection, b, d, xa if from_down else None, kept
        )

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 12
        # The caller's autocast must not narrow the float32 part.
        with torch.no_grad(), without_autocast(g.device):
            grads = _backward(ctx, g)
        # With a graph wanted (create_graph=True), the gradients look differentiable and refuse to be. A compiler
        # refuses by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = tuple(None if grad is None else _refuse_second_derivative(grad) for grad in grads)
        return grads


class _NotDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(
            "veratune's layers cannot be differentiated twice: compute second derivatives on the merged model, or with"
            " dense algebra"
        )


def _refuse_second_derivative(grad: Tensor) -> Tensor:
    refusing: Tensor = _NotDifferentiable.apply(grad.detach().requires_grad_())  # type: ignore[no-untyped-call]
    return refusing


class _EagerVeraLinear(_VeraLinear):
    """The same in the older style, for which autograd does not inspect a signature in each call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        output = _VeraLinear.forward(*arguments)
        _VeraLinear.setup_context(ctx, arguments, output)
        return output

    # That of a function without one.
    setup_context = torch.autograd.Function.setup_context


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a_projection, b_projection, b, d, xa, kept = ctx.saved_tensors
    need_x, need_start, need_weight, need_bias, _, _, need_b, need_d = ctx.needs_input_grad[:8]
    plan, scale, transposed = ctx.plan, ctx.scale, ctx.transposed
    need_vectors = need_b or need_d
    way = _gradient_way(plan, xa)
    wide = _wide(b.dtype, g.dtype)
    grad_x = grad_weight = grad_b = grad_d = scaled = None
    if need_weight or (need_vectors and way == "dense"):
        grad_weight = g.t() @ x
    if (need_x and plan.output == "scaled") or (need_vectors and way == "scaled"):
        scaled = (g * b).to(g.dtype) @ b_projection.t()
    if need_vectors and way == "scaled":
        assert scaled is not None
        if need_b:
            up = kept if plan.output == "scaled" else None
            if up is None:
                up = _up(xa, b_projection, d, scale)
            grad_b = (g.to(wide) * up).sum(0).to(b.dtype)
        if need_d:
            grad_d = ((xa.to(wide) * scaled).sum(0) * scale).to(d.dtype)
    elif need_vectors:
        if way == "dense":
            assert grad_weight is not None
            through_rank = a_projection @ grad_weight.t()
        else:
            through_rank = xa.t() @ g
        products = through_rank.to(wide).mul_(b_projection)
        if need_b:
            grad_b = (products.t() @ (d.to(wide) * scale)).to(b.dtype)
        if need_d:
            grad_d = (products @ (b.to(wide) * scale)).to(d.dtype)
    if need_x:
        if plan.output == "dense":
            if kept is None:
                folded = fold_vectors(b_projection, b, d, scale)
                kept = _adapted_weight(weight, folded, a_projection, transposed)
            grad_x = g @ kept
        else:
            if plan.output == "scaled":
                assert scaled is not None
                through = (scaled * (d.to(wide) * scale)).to(g.dtype)
            else:
                through = g @ fold_vectors(b_projection, b, d, scale).t()
            if weight is None:
                grad_x = through @ a_projection
            else:
                grad_x = (g @ (weight.t() if transposed else weight)).addmm_(through, a_projection)
    return (
        grad_x,
        g if need_start else None,
        None if grad_weight is None or not need_weight else grad_weight.t() if transposed else grad_weight,
        g.sum(0) if need_bias else None,
        None,
        None,
        grad_b,
        grad_d,
        *(None,) * 4,
    )


def vera_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a_projection: Tensor,
    b_projection: Tensor,
    b: Tensor,
    d: Tensor,
    scale: float,
    plan: Plan,
    *,
    transposed: bool = False,
    xa: Tensor | None = None,
) -> Tensor:
    """Return y = x (W0 + delta W)^T + bias, (T, out), by the plan's route.

    Args:
        x: (T, in), in the compute dtype.
        weight: W0 (out, in), or (in, out) if `transposed`, in the compute dtype.
        bias: (out,), or None.
        a_projection: A (r, in), in the compute dtype.
        b_projection: B rank-major, (r, out), in the compute dtype.
        b: the vector b, (out,), of any floating dtype.
        d: the vector d, (r,), of any floating dtype.
        scale: factor that belongs into B.
        plan: the route.
        transposed: whether the weight is stored as (in, out).
        xa: x A^T (T, r), without a graph, where it has been computed already.

    Gradients flow to x, weight, bias, b and d, each computed only where it is wanted. Differentiating them again raises
    RuntimeError.
    """
    if xa is None and plan.needs_xa:
        xa = project(x, a_projection)
    return _apply(x, None, weight, bias, a_projection, b_projection, b, d, xa, scale, plan, transposed)


def vera_add(
    start: Tensor,
    x: Tensor,
    a_projection: Tensor,
    b_projection: Tensor,
    b: Tensor,
    d: Tensor,
    scale: float,
    plan: Plan,
    *,
    xa: Tensor | None = None,
) -> Tensor:
    """Return start + x delta W^T, (T, out), through the rank: for a base layer whose weight is not at hand.

    Args:
        start: (T, out), the base layer's output, in the compute dtype.
        x: as for `vera_linear`, and so the arguments that follow.
        a_projection: A.
        b_projection: B.
        b: the vector b.
        d: the vector d.
        scale: factor that belongs into B.
        plan: the route, whose output is not dense.
        xa: x A^T.
    """
    if xa is None:
        xa = project(x, a_projection)
    return _apply(x, start, None, None, a_projection, b_projection, b, d, xa, scale, plan, False)


class _AddDelta(torch.autograd.Function):
    """W0 + delta W, for a weight that somebody else computes with."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, a_projection: Tensor, b_projection: Tensor, b: Tensor, d: Tensor, scale: float
    ) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(a_projection, b_projection, b, d)
        if weight.ndim == 2 and weight.dtype == b_projection.dtype:
            return torch.addmm(weight, fold_vectors(b_projection, b, d, scale).t(), a_projection)
        return (weight + delta_weight(a_projection, b_projection, b, d, scale)).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a_projection, b_projection, b, d = ctx.saved_tensors
        need_weight, _, _, need_b, need_d, _ = ctx.needs_input_grad
        grad_b = grad_d = None
        if need_b or need_d:
            wide = _wide(b.dtype, a_projection.dtype)
            with without_autocast(g.device):
                products = (a_projection @ g.to(a_projection.dtype).mT).to(wide) * b_projection
                if need_b:
                    grad_b = ((d.to(wide) * ctx.scale).unsqueeze(-2) @ products).squeeze(-2).to(b.dtype)
                if need_d:
                    grad_d = (products @ (b.to(wide) * ctx.scale).unsqueeze(-1)).squeeze(-1).to(d.dtype)
        return g if need_weight else None, None, None, grad_b, grad_d, None


def add_delta(weight: Tensor, a_projection: Tensor, b_projection: Tensor, b: Tensor, d: Tensor, scale: float) -> Tensor:
    """Return W0 + delta W, (..., out, in), in W0's dtype: for code that computes with the weight itself.

    Args:
        weight: W0, (..., out, in).
        a_projection: A (r, in), float32 or wider.
        b_projection: B rank-major, (r, out), of the same dtype.
        b: the vectors b, (..., out).
        d: the vectors d, (..., r).
        scale: factor that belongs into B.

    Gradients flow to weight, b and d, once; a compiler, and torch.func, differentiate torch's own operations.
    """
    arguments = (weight, a_projection, b_projection, b, d)
    check_values(*arguments)
    if transformations_active() or torch.compiler.is_compiling():
        scaled = (d * scale).unsqueeze(-1) * b.unsqueeze(-2) * b_projection
        return (weight + scaled.mT @ a_projection).to(weight.dtype)
    added: Tensor = _AddDelta.apply(*arguments, scale)  # type: ignore[no-untyped-call]
    return added


def _with_own_vectors(start: Tensor, xa: Tensor, b_projection: Tensor, b: Tensor, d: Tensor, scale: float) -> Tensor:
    """Return start + b * (B (d * u)), where each row has vectors of its own, (T, out) and (T, r)."""
    return start + (_up(xa, b_projection, d, scale) * b).to(start.dtype)


class _SelectAndAdd(torch.autograd.Function):
    """start + x delta W_e^T, where each row of x has the vectors of one e of a stack."""

    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor,
        x: Tensor,
        a_projection: Tensor,
        b_projection: Tensor,
        b: Tensor,
        d: Tensor,
        groups: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.scale = scale
        with without_autocast(x.device):  # x has been cast already
            xa = x @ a_projection.t()
            ctx.save_for_backward(a_projection, b_projection, b, d, groups, xa)
            return _with_own_vectors(start, xa, b_projection, b[groups], d[groups], scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a_projection, b_projection, b, d, groups, xa = ctx.saved_tensors
        need_start, need_x, _, _, need_b, need_d = ctx.needs_input_grad[:6]
        grad_x = grad_b = grad_d = None
        wide = _wide(b.dtype, g.dtype)
        with without_autocast(g.device):
            chosen = d[groups]
            through = (g * b[groups]).to(g.dtype) @ b_projection.t()
            if need_b:
                up = _up(xa, b_projection, chosen, ctx.scale)
                grad_b = torch.zeros_like(b, dtype=wide).index_add_(0, groups, g.to(wide) * up).to(b.dtype)
            if need_d:
                products = xa.to(wide) * through * ctx.scale
                grad_d = torch.zeros_like(d, dtype=wide).index_add_(0, groups, products).to(d.dtype)
            if need_x:
                grad_x = (through * (chosen.to(wide) * ctx.scale)).to(g.dtype) @ a_projection
        return g if need_start else None, grad_x, None, None, grad_b, grad_d, None, None


def select_and_add(
    start: Tensor,
    x: Tensor,
    a_projection: Tensor,
    b_projection: Tensor,
    b: Tensor,
    d: Tensor,
    groups: Tensor,
    scale: float,
) -> Tensor:
    """Return start + x delta W^T, (T, out), where each row of x has vectors of its own.

    All share A and B, so this takes two products, whatever the number of different vectors. What is kept for the
    backward pass is x A^T, (T, r).

    Args:
        start: (T, out), in the compute dtype.
        x: (T, in).
        a_projection: A (r, in).
        b_projection: B rank-major, (r, out).
        b: the vectors b of a stack, (count, out).
        d: the vectors d of the stack, (count, r).
        groups: int64 (T,), which of the stack's vectors each row has.
        scale: factor that belongs into B.
    """
    if transformations_active() or torch.compiler.is_compiling():
        return _with_own_vectors(start, x @ a_projection.t(), b_projection, b[groups], d[groups], scale)
    arguments = (start, x, a_projection, b_projection, b, d, groups, scale)
    check_values(start, x, b, d)
    added: Tensor = _SelectAndAdd.apply(*arguments)  # type: ignore[no-untyped-call]
    return added


def _up_for_rows(xa: Tensor, b_projection: Tensor, d: Tensor) -> Tensor:
    scaled = (xa * d.unsqueeze(1)).to(xa.dtype)
    return (scaled.flatten(0, 1) @ b_projection).view(*xa.shape[:2], -1)


def for_rows(xa: Tensor, b_projection: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """Return b * (B (d * u)), (rows, n, out), in the dtype of u; as for `add_for_rows`, of at least 32 bits."""
    return _up_for_rows(xa, b_projection, d).mul_(b.unsqueeze(1))


def add_for_rows(start: Tensor, xa: Tensor, b_projection: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """Return start + b * (B (d * u)), (rows, n, out), where each row has vectors of its own: for inference.

    Args:
        start: (rows, n, out), the base layer's output.
        xa: u = x A^T, (rows, n, r), of the same dtype.
        b_projection: B rank-major, (r, out), of the same dtype.
        b: the vectors b, (rows, out), of any floating dtype.
        d: the vectors d with the projections' scale, (rows, r), of any floating dtype.
    """
    up = _up_for_rows(xa, b_projection, d)
    if torch.promote_types(b.dtype, start.dtype) == start.dtype:
        return torch.addcmul(start, up, b.to(start.dtype).unsqueeze(1))
    return start + (up * b.unsqueeze(1)).to(start.dtype)


def _apply(*arguments: Any) -> Tensor:
    x, start, weight, bias, _, _, b, d = arguments[:8]
    check_values(x, start, weight, bias, b, d)
    if transformations_active():
        return _composed(*arguments)
    # Autograd's own bookkeeping can take longer than a small layer: there is none where nothing is differentiated, and
    # the full one only for a compiler, which needs it.
    if not gradients_wanted(*arguments):
        output = _VeraLinear.forward(*arguments)[0]
    elif torch.compiler.is_compiling():
        output = _VeraLinear.apply(*arguments)[0]  # type: ignore[no-untyped-call]
    else:
        output = _EagerVeraLinear.apply(*arguments)[0]  # type: ignore[no-untyped-call]
    return output


def _composed(
    x: Tensor,
    start: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    a_projection: Tensor,
    b_projection: Tensor,
    b: Tensor,
    d: Tensor,
    xa: Tensor | None,
    scale: float,
    plan: Plan,
    transposed: bool,
) -> Tensor:
    """Return the same from torch's own operations alone, for torch.func: vmap, jvp and derivatives of any order."""
    if weight is not None:
        start = F.linear(x, weight.t() if transposed else weight, bias)
    assert start is not None
    scaled = (x @ a_projection.t()) * (d.to(_wide(d.dtype)) * scale)
    return start + ((scaled.to(x.dtype) @ b_projection) * b).to(start.dtype)


def project(x: Tensor, a_projection: Tensor) -> Tensor:
    """Return u = x A^T, (T, r), without a graph: the functions above give x its gradient."""
    with torch.no_grad():
        return x @ a_projection.t()
