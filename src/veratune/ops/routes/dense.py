"""The route for many tokens: compute W0 + delta W, then the layer in one product."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from veratune.ops.costs import Cost, LayerShape
from veratune.ops.delta import plus_delta, weighted_by_gradient
from veratune.ops.routes.base import Gradients, LinearInputs, MemoryName, Route, Wanted, vectors_dtype

# For an adapted weight with at most this many elements, launching the operations takes longer than computing, and
# keeping the result takes little memory.
_FEW = 1 << 14


def adapted_weight(inputs: LinearInputs) -> Tensor:
    """Return W0 + delta W, (out, in)."""
    assert inputs.weight is not None
    factors = inputs.factors
    return plus_delta(inputs.weight, factors.folded(), factors.A, transposed=inputs.transposed)


class Dense(Route):
    """y = x (W0 + C^T A)^T. The gradients of b and d come from g^T x, the weight's. `keep` saves the adapted weight."""

    name: ClassVar[str] = "dense"
    reads_weight: ClassVar[bool] = True
    gradients_from: ClassVar[Literal["x", "xa"]] = "x"
    keeps: ClassVar[str | None] = "weight"

    def uses_xa(self, training: bool) -> bool:
        return False

    def worth_keeping(self, shape: LayerShape, memory: MemoryName, *, training: bool, backward: bool) -> bool:
        elements = shape.in_features * shape.out_features
        is_small = elements <= _FEW or 8 * elements <= shape.tokens * (shape.in_features + shape.out_features)
        return backward and (memory == "fast" or (memory == "balanced" and is_small))

    def forward(self, inputs: LinearInputs, keep: bool) -> tuple[Tensor, Tensor | None]:
        assert inputs.x is not None
        adapted = adapted_weight(inputs)
        return F.linear(inputs.x, adapted, inputs.bias), adapted if keep else None

    def backward(
        self, g: Tensor, inputs: LinearInputs, kept: Tensor | None, wanted: Wanted, weight_gradient: Tensor | None
    ) -> Gradients:
        grad_b, grad_d = self._vector_gradients(g, inputs, wanted, weight_gradient) if wanted.vectors else (None, None)
        grad_x = None
        if wanted.x:
            grad_x = g @ (adapted_weight(inputs) if kept is None else kept)
        return Gradients(grad_x, grad_b, grad_d)

    def _vector_gradients(
        self, g: Tensor, inputs: LinearInputs, wanted: Wanted, weight_gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (db, dd), from the gradient of the weight."""
        assert weight_gradient is not None
        factors = inputs.factors
        products = weighted_by_gradient(factors, weight_gradient, vectors_dtype(g, factors))
        return factors.vector_gradients(products, wanted.b, wanted.d)

    def cost(self, cost: Cost, shape: LayerShape, *, training: bool, backward: bool, keep: bool) -> None:
        n, m, r, t = shape.in_features, shape.out_features, shape.r, shape.tokens
        add_adapted_weight(cost, shape, times=2 if backward and not keep else 1, kept=keep)
        if training:
            cost.product(m, n, t)
            cost.product(r, m, n, density=shape.density**2)
            cost.saved_bytes += t * n * cost.profile.itemsize
            cost.pass_over(4 * r * m * shape.density)


def add_adapted_weight(cost: Cost, shape: LayerShape, *, times: int, kept: bool) -> None:
    """Add the cost of computing the adapted weight `times` times, and of saving it if `kept`."""
    n, m, r = shape.in_features, shape.out_features, shape.r
    for _ in range(times):
        cost.pass_over(4 * r * m * shape.density)  # the outer product d b^T, multiplied by B and rounded
        cost.product(m, n, r, density=shape.density**2)
    if kept:
        cost.saved_bytes += m * n * cost.profile.itemsize
