"""The data of one adapter on one layer: projections, settings, and initial vectors."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from veratune.layers.input_cache import InputCache
from veratune.ops.costs import LayerShape
from veratune.ops.factors import Factors
from veratune.ops.planning import RouteName, TableCache
from veratune.ops.routes import MemoryName
from veratune.projections.pool import ProjectionView

# The names of an adapter's vectors on one weight. Parameter names and keys in files consist of the prefix and a name.
VECTORS = ("b", "d")
VECTOR_PREFIX = "vera_lambda_"


@dataclass(frozen=True)
class VectorInit:
    """The initial vectors of a new adapter on one layer.

    Attributes:
        r: length of d.
        d_initial: value of d; b starts at zero.
        init_weights: if False, b is ones and d is drawn from a standard normal distribution, as in PEFT, for tests.
        dtype: dtype of both vectors.
    """

    r: int
    d_initial: float
    init_weights: bool
    dtype: torch.dtype

    def check(self, layer_name: str) -> None:
        """Raise ValueError if the dtype cannot represent `d_initial`."""
        limits = torch.finfo(self.dtype)
        if abs(self.d_initial) > limits.max or 0.0 < abs(self.d_initial) < limits.smallest_normal:
            raise ValueError(
                f"d_initial={self.d_initial!r} is out of range for {layer_name}, whose vectors are {self.dtype}: its"
                f" magnitude must be between {limits.smallest_normal:.3g} and {limits.max:.3g}"
            )


@dataclass(frozen=True)
class InputGroup:
    """The data shared by an adapter's layers that may read the same input (query, key and value).

    Attributes:
        a: the view of A.
        cache: the cache of the last product with A.
        size: the number of layers.
    """

    a: ProjectionView
    cache: InputCache
    size: int


@dataclass(frozen=True)
class ComputeSettings:
    """The settings that determine how an adapter is computed.

    Attributes:
        vera_dropout: probability of dropout on the adapter's input.
        route: which routes are allowed.
        memory: what may be saved for the backward pass.
    """

    vera_dropout: float
    route: RouteName
    memory: MemoryName


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter on one layer, except for its vectors.

    Attributes:
        name: the layer's name, which identifies it within its group.
        group: the data shared by layers that may read the same input.
        b: the view of B for each part of the outputs; one if the layer is not fused.
        scale: the constant factor of B.
        settings: how the adapter is computed.
        shapes: the dimensions and the rank of each part, with zero tokens.
        parts: the number of outputs of each part; empty if the layer is not fused.
        tables: the cache of route tables.
    """

    name: str
    group: InputGroup
    b: tuple[ProjectionView, ...]
    scale: float
    settings: ComputeSettings
    shapes: tuple[LayerShape, ...]
    parts: tuple[int, ...]
    tables: TableCache = field(default_factory=TableCache, repr=False, compare=False)

    @property
    def a(self) -> ProjectionView:
        return self.group.a

    @property
    def r(self) -> int:
        return self.a.rank

    @property
    def views(self) -> tuple[ProjectionView, ...]:
        return (self.a, *self.b)


class Part(NamedTuple):
    """Consecutive outputs of a layer and an adapter's factors for them."""

    outputs: slice
    factors: Factors
