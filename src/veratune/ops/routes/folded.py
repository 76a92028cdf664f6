"""The route for a moderate number of tokens: b and d are folded into the small matrix C = d b^T * B."""

from typing import ClassVar, Literal

from torch import Tensor

from veratune.ops import exact
from veratune.ops.costs import Cost, LayerShape
from veratune.ops.factors import Factors
from veratune.ops.routes.base import Gradients, LinearInputs, Route, Wanted, vectors_dtype
from veratune.projections.structure import Matrix
from veratune.utils.tensors import cast


def vector_gradients_through_rank(
    g: Tensor, xa: Tensor, factors: Factors, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None]:
    """Return (db, dd) from P = B * (u^T g), with u = x A^T, (T, r), and the output's gradient g, (T, out).

    If u is in a wider dtype than g, nothing is rounded to g's dtype.
    """
    B, wide = factors.B, vectors_dtype(g, factors)  # noqa: N806
    values = B.structure.outer(B.values, xa, g, wide) if xa.dtype == g.dtype else exact.outer(B, xa, g, wide)
    return factors.vector_gradients(Matrix(values, B.structure), wanted.b, wanted.d)


class Folded(Route):
    """y = y0 + u C with u = x A^T and C = scale * d b^T * B."""

    name: ClassVar[str] = "folded"
    reads_weight: ClassVar[bool] = False
    gradients_from: ClassVar[Literal["x", "xa"]] = "xa"

    def uses_xa(self, training: bool) -> bool:
        return True

    def forward(self, inputs: LinearInputs, keep: bool) -> tuple[Tensor, Tensor | None]:
        assert inputs.xa is not None
        start, writable = inputs.base_output()
        folded = inputs.factors.folded()
        xa = cast(inputs.xa, folded.dtype)
        return folded.structure.plus_matmul(start, folded.values, xa, in_place=writable), None

    def backward(
        self, g: Tensor, inputs: LinearInputs, kept: Tensor | None, wanted: Wanted, weight_gradient: Tensor | None
    ) -> Gradients:
        factors = inputs.factors
        grad_x = grad_b = grad_d = None
        if wanted.vectors:
            assert inputs.xa is not None
            grad_b, grad_d = vector_gradients_through_rank(g, inputs.xa, factors, wanted)
        if wanted.x:
            grad_x = inputs.input_gradient(g, factors.folded().rmatmul(g))
        return Gradients(grad_x, grad_b, grad_d)

    def cost(self, cost: Cost, shape: LayerShape, *, training: bool, backward: bool, keep: bool) -> None:
        n, m, r, t = shape.in_features, shape.out_features, shape.r, shape.tokens
        density = shape.density
        cost.product(t, r, n, share=shape.sharing, density=density)
        cost.pass_over(4 * r * m * density)
        cost.product(t, m, r, density=density)
        if backward:
            cost.pass_over(4 * r * m * density)
            cost.product(t, r, m, density=density)
            cost.product(t, n, r, density=density)
        if training:
            add_vector_gradients(cost, shape)


def add_vector_gradients(cost: Cost, shape: LayerShape) -> None:
    """Add the cost of `vector_gradients_through_rank`, and of saving x A^T for it."""
    r, m, t = shape.r, shape.out_features, shape.tokens
    cost.product(r, m, t, density=shape.density)
    cost.saved_bytes += t * r * cost.profile.itemsize // shape.sharing
    cost.pass_over(4 * r * m * shape.density)
