"""Dimension-aware routing: which of the exact ways to compute a layer is the cheapest for its shape.

VeRA's delta can be applied in two ways, and so can the gradients of its vectors be had (T tokens, rank r; counts of
floating-point operations beyond the frozen layer's own):

    output     factored   x A^T, then times the folded (r, out) matrix        2 T r (in + out)
               dense      W0 + delta once, then one product as without VeRA   2 r in out
    gradients  factored   (x A^T)^T g, from the rank-sized activation         2 T r (in + out), 2 T r out if it is kept
               dense      g^T x first, then times A^T                         2 T in out + 2 r in out

The input's gradient follows the output's route, forwards and backwards each.
"""

from typing import Literal, NamedTuple

RouteName = Literal["auto", "factored", "dense"]
ROUTE_NAMES: tuple[RouteName, ...] = ("auto", "factored", "dense")


class Plan(NamedTuple):
    """The route of one call of one layer.

    Attributes:
        dense_output: form W0 + delta and multiply once, rather than add a product through the rank.
        dense_gradients: get the vectors' gradients from g^T x rather than from x A^T.
    """

    dense_output: bool
    dense_gradients: bool


FACTORED = Plan(dense_output=False, dense_gradients=False)


def output_flops(in_features: int, out_features: int, rank: int, tokens: int, *, dense: bool, steps: int) -> int:
    """Return the operations that `steps` of the passes forward and backward to the input add to the frozen layer's."""
    if dense:
        return steps * 2 * rank * in_features * out_features
    return steps * 2 * tokens * rank * (in_features + out_features)


def gradient_flops(in_features: int, out_features: int, rank: int, tokens: int, *, dense: bool, kept: bool) -> int:
    """Return the operations of the vectors' gradients; `kept`: the forward pass has left x A^T behind."""
    if dense:
        return 2 * in_features * out_features * (tokens + rank)
    return 2 * tokens * rank * (out_features if kept else in_features + out_features)


def choose_plan(
    route: RouteName,
    in_features: int,
    out_features: int,
    rank: int,
    tokens: int,
    *,
    training: bool,
    weight_at_hand: bool = True,
) -> Plan:
    """Return the plan with the fewest operations, or the one that `route` asks for.

    Args:
        route: "auto", or the route that is wanted for everything.
        in_features, out_features, rank: the layer's shape.
        tokens: the product of the input's leading dimensions.
        training: whether the vectors' gradients will be wanted.
        weight_at_hand: whether W0 can be read, which a dense output needs.
    """
    if route == "factored":
        return FACTORED
    if route == "dense":
        return Plan(dense_output=weight_at_hand, dense_gradients=True)
    shape = (in_features, out_features, rank, tokens)
    best, fewest = FACTORED, -1
    for dense_output in (False, True) if weight_at_hand else (False,):
        for dense_gradients in (False, True) if training else (False,):
            flops = output_flops(*shape, dense=dense_output, steps=2 if training else 1)
            if training:
                flops += gradient_flops(*shape, dense=dense_gradients, kept=not dense_output)
            if fewest < 0 or flops < fewest:
                best, fewest = Plan(dense_output, dense_gradients), flops
    return best
