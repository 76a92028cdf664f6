"""The route for few tokens: b and d scale the activations."""

from typing import ClassVar, Literal

from torch import Tensor

from veratune.ops.costs import Cost, LayerShape
from veratune.ops.factors import Factors
from veratune.ops.routes.base import Gradients, LinearInputs, MemoryName, Route, Wanted, vectors_dtype
from veratune.ops.routes.folded import vector_gradients_through_rank
from veratune.utils.tensors import cast


def up(xa: Tensor, factors: Factors) -> Tensor:
    """Return z = (scale * d * u) B^T, (T, out), from u = x A^T: the adapter's output without b."""
    return factors.B.matmul((xa * factors.scaled_d()).to(xa.dtype))


class Scaled(Route):
    """y = y0 + b * ((d * u) B^T) with u = x A^T. `keep` saves (d * u) B^T, (T, out)."""

    name: ClassVar[str] = "scaled"
    reads_weight: ClassVar[bool] = False
    gradients_from: ClassVar[Literal["x", "xa"]] = "xa"
    keeps: ClassVar[str | None] = "product"

    def uses_xa(self, training: bool) -> bool:
        return True

    def worth_keeping(self, shape: LayerShape, memory: MemoryName, *, training: bool, backward: bool) -> bool:
        activations_are_small = 8 * shape.tokens <= shape.in_features
        return training and (memory == "fast" or (memory == "balanced" and activations_are_small))

    def forward(self, inputs: LinearInputs, keep: bool) -> tuple[Tensor, Tensor | None]:
        factors, xa = inputs.factors, inputs.xa
        assert xa is not None
        start, writable = inputs.base_output()
        z = up(cast(xa, factors.B.dtype), factors)
        added = (z * factors.b).to(start.dtype)
        return start.add_(added) if writable else start + added, z if keep else None

    def backward(
        self, g: Tensor, inputs: LinearInputs, kept: Tensor | None, wanted: Wanted, weight_gradient: Tensor | None
    ) -> Gradients:
        factors, xa = inputs.factors, inputs.xa
        wide = vectors_dtype(g, factors)
        grad_x = grad_b = grad_d = None
        exact = xa is not None and xa.dtype != g.dtype
        through = factors.B.rmatmul((g * factors.b).to(g.dtype)) if wanted.x or (wanted.d and not exact) else None
        if exact:
            assert xa is not None
            grad_b, grad_d = vector_gradients_through_rank(g, xa, factors, wanted)
        elif wanted.b:
            assert xa is not None
            z = up(xa, factors) if kept is None else kept
            grad_b = (g.to(wide) * z).sum(0).to(factors.b.dtype)
        if wanted.d and not exact:
            assert xa is not None and through is not None
            grad_d = ((xa.to(wide) * through).sum(0) * factors.scale).to(factors.d.dtype)
        if wanted.x:
            assert through is not None
            grad_x = inputs.input_gradient(g, (through * (factors.d.to(wide) * factors.scale)).to(g.dtype))
        return Gradients(grad_x, grad_b, grad_d)

    def cost(self, cost: Cost, shape: LayerShape, *, training: bool, backward: bool, keep: bool) -> None:
        n, m, r, t = shape.in_features, shape.out_features, shape.r, shape.tokens
        size, density = cost.profile.itemsize, shape.density
        cost.product(t, r, n, share=shape.sharing, density=density)
        cost.product(t, m, r, density=density)
        cost.pass_over(2 * t * r, size)
        cost.pass_over(3 * t * m, size)
        if not backward:
            return
        cost.product(t, r, m, density=density)
        cost.product(t, n, r, density=density)
        cost.pass_over(2 * t * r, size)
        cost.pass_over(3 * t * m, size)
        if not training:
            return
        if keep:
            cost.saved_bytes += t * m * size
        else:
            cost.product(t, m, r, density=density)
        cost.pass_over(2 * t * r, size)
        cost.pass_over(4 * t * m, size)
        cost.saved_bytes += t * r * size // shape.sharing

    def add_exact_cost(self, cost: Cost, shape: LayerShape) -> None:
        super().add_exact_cost(cost, shape)
        r, m, t = shape.r, shape.out_features, shape.tokens
        cost.product(r, m, t, density=shape.density)  # u^T g, which this route computes only for exact gradients
        cost.pass_over(4 * r * m * shape.density)
