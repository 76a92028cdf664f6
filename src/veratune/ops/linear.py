"""Autograd entry points of adapted linear layers, with exact hand-written gradients.

For each of T tokens x, a layer computes (Kopiczko et al., ICLR 2024, eq. 2)

    y = W0 x + bias + diag(b) B diag(d) A x.

Here A is (r, in), B is stored rank-major, (r, out), and `scale` is the constant factor of B that the stored B does not
include (see `projections.schemes`). The vectors are folded into one small matrix

    C = scale * d b^T * B        (r, out; * elementwise)        so that        delta W = C^T A,

which takes r * out multiplications instead of T * out: scaling the activations only pays off if T < r. The gradients of
both vectors also come from one matrix,

    P = (A G^T) * B    with    G = g^T x  (out, in),        db = scale * P^T d,        dd = scale * P b,

where A G^T (r, out) may be computed as u^T g, u = x A^T (T, r), or as written, whichever is cheaper. RunLoRA (ACL 2025)
similarly chooses among computation graphs of LoRA. The routes are in `ops.routes`.

Products run in the compute dtype (that of x), but arithmetic on the vectors runs in their dtype, or in float32 if their
dtype is narrower. Where it costs little, the gradients of float32 vectors are computed without rounding to a narrower
compute dtype (`ops.exact`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from veratune.ops import exact
from veratune.ops.factors import Factors, check_values
from veratune.ops.graph_inputs import source_of
from veratune.ops.planning import RouteChoice
from veratune.ops.routes import ROUTES, LinearInputs, Wanted
from veratune.projections.structure import Matrix, Structure
from veratune.utils.tensors import cast, gradients_wanted, without_autocast
from veratune.utils.torch_private import apply_function, transformations_active


class _Constants(NamedTuple):
    """The non-tensor arguments of one call."""

    choice: RouteChoice
    scale: float
    transposed: bool
    a_structure: Structure
    b_structure: Structure
    input_again: Callable[[], Tensor] | None = None

    def inputs(
        self,
        x: Tensor | None,
        start: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        factors: tuple[Tensor, Tensor, Tensor, Tensor],
        xa: Tensor | None,
    ) -> LinearInputs:
        a_values, b_values, b, d = factors
        matrices = Matrix(a_values, self.a_structure), Matrix(b_values, self.b_structure)
        return LinearInputs(x, start, weight, bias, Factors(*matrices, b, d, self.scale), xa, self.transposed)


class _AdaptedLinear(torch.autograd.Function):
    """y = start + x C^T A, where start is `x W0^T + bias`, or the output of another module.

    `xa` is u = x A^T, a constant for autograd: the complete gradient of x is computed here. The second output is the
    tensor that the route keeps for the backward pass, or None.
    """

    @staticmethod
    def forward(
        x: Tensor,
        start: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        a_values: Tensor,
        b_values: Tensor,
        b: Tensor,
        d: Tensor,
        xa: Tensor | None,
        constants: _Constants,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = constants.inputs(x, start, weight, bias, (a_values, b_values, b, d), xa)
        return ROUTES[constants.choice.route].forward(inputs, constants.choice.keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        kept = output[1]
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        _AdaptedLinear.save(ctx, inputs, kept)

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], kept: Tensor | None) -> None:
        x, _, weight, _, a_values, b_values, b, d, xa, constants = inputs
        ctx.set_materialize_grads(False)
        ctx.constants = constants
        needed = ctx.needs_input_grad
        wants_vectors = needed[6] or needed[7]
        from_x = ROUTES[constants.choice.route].gradients_from == "x"
        saves_input = wants_vectors and constants.input_again is None
        saves_x = needed[2] or (saves_input and from_x)
        saves_xa = saves_input and not from_x
        ctx.save_for_backward(x if saves_x else None, weight, a_values, b_values, b, d, xa if saves_xa else None, kept)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 10
        # The caller's autocast must not apply to computations in float32.
        with without_autocast(g.device):
            if not torch.is_grad_enabled():
                return _backward(ctx, g)
            with torch.no_grad():
                grads = _backward(ctx, g)
        # With create_graph=True, return gradients that require grad but raise an error when differentiated.
        # torch.compile raises an error itself.
        if not torch.compiler.is_compiling():
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
            "veratune's layers cannot be differentiated twice: compute second derivatives on the merged model, or"
            " compute W0 + delta W with ordinary torch operations"
        )


def _refuse_second_derivative(grad: Tensor) -> Tensor:
    refusing: Tensor = _NotDifferentiable.apply(grad.detach().requires_grad_())  # type: ignore[no-untyped-call]
    return refusing


class _EagerAdaptedLinear(_AdaptedLinear):
    """The same without `setup_context`, which avoids a signature inspection in each call and a second output."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:  # type: ignore[override]
        output, kept = _AdaptedLinear.forward(*arguments)
        _AdaptedLinear.save(ctx, arguments, kept)
        return output

    # Restore the default, as if `setup_context` were not defined.
    setup_context = torch.autograd.Function.setup_context


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a_values, b_values, b, d, xa, kept = ctx.saved_tensors
    need_x, need_start, need_weight, need_bias, _, _, need_b, need_d = ctx.needs_input_grad[:8]
    constants: _Constants = ctx.constants
    route = ROUTES[constants.choice.route]
    wanted = Wanted(need_x, need_b, need_d)
    if wanted.vectors and constants.input_again is not None:
        if x is None:
            x = constants.input_again()
        if route.gradients_from == "xa":
            xa = project(x, Matrix(a_values, constants.a_structure), exactly=constants.choice.exact)
    weight_gradient = None
    if need_weight or (wanted.vectors and route.gradients_from == "x"):
        exactly = constants.choice.exact and wanted.vectors
        weight_gradient = exact.weight_gradient(g, x) if exactly else g.t() @ x
    inputs = constants.inputs(x, None, weight, None, (a_values, b_values, b, d), xa)
    grads = route.backward(g, inputs, kept, wanted, weight_gradient)
    grad_weight = None
    if need_weight and weight_gradient is not None:
        grad_weight = cast(weight_gradient.t() if constants.transposed else weight_gradient, g.dtype)
    return (
        grads.x,
        g if need_start else None,
        grad_weight,
        g.sum(0) if need_bias else None,
        None,
        None,
        grads.b,
        grads.d,
        None,
        None,
    )


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    choice: RouteChoice,
    *,
    transposed: bool = False,
    xa: Tensor | Callable[[bool], Tensor] | None = None,
) -> Tensor:
    """Return y = x (W0 + delta W)^T + bias, (T, out), by the chosen route.

    Gradients flow to x, weight, bias, b and d, each computed only if required. Differentiating them again raises
    RuntimeError.

    Args:
        x: (T, in), in the compute dtype.
        weight: W0 (out, in), or (in, out) if `transposed`, in the compute dtype.
        bias: (out,), or None.
        factors: the adapter, A and B in the compute dtype.
        choice: the route.
        transposed: whether the weight is stored as (in, out).
        xa: x A^T (T, r), as `project` returns it, if already computed; or a function of `exactly` that returns it.
    """
    return _apply(x, None, weight, bias, factors, choice, transposed, xa)


def residual(start: Tensor, x: Tensor, factors: Factors, choice: RouteChoice, *, xa: Tensor | None = None) -> Tensor:
    """Return start + x delta W^T, (T, out), through the low-rank factors: for a base layer whose weight cannot be read.

    Args:
        start: (T, out), the base layer's output, in the compute dtype.
        x: (T, in), in the compute dtype.
        factors: the adapter, A and B in the compute dtype.
        choice: the route, one that does not read the weight.
        xa: x A^T (T, r), as `project` returns it, if already computed.
    """
    return _apply(start=start, x=x, weight=None, bias=None, factors=factors, choice=choice, transposed=False, xa=xa)


def _apply(
    x: Tensor,
    start: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Factors,
    choice: RouteChoice,
    transposed: bool,
    xa: Tensor | Callable[[bool], Tensor] | None,
) -> Tensor:
    A, B, b, d, scale = factors  # noqa: N806
    check_values(x, start, weight, bias, b, d)
    if transformations_active():
        return _composed(x, start, weight, bias, factors, transposed)
    graded = torch.is_grad_enabled()
    training = graded and (b.requires_grad or d.requires_grad)
    exactly = choice.exact and training
    if not ROUTES[choice.route].uses_xa(training):
        xa = None
    elif callable(xa):
        xa = xa(exactly)
    elif xa is None or (exactly and xa.dtype == x.dtype):
        xa = project(x, A, exactly=exactly)
    elif not exactly:
        xa = cast(xa, x.dtype)
    input_again = source_of(x) if choice.input_again and training else None
    constants = _Constants(choice, scale, transposed, A.structure, B.structure, input_again)
    arguments = (x, start, weight, bias, A.values, B.values, b, d, xa, constants)
    # Autograd's overhead can exceed the time of a small layer: skip autograd if no gradient is required, and use
    # `setup_context`, which is slower, only under torch.compile, which requires it.
    if not (training or (graded and gradients_wanted(x, start, weight, bias))):
        output = _AdaptedLinear.forward(*arguments)[0]
    elif torch.compiler.is_compiling():
        output = _AdaptedLinear.apply(*arguments)[0]  # type: ignore[no-untyped-call]
    else:
        output = apply_function(_EagerAdaptedLinear, *arguments)
    return output


def _composed(
    x: Tensor,
    start: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Factors,
    transposed: bool,
) -> Tensor:
    """Compute the layer with ordinary torch operations, for torch.func: vmap, jvp and derivatives of any order."""
    if weight is not None:
        start = F.linear(x, weight.t() if transposed else weight, bias)
    assert start is not None
    scaled = factors.A.rmatmul(x) * factors.scaled_d()
    return start + (factors.B.matmul(scaled.to(x.dtype)) * factors.b).to(start.dtype)


def project(x: Tensor, A: Matrix, *, exactly: bool = False) -> Tensor:  # noqa: N803
    """Return u = x A^T, (T, r), without a graph, because the functions above compute the complete gradient of x.

    The result is in the dtype of x or, if `exactly`, in float32 or wider.
    """
    x = x.detach()  # A and B never require gradients
    return exact.project(x, A) if exactly else A.rmatmul(x)
