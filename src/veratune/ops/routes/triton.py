"""The route that uses a Triton kernel on GPUs: both low-rank products in one pass over x and the output."""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from veratune.ops.costs import Cost, DeviceProfile, LayerShape
from veratune.ops.routes.base import Gradients, LinearInputs, MemoryName, Wanted
from veratune.ops.routes.folded import Folded, add_vector_gradients, vector_gradients_through_rank

# A tile of x A^T, (rows, r), must fit in the registers of one program.
LARGEST_RANK = 256


class Triton(Folded):
    """y = y0 + b * ((d * u) B^T) with u = x A^T, in one kernel that reads x and y0 once.

    In training, it saves u, (T, r). For dense projections only, on devices on which `calibrate` measured the kernel.
    """

    name: ClassVar[str] = "triton"
    keeps: ClassVar[str | None] = "xa"
    keeps_xa: ClassVar[bool] = True

    def available(self, profile: DeviceProfile, shape: LayerShape) -> bool:
        return profile.triton_flops > 0 and shape.r <= LARGEST_RANK and shape.density == 1.0

    def uses_xa(self, training: bool) -> bool:
        return False

    def worth_keeping(self, shape: LayerShape, memory: MemoryName, *, training: bool, backward: bool) -> bool:
        return training

    def forward(self, inputs: LinearInputs, keep: bool) -> tuple[Tensor, Tensor | None]:
        from veratune.ops.triton_kernel import add_product_

        factors, x = inputs.factors, inputs.x
        assert x is not None
        start, writable = inputs.base_output()
        output = start if writable else start.clone()
        saves = keep or factors.b.requires_grad or factors.d.requires_grad
        u = x.new_empty(x.shape[0], factors.d.shape[0]) if saves else None
        add_product_(
            output,
            x,
            factors.A.values,
            factors.B.values,
            factors.scaled_d(),
            output_scale=factors.b,
            saved=u,
        )
        return output, u

    def backward(
        self, g: Tensor, inputs: LinearInputs, kept: Tensor | None, wanted: Wanted, weight_gradient: Tensor | None
    ) -> Gradients:
        from veratune.ops.triton_kernel import add_product_

        factors = inputs.factors
        grad_x = grad_b = grad_d = None
        if wanted.vectors:
            assert kept is not None
            grad_b, grad_d = vector_gradients_through_rank(g, kept, factors, wanted)
        if wanted.x:
            A, B = factors.A.values, factors.B.values  # noqa: N806
            grad_x = g.new_zeros(g.shape[0], A.shape[1]) if inputs.weight is None else g @ inputs.outputs_first()
            add_product_(grad_x, g, B, A, factors.scaled_d(), input_scale=factors.b)
        return Gradients(grad_x, grad_b, grad_d)

    def cost(self, cost: Cost, shape: LayerShape, *, training: bool, backward: bool, keep: bool) -> None:
        flops = 2 * shape.tokens * shape.r * (shape.in_features + shape.out_features)
        cost.triton_kernel(flops)
        if backward:
            cost.triton_kernel(flops)
        if training:
            add_vector_gradients(cost, replace(shape, sharing=1))  # each layer computes and saves x A^T itself
