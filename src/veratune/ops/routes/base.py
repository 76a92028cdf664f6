"""The interface of a route: one exact way to compute an adapted layer and its gradients."""

from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from veratune.ops import exact
from veratune.ops.costs import Cost, DeviceProfile, LayerShape
from veratune.ops.factors import Factors
from veratune.utils.tensors import wide_dtype

MemoryName = Literal["balanced", "low", "fast"]


class LinearInputs(NamedTuple):
    """The inputs from which a route computes y = start + x delta W^T.

    Attributes:
        x: (T, in), in the compute dtype; None in a backward pass that does not need it.
        start: (T, out), the output of a base layer that was already called; None if `weight` is given.
        weight: W0, (out, in), or (in, out) if `transposed`; None if it cannot be read.
        bias: (out,), or None.
        factors: the adapter.
        xa: x A^T, (T, r), if the route uses it.
        transposed: whether the weight is stored as (in, out).
    """

    x: Tensor | None
    start: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    factors: Factors
    xa: Tensor | None
    transposed: bool

    def base_output(self) -> tuple[Tensor, bool]:
        """Return the base layer's output (T, out), and whether it may be overwritten because it was computed here."""
        if self.weight is None:
            assert self.start is not None
            return self.start, False
        assert self.x is not None
        return F.linear(self.x, self.outputs_first(), self.bias), True

    def outputs_first(self) -> Tensor:
        """Return W0 as (out, in)."""
        assert self.weight is not None
        return self.weight.t() if self.transposed else self.weight

    def input_gradient(self, g: Tensor, through_rank: Tensor) -> Tensor:
        """Return g W0 + V A, (T, in), without the first term if the base layer's weight is not available.

        Args:
            g: the output's gradient, (T, out).
            through_rank: V, (T, r).
        """
        A = self.factors.A  # noqa: N806
        if self.weight is None:
            return A.matmul(through_rank)
        return A.structure.plus_matmul(g @ self.outputs_first(), A.values, through_rank, in_place=True)


class Wanted(NamedTuple):
    """Which gradients to compute."""

    x: bool
    b: bool
    d: bool

    @property
    def vectors(self) -> bool:
        return self.b or self.d


class Gradients(NamedTuple):
    """The gradients of x (T, in), b (out,) and d (r,); None if not required."""

    x: Tensor | None = None
    b: Tensor | None = None
    d: Tensor | None = None


class Route(Protocol):
    """One exact way to compute an adapted layer, forward and backward.

    Attributes:
        name: its name in tables and its key in `ROUTES`.
        reads_weight: whether it computes with W0 itself, rather than adding to the base layer's output.
        gradients_from: the tensor saved for the gradients of b and d: x, or x A^T.
        training_only: whether the route pays off only if the vectors' gradients are required.
        keeps: a name, for tables, of the intermediate result that `forward` can save; or None.
        keeps_xa: whether that result is x A^T, so that the gradients need neither the input nor another product, and
            are never exact (`ops.exact`).
    """

    name: ClassVar[str]
    reads_weight: ClassVar[bool]
    gradients_from: ClassVar[Literal["x", "xa"]]
    training_only: ClassVar[bool] = False
    keeps: ClassVar[str | None] = None
    keeps_xa: ClassVar[bool] = False

    def available(self, profile: DeviceProfile, shape: LayerShape) -> bool:
        """Return whether the route can compute a layer of this shape on a device."""
        return True

    def uses_xa(self, training: bool) -> bool:
        """Return whether the route computes with x A^T."""
        ...

    def worth_keeping(self, shape: LayerShape, memory: MemoryName, *, training: bool, backward: bool) -> bool:
        """Return whether `forward` keeps its intermediate result for the backward pass.

        Args:
            shape: the call's dimensions.
            memory: as in `VeraConfig`.
            training: whether the vectors' gradients are required.
            backward: whether any gradient is required.
        """
        return False

    def forward(self, inputs: LinearInputs, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Return the output (T, out), and the tensor to save for the backward pass if `keep`, otherwise None."""
        ...

    def backward(
        self, g: Tensor, inputs: LinearInputs, kept: Tensor | None, wanted: Wanted, weight_gradient: Tensor | None
    ) -> Gradients:
        """Return the gradients of x, b and d.

        Args:
            g: the output's gradient, (T, out).
            inputs: the inputs of the forward pass; x is None unless `gradients_from` is "x".
            kept: the second result of the forward pass.
            wanted: which gradients to compute.
            weight_gradient: g^T x, (out, in), if `gradients_from` is "x" and vector gradients are required.
        """
        ...

    def cost(self, cost: Cost, shape: LayerShape, *, training: bool, backward: bool, keep: bool) -> None:
        """Add the route's cost on top of the frozen layer.

        Args:
            cost: the running sum to add to.
            shape: the call's dimensions.
            training: whether the vectors' gradients are required.
            backward: whether any gradient is required.
            keep: whether the forward pass saves the result that the backward pass would otherwise recompute.
        """
        ...

    def add_exact_cost(self, cost: Cost, shape: LayerShape) -> None:
        """Add the extra cost of exact gradients (`ops.exact`) over those in the compute dtype."""
        exact.add_cost(cost, shape, self.gradients_from, output_uses_xa=self.uses_xa(training=False))


def vectors_dtype(g: Tensor, factors: Factors) -> torch.dtype:
    """Return the dtype in which to sum the vectors' gradients."""
    return wide_dtype(g.dtype, factors.b.dtype)
