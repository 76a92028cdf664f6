"""The route for training with many tokens and a small rank: a dense output, but vector gradients from x A^T."""

from typing import ClassVar, Literal

from torch import Tensor

from veratune.ops.costs import Cost, LayerShape
from veratune.ops.routes.base import LinearInputs, Wanted
from veratune.ops.routes.dense import Dense, add_adapted_weight
from veratune.ops.routes.folded import add_vector_gradients, vector_gradients_through_rank


class Mixed(Dense):
    """y = x (W0 + C^T A)^T. The gradients of b and d come from u^T g, u = x A^T. `keep` saves the adapted weight."""

    name: ClassVar[str] = "mixed"
    gradients_from: ClassVar[Literal["x", "xa"]] = "xa"
    training_only: ClassVar[bool] = True

    def uses_xa(self, training: bool) -> bool:
        return training

    def _vector_gradients(
        self, g: Tensor, inputs: LinearInputs, wanted: Wanted, weight_gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        assert inputs.xa is not None
        return vector_gradients_through_rank(g, inputs.xa, inputs.factors, wanted)

    def cost(self, cost: Cost, shape: LayerShape, *, training: bool, backward: bool, keep: bool) -> None:
        add_adapted_weight(cost, shape, times=2 if backward and not keep else 1, kept=keep)
        if training:
            n, r, t = shape.in_features, shape.r, shape.tokens
            cost.product(t, r, n, share=shape.sharing, density=shape.density)
            add_vector_gradients(cost, shape)
