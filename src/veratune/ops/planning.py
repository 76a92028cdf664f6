"""Dimension-aware routing: choose the cheapest exact route for a layer's shape.

The choice minimizes an estimate in seconds: operations / rate + bytes / bandwidth for each product, and bytes /
bandwidth for elementwise operations, with the constants of a `DeviceProfile`. Each route in `ops.routes` implements
`cost`.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch

from veratune.ops import exact
from veratune.ops.calibration import device_profile
from veratune.ops.costs import Cost, DeviceProfile, LayerShape
from veratune.ops.routes import ROUTES, MemoryName
from veratune.utils.torch_private import constant_while_compiling

RouteName = Literal["auto", "factored", "dense"]
ROUTE_NAMES: tuple[RouteName, ...] = ("auto", "factored", "dense")
MEMORY_NAMES: tuple[MemoryName, ...] = ("balanced", "low", "fast")


class RouteChoice(NamedTuple):
    """The route for one call of one layer.

    Attributes:
        route: its name in `ROUTES`.
        keep: save an intermediate result for the backward pass instead of recomputing it (`Route.keeps`).
        exact: compute the gradients of float32 vectors without rounding to the compute dtype (`ops.exact`).
        input_again: recompute the input for the vectors' gradients instead of saving it, if autograd saves the tensors
            that it was computed from (`ops.graph_inputs`).
    """

    route: str
    keep: bool = False
    exact: bool = False
    input_again: bool = False

    @property
    def reads_weight(self) -> bool:
        """Whether the route computes with W0 itself."""
        return ROUTES[self.route].reads_weight

    def __str__(self) -> str:
        kept = f", {ROUTES[self.route].keeps} kept" if self.keep else ""
        return f"{self.route}{kept}{', exact gradients' if self.exact else ''}"


RouteTable = tuple[tuple[int, RouteChoice], ...]
"""The choices by number of tokens, as (largest number of tokens, choice) in ascending order."""


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of one choice, on top of the frozen layer.

    Attributes:
        choice: the choice.
        flops: floating-point operations of its matrix products.
        saved_bytes: bytes saved for the backward pass, in addition to the parameters.
        seconds: the estimated time.
    """

    choice: RouteChoice
    flops: int
    saved_bytes: int
    seconds: float


def estimate(
    choice: RouteChoice, shape: LayerShape, profile: DeviceProfile, *, training: bool, backward: bool | None = None
) -> Estimate:
    """Estimate the cost that a choice adds to the frozen layer's: forward and, if `backward`, backward to the input.

    Args:
        choice: the route.
        shape: the call's dimensions.
        profile: the device's profile.
        training: whether the vectors' gradients are required.
        backward: whether any gradient is required, such as the input's through a frozen adapter; defaults to
            `training`.
    """
    cost = Cost(profile)
    backward = training if backward is None else backward
    route = ROUTES[choice.route]
    route.cost(cost, shape, training=training, backward=backward, keep=choice.keep)
    if choice.exact:
        route.add_exact_cost(cost, shape)
    return Estimate(choice, cost.flops, cost.saved_bytes, cost.seconds)


def possible_choices(
    route: RouteName,
    memory: MemoryName,
    shape: LayerShape,
    *,
    training: bool,
    weight_readable: bool,
    backward: bool | None = None,
    profile: DeviceProfile | None = None,
) -> list[RouteChoice]:
    """Return the choices that a configuration allows for a call.

    Args:
        route: which routes are allowed: "factored" excludes those that read the weight, "dense" all but "dense".
        memory: "low" saves only the smaller of x and x A^T for the gradients, and neither if autograd saves the tensors
            that x was computed from; "fast" saves everything that avoids recomputation; "balanced" saves what is small
            (`Route.worth_keeping`).
        shape: the call's dimensions.
        training: whether the vectors' gradients will be required.
        weight_readable: whether W0 can be read, as the routes with a dense output require.
        backward: as for `estimate`.
        profile: the device's profile; defaults to the CPU's in float32.
    """
    backward = training if backward is None else backward
    profile = profile or device_profile(torch.device("cpu"), torch.float32)
    possible = [each for each in ROUTES.values() if each.available(profile, shape)]
    possible = [each for each in possible if training or not each.training_only]
    if not weight_readable:
        possible = [each for each in possible if not each.reads_weight]
        if route == "dense":
            possible = [ROUTES["folded"]]
    elif route == "factored":
        possible = [each for each in possible if not each.reads_weight]
    elif route == "dense":
        possible = [ROUTES["dense"]]
    if training and memory == "low" and route == "auto":
        smaller = "x" if shape.in_features < shape.r else "xa"
        possible = [each for each in possible if each.gradients_from == smaller] or possible
    input_again = training and memory == "low"
    return [
        RouteChoice(
            each.name,
            each.worth_keeping(shape, memory, training=training, backward=backward),
            input_again=input_again and not each.keeps_xa,
        )
        for each in possible
    ]


# Exact gradients may lengthen a layer's step (frozen layer and adapter, forward and backward) by this fraction.
EXACT_SHARE = 0.03


def exactly(choice: RouteChoice, memory: MemoryName) -> RouteChoice | None:
    """Return the choice with exact gradients; None if the route has none or `memory` rules out saving their tensors."""
    route = ROUTES[choice.route]
    if route.keeps_xa or (memory == "low" and route.gradients_from == "xa"):
        return None
    # With exact gradients, which come from u^T g, the `scaled` route need not keep its product with B.
    return choice._replace(keep=choice.keep and choice.reads_weight, exact=True)


def choose_route(
    route: RouteName,
    memory: MemoryName,
    shape: LayerShape,
    profile: DeviceProfile,
    *,
    training: bool,
    weight_readable: bool = True,
    backward: bool | None = None,
    wide_vectors: bool = False,
) -> RouteChoice:
    """Return the allowed choice with the smallest estimate.

    Prefer exact gradients if they add at most `EXACT_SHARE` to the step.

    Args:
        route, memory, shape, profile, training, weight_readable, backward: as for `possible_choices`.
        wide_vectors: whether the vectors have a wider dtype than the products.
    """
    choices = possible_choices(
        route,
        memory,
        shape,
        training=training,
        weight_readable=weight_readable,
        backward=backward,
        profile=profile,
    )

    def seconds(choice: RouteChoice) -> float:
        return estimate(choice, shape, profile, training=training, backward=backward).seconds

    best = min(choices, key=seconds)
    if not (training and wide_vectors):
        return best
    exact_choices = [found for choice in choices if (found := exactly(choice, memory)) is not None]
    exact_best = min(exact_choices, key=seconds, default=best)
    frozen = Cost(profile)
    for _ in range(2):  # forward, and backward to the input
        frozen.product(shape.tokens, shape.out_features, shape.in_features)
    limit = seconds(best) + EXACT_SHARE * (frozen.seconds + seconds(best))
    return exact_best if seconds(exact_best) <= limit else best


@lru_cache(maxsize=4096)
def exact_rows_pay(shape: LayerShape, profile: DeviceProfile) -> bool:
    """Return whether exact gradients in `ops.rows.stack_residual` add at most `EXACT_SHARE` to a step."""
    profile = replace(profile, returns_sums=False)  # stack_residual casts on every device
    frozen, added = Cost(profile), Cost(profile)
    for _ in range(2):
        frozen.product(shape.tokens, shape.out_features, shape.in_features)
    exact.add_cost_of_rows(added, shape)
    return added.seconds <= EXACT_SHARE * frozen.seconds


# Measured ratio of the time to compute W0 + delta W in a complete model to the time in isolation: in a model, neither
# its operands nor its result are in cache, unlike those of products with a batch's tokens.
_IN_A_MODEL = 2.5


@lru_cache(maxsize=4096)
def dense_pays(shape: LayerShape, profile: DeviceProfile, *, moved: bool) -> bool:
    """Return whether W0 + delta W is cheaper than the low-rank factors for the rows of one adapter. For inference.

    Args:
        shape: the layer's dimensions, and the number of tokens in those rows.
        profile: the device's profile.
        moved: whether the rows are not consecutive in the batch, so that they must be gathered and scattered.
    """
    moving = Cost(profile)
    if moved:
        moving.pass_over(2 * shape.tokens * shape.in_features, profile.itemsize)
        moving.pass_over(2 * shape.tokens * shape.out_features, profile.itemsize)
    dense, factored = (
        estimate(RouteChoice(name), shape, profile, training=False).seconds for name in ("dense", "scaled")
    )
    return _IN_A_MODEL * dense + moving.seconds < factored


# The choice is the same for all larger numbers of tokens.
_MANY = 1 << 24


@lru_cache(maxsize=4096)
def route_table(
    route: RouteName,
    memory: MemoryName,
    shape: LayerShape,
    profile: DeviceProfile,
    training: bool,
    weight_readable: bool,
    backward: bool | None = None,
    wide_vectors: bool = False,
) -> RouteTable:
    """Return the choices by number of tokens.

    A lookup is faster than an estimate, and torch.compile with a symbolic number of tokens traces only a few
    comparisons with constants.

    Args:
        shape: the layer's dimensions; `tokens` is ignored.
        route, memory, profile, training, weight_readable, backward, wide_vectors: as for `choose_route`.
    """

    def choice(tokens: int) -> RouteChoice:
        here = replace(shape, tokens=tokens)
        return choose_route(
            route,
            memory,
            here,
            profile,
            training=training,
            weight_readable=weight_readable,
            backward=backward,
            wide_vectors=wide_vectors,
        )

    table: list[tuple[int, RouteChoice]] = []
    low = 1
    while low < _MANY:
        chosen, high = choice(low), 2 * low
        while high < _MANY and choice(high) == chosen:
            high *= 2
        # The choice changes between the last power of two with this choice and the next power of two.
        last = high // 2
        limit = last + bisect_left(range(last + 1, high), True, key=lambda tokens: choice(tokens) != chosen)
        table.append((limit, chosen))
        low = limit + 1
    return tuple(table)


@constant_while_compiling
def table_for(
    route: RouteName,
    memory: MemoryName,
    shape_key: str,
    device: torch.device,
    dtype: torch.dtype,
    *flags: bool,
) -> RouteTable:
    """Return the `route_table` for a device, dtype and `LayerShape.key`; torch.compile does not trace the search.

    Args:
        route, memory: as for `route_table`.
        shape_key, device, dtype: determine its `shape` and `profile`.
        flags: its arguments from `training` on.
    """
    return route_table(route, memory, LayerShape.of_key(shape_key), device_profile(device, dtype), *flags)


class TableCache:
    """Cache of one adapter's route tables on one layer, keyed by the arguments that vary between calls. Not copied.

    It is looked up in every layer call, where hashing a shape and a profile would take longer than a small product.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], tuple[DeviceProfile, tuple[RouteTable, ...]]] = {}

    def get(
        self,
        route: RouteName,
        memory: MemoryName,
        shapes: tuple[LayerShape, ...],
        device: torch.device,
        dtype: torch.dtype,
        *flags: bool,
    ) -> tuple[RouteTable, ...]:
        """Return the table for each shape. The first three arguments must be the same in every call."""
        key = (device, dtype, flags)
        profile = device_profile(device, dtype)
        found = self._found.get(key)
        if found is None or found[0] is not profile:  # not cached, or recalibrated since
            tables = tuple(route_table(route, memory, shape, profile, *flags) for shape in shapes)
            found = self._found[key] = profile, tables
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_found": {}}


def representative_tokens(tokens: int) -> int:
    """Return the number of tokens for which a compiled model chooses its routes: 8, 256 or 4096.

    Each comparison of a symbolic number of tokens may trigger recompilation. A model with many layer shapes can afford
    only two comparisons, the same for all layers.
    """
    if tokens <= 32:
        return 8
    return 256 if tokens <= 1024 else 4096


def look_up(table: RouteTable, tokens: int) -> RouteChoice:
    """Return a table's choice for a number of tokens."""
    for limit, choice in table:
        if tokens <= limit:
            return choice
    return table[-1][1]
