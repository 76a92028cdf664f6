"""Linear layers that serve many adapters at once, with different vectors for each sequence in a batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veratune.bank.layer_call import AdapterGroup, BankCall, active_call, by_sequence, current_call
from veratune.layers.base import VeraLayer
from veratune.layers.entries import InputGroup
from veratune.layers.geometry import Geometry, slices
from veratune.layers.linear import VeraConv1D, VeraLinear
from veratune.ops.calibration import device_profile
from veratune.ops.costs import LayerShape
from veratune.ops.delta import add_delta
from veratune.ops.factors import Factors
from veratune.ops.linear import project
from veratune.ops.planning import RouteName, dense_pays
from veratune.ops.rows import row_deltas, row_residual
from veratune.projections.pool import ProjectionView
from veratune.projections.structure import Matrix
from veratune.utils.tensors import gradients_wanted
from veratune.utils.torch_private import transformations_active


@dataclass(frozen=True)
class Columns:
    """The columns of the slab that hold the vectors of one part of a layer (an unfused layer has one part).

    Attributes:
        d: the first column of d.
        b: the first column of b.
        outputs: the part's outputs.
    """

    d: int
    b: int
    outputs: slice


@dataclass(frozen=True)
class LayerProjections:
    """A layer's views of one scheme's projections: A, shared by layers with the same input, and B for each part."""

    group: InputGroup
    b: tuple[ProjectionView, ...]


class BankedLinear(VeraLinear):
    """A linear layer, plain or quantized, with a different adapter for each sequence.

    Attributes:
        owner: identifies this bank's calls.
        name: the layer's name in the model.
        route: the allowed routes.
        columns: the columns of the slab that hold its vectors, for each part.
        projections: scheme numbers, mapped to this layer's views; the bank adds one when an adapter uses a new scheme.
            Schemes that are too narrow for this layer are missing, as their adapters cannot adapt it.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        geometry: Geometry,
        owner: object,
        name: str,
        columns: Sequence[Columns],
        route: RouteName,
    ) -> None:
        super().__init__(base_layer, geometry)
        self.owner = owner
        self.name = name
        self.route = route
        self.columns = tuple(columns)
        self.projections: dict[int, LayerProjections] = {}

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = current_call(self.owner)
        if not input.numel():
            return self._checked_base_output(input, *args, **kwargs)
        if call.by_scheme and not torch.compiler.is_compiling() and not args and not kwargs and self._reads_base(input):
            if dense := self._dense_groups(input, call):
                return self._forward_dense(input, call, dense)
            products = [
                (self._project(input, call, input.dtype, shared), shared, rows)
                for shared, rows in self._schemes_of(call)
            ]
            return self._by_rank(by_sequence(input, call, self.name), call.slab, products).view(
                *input.shape[:-1], self.out_features
            )
        output = self._checked_base_output(input, *args, **kwargs)
        for shared, rows in self._schemes_of(call):
            output = self._add(output, self._project(input, call, output.dtype, shared), call.slab, shared, rows)
        return output

    def _schemes_of(self, call: BankCall) -> Iterator[tuple[LayerProjections, Tensor]]:
        """Yield the projections of each scheme in a call that covers this layer, and each sequence's row."""
        for scheme, rows in call.by_scheme:
            shared = self.projections.get(scheme)
            if shared is not None:
                yield shared, rows

    def _reads_base(self, x: Tensor) -> bool:
        """Return whether computing with the base layer's weight directly is equivalent to calling the base layer."""
        if torch.is_autocast_enabled(x.device.type) or transformations_active():
            return False
        return x.dtype == self.base_weight.dtype and self._is_plain()

    def _by_rank(self, x: Tensor, slab: Tensor, products: Sequence[tuple[Tensor, LayerProjections, Tensor]]) -> Tensor:
        """Return the outputs for sequences (sequences, n, in), with adapters, computed through the low-rank factors.

        Args:
            x: the sequences.
            slab: the vectors.
            products: for each scheme, x A^T (sequences, n, r), the projections, and each sequence's row.
        """
        weight, bias = self._outputs_first(self.base_weight), self.bias
        # In 16-bit dtypes, the sum of the deltas would be rounded before the larger product is added.
        if not products or x.dtype.itemsize < 4 or gradients_wanted(x):
            output = F.linear(x, weight, bias)
            for xa, shared, rows in products:
                output = self._add(output, xa, slab, shared, rows)
            return output
        output = self._deltas(slab, *products[0])
        for product in products[1:]:
            output.add_(self._deltas(slab, *product))
        if bias is not None:
            output.add_(bias)
        # The base layer's product is added last, in place: allocating another output is expensive.
        return output.flatten(0, 1).addmm_(x.flatten(0, 1), weight.t()).view(output.shape)

    def _deltas(self, slab: Tensor, xa: Tensor, shared: LayerProjections, rows: Tensor) -> Tensor:
        """Return the deltas of one scheme's adapters, (sequences, n, out); arguments as for `_add`."""
        parts = [row_deltas(xa, *vectors) for vectors in self._vectors_of(xa, slab, shared, rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _vectors_of(
        self, xa: Tensor, slab: Tensor, shared: LayerProjections, rows: Tensor
    ) -> Iterator[tuple[Matrix, Tensor, Tensor]]:
        """For each part of the layer, yield B (rank-major) and each sequence's b and d."""
        r = shared.group.a.rank
        for columns, view in zip(self.columns, shared.b, strict=True):
            b = slab[:, columns.b : columns.b + view.features].index_select(0, rows)
            d = slab[:, columns.d : columns.d + r].index_select(0, rows)
            yield view.matrix(xa.device, xa.dtype), b, view.structure.arrange(d)

    def _project(self, x: Tensor, call: BankCall, dtype: torch.dtype, shared: LayerProjections) -> Tensor:
        """Return x A^T, (sequences, n, r), from the cache if another layer has computed it for the same input."""
        grouped = by_sequence(x, call, self.name)
        flat = grouped.flatten(0, 1).to(dtype)
        A = shared.group.a.matrix(flat.device, dtype)  # noqa: N806
        if torch.is_grad_enabled() and flat.requires_grad:
            xa = A.rmatmul(flat)
        else:
            xa = shared.group.cache.get(self.name, x, A.values, lambda: project(flat, A))
        return xa.view(*grouped.shape[:2], -1)

    def _add(self, start: Tensor, xa: Tensor, slab: Tensor, shared: LayerProjections, rows: Tensor) -> Tensor:
        """Add the deltas of one scheme's adapters to the output for their sequences.

        Args:
            start: (..., out), the output so far.
            xa: x A^T, (sequences, n, r).
            slab: the vectors.
            shared: the projections.
            rows: int64 (sequences,), each sequence's row in the slab; 0 without an adapter of this scheme.
        """
        if xa.dtype == torch.float16:  # infinity times zero is NaN
            xa = xa.masked_fill((rows == 0)[:, None, None], 0.0)
        grouped = start.reshape(*xa.shape[:2], self.out_features)
        parts = []
        for columns, vectors in zip(self.columns, self._vectors_of(xa, slab, shared, rows), strict=True):
            part = grouped if len(self.columns) == 1 else grouped[..., columns.outputs]
            parts.append(row_residual(part, xa, *vectors))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).view(start.shape)

    # With few adapters in a batch, compute W0 + delta W once for each of them and multiply by it.

    def _dense_groups(self, x: Tensor, call: BankCall) -> list[AdapterGroup]:
        """Return the groups for which computing W0 + delta W is cheaper than using the low-rank factors."""
        tokens = math.prod(x.shape[:-1])
        few = self.route == "factored" or (self.route == "auto" and tokens * call.largest < 32 * call.sequences)
        if few:
            return []
        per_sequence = by_sequence(x, call, self.name).shape[1]
        profile = device_profile(x.device, x.dtype)

        def pays(shared: LayerProjections, sequences: int, moved: bool) -> bool:
            a, group = shared.group.a, shared.group
            shape = LayerShape(
                self.in_features, self.out_features, a.rank, per_sequence * sequences, group.size, a.structure.density
            )
            return self.route == "dense" or dense_pays(shape, profile, moved=moved)

        # With many adapters, checking each of them would take a large part of the layer's time.
        if not any(pays(shared, call.largest, False) for shared, _ in self._schemes_of(call)):
            return []
        return [
            group
            for group in call.groups
            if (shared := self.projections.get(group.scheme)) is not None
            and pays(shared, group.sequences.shape[0], group.span is None)
        ]

    def _forward_dense(self, x: Tensor, call: BankCall, dense: list[AdapterGroup]) -> Tensor:
        """Return the output, computed with W0 + delta W for these groups and the low-rank factors for the rest."""
        grouped = by_sequence(x, call, self.name)
        count, n, _ = grouped.shape
        if len(dense) == 1 and dense[0].sequences.numel() == count:
            return F.linear(x, self._dense_weight(call.slab, dense[0]), self.bias)
        output = x.new_empty(count, n, self.out_features)
        rest = torch.ones(count, dtype=torch.bool, device=x.device)
        for group in dense:
            self._multiply(group, grouped, self._dense_weight(call.slab, group), output)
            rest[group.sequences] = False
        others = rest.nonzero().flatten()
        if others.numel():
            some = grouped.index_select(0, others)
            products = [
                (shared.group.a.matrix(some.device, some.dtype).rmatmul(some), shared, rows[others])
                for shared, rows in self._schemes_of(call)
            ]
            output.index_copy_(0, others, self._by_rank(some, call.slab, products))
        return output.view(*x.shape[:-1], self.out_features)

    def _multiply(self, group: AdapterGroup, grouped: Tensor, weight: Tensor, output: Tensor) -> None:
        """Compute the outputs of a group's sequences with the group's weight, and write them to `output`."""
        x = group.of(grouped)
        if group.span is None or gradients_wanted(x, weight, self.bias):
            output.index_copy_(0, group.sequences, F.linear(x, weight, self.bias))
            return
        view = output[group.span].flatten(0, 1)
        if self.bias is None:
            torch.mm(x.flatten(0, 1), weight.t(), out=view)
        else:
            torch.addmm(self.bias, x.flatten(0, 1), weight.t(), out=view)

    def _dense_weight(self, slab: Tensor, group: AdapterGroup) -> Tensor:
        """Return W0 + delta W for a group's adapter."""
        shared = self.projections[group.scheme]
        weight = self._outputs_first(self.base_weight)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A = shared.group.a.matrix(weight.device, dtype)  # noqa: N806
        row = slab[group.row].to(dtype)
        parts = []
        for columns, view in zip(self.columns, shared.b, strict=True):
            b = row[columns.b : columns.b + view.features]
            d = view.structure.arrange(row[columns.d : columns.d + shared.group.a.rank])
            factors = Factors(A, view.matrix(weight.device, dtype), b, d, 1.0)
            parts.append(add_delta(weight[columns.outputs], factors))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # Models that read the weight instead of calling the layer cannot use a different weight for each sequence.

    def weight_over(self, base: Tensor, *, outside: bool = False) -> Tensor:
        call = active_call()
        if call is None or call.plain:
            return base
        self.added_adapters = ["a bank's"]
        try:
            return super().weight_over(base)
        finally:
            self.added_adapters = []

    def adapted_part(self, base: Tensor, index: Any) -> Tensor:
        raise RuntimeError(
            f"the model reads the weight of {self.name} instead of calling the layer, so sequences cannot use"
            " different adapters on it: exclude the layer from the bank (exclude_modules)"
        )

    def product(self, x: Tensor, base: Tensor, index: Any, bias: Tensor | None = None) -> Any:
        return self.adapted_part(base, index)


class BankedConv1D(BankedLinear):
    """`BankedLinear` for transformers' `Conv1D`."""

    out_axis = VeraConv1D.out_axis
    plain_forwards = VeraConv1D.plain_forwards

    # Conv1D names its argument x.
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, *args, **kwargs)


# The layer kinds that a bank supports; it rejects all others.
BANKED_LAYERS: dict[type[VeraLayer], type[BankedLinear]] = {VeraLinear: BankedLinear, VeraConv1D: BankedConv1D}


def part_slices(parts: tuple[int, ...], out_features: int) -> list[slice]:
    """Return the slice of outputs of each part; an unfused layer has one part."""
    return slices(parts or (out_features,))
