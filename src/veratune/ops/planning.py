"""Dimension-aware routing: which of the exact ways to compute a layer is the cheapest for its shape.

With T tokens and rank r, what VeRA adds to a frozen layer's products can be had in three ways:

    scaled   u = x A^T, then b * ((d * u) B^T): the vectors scale activations. For few tokens.
    folded   u = x A^T, then u C with C = d b^T * B folded once: the vectors scale a small matrix.
    dense    W0 + C^T A once, then one product as without VeRA. For many tokens, or high ranks.

and the vectors' gradients in three as well, from u (scaled, folded) or from the weight's gradient g^T x (dense). The
output and the gradients are chosen together, by an estimate in seconds: operations / rate + bytes / bandwidth, for each
product, and bytes / bandwidth for what is elementwise. Its constants are a device's `DeviceProfile`.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

RouteName = Literal["auto", "factored", "dense"]
ROUTE_NAMES: tuple[RouteName, ...] = ("auto", "factored", "dense")
MemoryName = Literal["balanced", "low", "fast"]
MEMORY_NAMES: tuple[MemoryName, ...] = ("balanced", "low", "fast")

Way = Literal["scaled", "folded", "dense"]


_ALLOWED: dict[RouteName, tuple[Way, ...]] = {
    "auto": ("scaled", "folded", "dense"),
    "factored": ("scaled", "folded"),
    "dense": ("dense",),
}


class Plan(NamedTuple):
    """The route of one call of one layer.

    Attributes:
        output: how the output and the input's gradient are computed.
        gradients: how the vectors' gradients are computed; None where none are wanted.
        keep: keep what the output was made with for the backward pass, rather than make it again: the adapted weight of
            a dense output, (out, in); the product with B of a scaled one whose gradients are scaled, (T, out).
    """

    output: Way
    gradients: Way | None
    keep: bool = False

    @property
    def needs_xa(self) -> bool:
        """Whether u = x A^T is wanted."""
        return self.output != "dense" or self.gradients in ("scaled", "folded")

    def __str__(self) -> str:
        gradients = "" if self.gradients is None else f", gradients {self.gradients}"
        kept = (", weight kept" if self.output == "dense" else ", product kept") if self.keep else ""
        return f"{self.output}{gradients}{kept}"


@dataclass(frozen=True)
class DeviceProfile:
    """What the estimate has to know of a device and a dtype.

    Attributes:
        flops: operations of matrix products in a second.
        bandwidth: bytes read or written in a second.
        launch: seconds that any operation takes at least.
        itemsize: bytes of one element.
    """

    flops: float
    bandwidth: float
    launch: float
    itemsize: int


@dataclass(frozen=True)
class LayerShape:
    """The dimensions of one call: (in, out) of the layer, rank, tokens, and how many layers share x A^T."""

    in_features: int
    out_features: int
    rank: int
    tokens: int
    sharing: int = 1


@dataclass(frozen=True)
class Estimate:
    """What one plan adds to the frozen layer.

    Attributes:
        plan: the plan.
        flops: operations of its matrix products.
        saved_bytes: what it keeps from the forward to the backward pass, beside the parameters.
        seconds: the estimated time.
    """

    plan: Plan
    flops: int
    saved_bytes: int
    seconds: float


class _Cost:
    """Adds up products and elementwise passes."""

    def __init__(self, profile: DeviceProfile) -> None:
        self.profile = profile
        self.flops = 0
        self.seconds = 0.0

    def product(self, rows: int, columns: int, inner: int, share: int = 1) -> None:
        """Add (rows, inner) times (inner, columns), of which this layer bears 1 / share."""
        profile = self.profile
        flops = 2 * rows * columns * inner
        touched = (rows * inner + inner * columns + rows * columns) * profile.itemsize
        self.flops += flops // share
        self.seconds += (flops / profile.flops + touched / profile.bandwidth + profile.launch) / share

    def pass_over(self, elements: int, width: int = 4) -> None:
        """Add the reading or writing of so many elements of so many bytes, in an operation of its own."""
        self.seconds += elements * width / self.profile.bandwidth + self.profile.launch


def estimate(plan: Plan, shape: LayerShape, profile: DeviceProfile, *, backward: bool = True) -> Estimate:
    """Return what a plan costs beyond the frozen layer, forward and, if wanted, backward to the input."""
    n, m, r, t = shape.in_features, shape.out_features, shape.rank, shape.tokens
    size = profile.itemsize
    cost = _Cost(profile)
    saved = 0
    if plan.needs_xa:
        cost.product(t, r, n, share=shape.sharing)
    for forward in (True, False) if backward else (True,):
        if plan.output == "scaled":
            if forward:
                cost.product(t, m, r)
            elif plan.gradients != "scaled":  # which makes (b * g) B anyway
                cost.product(t, r, m)
            if not forward:
                cost.product(t, n, r)
            cost.pass_over(2 * t * r, size)
            cost.pass_over(3 * t * m, size)
            continue
        if plan.output == "dense" and plan.keep and not forward:
            continue
        cost.pass_over(4 * r * m)  # outer product, times B, rounded
        if plan.output == "dense":
            cost.product(m, n, r)
        elif forward:
            cost.product(t, m, r)
        else:
            cost.product(t, r, m)
            cost.product(t, n, r)
    if plan.gradients == "dense":
        cost.product(m, n, t)
        cost.product(r, m, n)
        saved += t * n * size
    elif plan.gradients is not None:
        if plan.gradients == "folded":
            cost.product(r, m, t)
        else:
            cost.product(t, r, m)
            if plan.keep and plan.output == "scaled":
                saved += t * m * size
            else:
                cost.product(t, m, r)
            cost.pass_over(2 * t * r, size)
            cost.pass_over(4 * t * m, size)
        saved += t * r * size // shape.sharing
    if plan.gradients in ("dense", "folded"):
        cost.pass_over(4 * r * m)
    if plan.keep and plan.output == "dense":
        saved += m * n * size
    return Estimate(plan, cost.flops, saved, cost.seconds)


def possible_plans(
    route: RouteName,
    memory: MemoryName,
    shape: LayerShape,
    *,
    training: bool,
    weight_readable: bool,
    backward: bool | None = None,
) -> list[Plan]:
    """Return the plans that a configuration allows for a call.

    Args:
        route: which ways are allowed: "factored" leaves out dense ones, "dense" all others.
        memory: "low" keeps the smaller of x and x A^T for the gradients and nothing else; "fast" keeps what saves work;
            "balanced" keeps an adapted weight that is small beside the layer's activations, and activations that are
            small beside the layer's weight.
        shape: the call's dimensions.
        training: whether the vectors' gradients will be wanted.
        weight_readable: whether W0 can be read, which a dense output needs.
        backward: whether any gradient will be wanted, such as the input's through a frozen adapter; as `training` by
            default.
    """
    backward = training if backward is None else backward
    ways = _ALLOWED[route]
    outputs = [way for way in ways if way != "dense" or weight_readable] or ["folded"]
    gradients: list[Way | None] = [None]
    if training:
        gradients = list(ways)
        if memory == "low" and route == "auto":
            small: tuple[Way, ...] = ("dense",) if shape.in_features < shape.rank else ("scaled", "folded")
            gradients = [way for way in gradients if way in small]
    weight_is_small = 8 * shape.in_features * shape.out_features <= shape.tokens * (
        shape.in_features + shape.out_features
    )
    activations_are_small = 8 * shape.tokens <= shape.in_features
    keep_weight = backward and (memory == "fast" or (memory == "balanced" and weight_is_small))
    keep_product = training and (memory == "fast" or (memory == "balanced" and activations_are_small))

    def keep(output: Way, way: Way | None) -> bool:
        return keep_weight if output == "dense" else keep_product and output == way == "scaled"

    return [Plan(output, way, keep(output, way)) for output in outputs for way in gradients]


def choose_plan(
    route: RouteName,
    memory: MemoryName,
    shape: LayerShape,
    profile: DeviceProfile,
    *,
    training: bool,
    weight_readable: bool = True,
    backward: bool | None = None,
) -> Plan:
    """Return the allowed plan with the smallest estimate."""
    backward = training if backward is None else backward
    plans = possible_plans(route, memory, shape, training=training, weight_readable=weight_readable, backward=backward)
    best, least = plans[0], float("inf")
    for plan in plans:
        seconds = estimate(plan, shape, profile, backward=backward).seconds
        if seconds < least:
            best, least = plan, seconds
    return best


# How much longer than alone it takes, measured in whole models, to add up a weight for every adapter: neither what it
# is made from nor the memory that it goes to is in a cache, while products with a batch's tokens find theirs there.
_IN_A_MODEL = 2.5


@lru_cache(maxsize=4096)
def folding_pays(shape: LayerShape, profile: DeviceProfile, *, moved: bool) -> bool:
    """Return whether tokens with vectors of their own cost less through a weight added up for them than by the rank.

    Args:
        shape: the layer, and how many those tokens are.
        profile: the device's.
        moved: whether they do not stand together in the batch, so that they are taken out of it and put back.
    """
    moving = _Cost(profile)
    if moved:
        moving.pass_over(2 * shape.tokens * shape.in_features, profile.itemsize)
        moving.pass_over(2 * shape.tokens * shape.out_features, profile.itemsize)
    added_up = estimate(Plan("dense", None), shape, profile, backward=False)
    by_rank = estimate(Plan("scaled", None), shape, profile, backward=False)
    return _IN_A_MODEL * added_up.seconds + moving.seconds < by_rank.seconds


# Beyond so many tokens nothing changes any more.
_MANY = 1 << 24


@lru_cache(maxsize=4096)
def plan_table(
    route: RouteName,
    memory: MemoryName,
    shape: LayerShape,
    profile: DeviceProfile,
    training: bool,
    weight_readable: bool,
    backward: bool | None = None,
) -> tuple[tuple[int, Plan], ...]:
    """Return the choices for every number of tokens, as (largest number of tokens, plan) in ascending order.

    A table is looked up faster than an estimate is made, and a compiler that traces with a symbolic number of tokens
    meets a few comparisons with constants.

    Args:
        shape: the layer's; its number of tokens does not count.
        route, memory, profile, training, weight_readable, backward: as for `choose_plan`.
    """

    def choice(tokens: int) -> Plan:
        here = replace(shape, tokens=tokens)
        return choose_plan(
            route, memory, here, profile, training=training, weight_readable=weight_readable, backward=backward
        )

    table: list[tuple[int, Plan]] = []
    low = 1
    while low < _MANY:
        plan, high = choice(low), 2 * low
        while high < _MANY and choice(high) == plan:
            high *= 2
        # The choice changes between the last power of two that agreed and the first that did not.
        last = high // 2
        limit = last + bisect_left(range(last + 1, high), True, key=lambda tokens: choice(tokens) != plan)
        table.append((limit, plan))
        low = limit + 1
    return tuple(table)


def representative_tokens(tokens: int) -> int:
    """Return the number of tokens by which a compiled model chooses: few, some, or many.

    Each comparison of a symbolic number of tokens may make a compiler compile again. Two of them, the same for all
    layers, are what a model of many shapes can afford.
    """
    if tokens <= 32:
        return 8
    return 256 if tokens <= 1024 else 4096


def look_up(table: tuple[tuple[int, Plan], ...], tokens: int) -> Plan:
    """Return a table's plan for a number of tokens."""
    for limit, plan in table:
        if tokens <= limit:
            return plan
    return table[-1][1]
