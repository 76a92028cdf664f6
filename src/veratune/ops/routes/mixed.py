"""The route for training with many tokens and a small rank: a dense output, vector gradients through the rank."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from veratune.ops.costs import Cost, LayerShape
from veratune.ops.routes.base import Gradients, LinearInputs, Wanted
from veratune.ops.routes.dense import adapted_weight, add_adapted_weight
from veratune.ops.routes.folded import add_vector_gradients, vector_gradients_through_rank


class Mixed:
    """y = x (W0 + C^T A)^T. The gradients of b and d come from u^T g, u = x A^T. `keep` keeps the adapted weight."""

    name: ClassVar[str] = "mixed"
    reads_weight: ClassVar[bool] = True
    gradients_from: ClassVar[Literal["x", "xa"]] = "xa"

    def available(self, device_type: str) -> bool:
        return True

    def uses_xa(self, training: bool) -> bool:
        return training

    def forward(self, inputs: LinearInputs, keep: bool) -> tuple[Tensor, Tensor | None]:
        assert inputs.x is not None
        adapted = adapted_weight(inputs)
        return F.linear(inputs.x, adapted, inputs.bias), adapted if keep else None

    def backward(
        self, g: Tensor, inputs: LinearInputs, kept: Tensor | None, wanted: Wanted, weight_gradient: Tensor | None
    ) -> Gradients:
        grad_x = grad_b = grad_d = None
        if wanted.vectors:
            assert inputs.xa is not None
            grad_b, grad_d = vector_gradients_through_rank(g, inputs.xa, inputs.factors, wanted)
        if wanted.x:
            grad_x = g @ (adapted_weight(inputs) if kept is None else kept)
        return Gradients(grad_x, grad_b, grad_d)

    def cost(self, cost: Cost, shape: LayerShape, *, training: bool, backward: bool, keep: bool) -> None:
        add_adapted_weight(cost, shape, times=2 if backward and not keep else 1, kept=keep)
        if training:
            n, r, t = shape.in_features, shape.rank, shape.tokens
            cost.product(t, r, n, share=shape.sharing, density=shape.density)
            add_vector_gradients(cost, shape)
