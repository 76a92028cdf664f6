"""One layer's product with its adapted weight, by the route that is the cheapest for its shape."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veratune.ops.calibration import device_profile
from veratune.ops.linear import adapted_linear, project, residual
from veratune.ops.planning import RouteChoice, look_up, representative_tokens, route_table
from veratune.ops.routes import ROUTES
from veratune.utils.tensors import gradients_wanted
from veratune.utils.torch_private import constant_while_compiling

if TYPE_CHECKING:
    from veratune.layers.base import AdapterEntry, VeraLayer


def compute_dtype(x: Tensor, weight_dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which torch computes a linear layer here, or None where it refuses to."""
    device = x.device.type
    if (
        device != "meta"
        and torch.is_autocast_enabled(device)
        and all(dtype.is_floating_point and dtype != torch.float64 for dtype in (x.dtype, weight_dtype))
    ):
        return torch.get_autocast_dtype(device)
    return x.dtype if x.dtype == weight_dtype else None


def choose(entry: "AdapterEntry", part: int, x: Tensor, *, training: bool, weight_readable: bool) -> RouteChoice:
    """Return the route of one adapter, or of one of its parts, for an input (..., in) in the compute dtype."""
    backward = training or gradients_wanted(x)
    table = _route_table(entry, part, x.device, x.dtype, training, weight_readable, backward)
    tokens = math.prod(x.shape[:-1])
    return look_up(table, representative_tokens(tokens) if torch.compiler.is_compiling() else tokens)


@constant_while_compiling
def _route_table(
    entry: "AdapterEntry",
    part: int,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    weight_readable: bool,
    backward: bool,
) -> tuple[tuple[int, RouteChoice], ...]:
    # A compiler need not trace the search for what depends on constants alone.
    profile = device_profile(device, dtype)
    route, memory = entry.settings.route, entry.settings.memory
    return route_table(route, memory, entry.shapes[part], profile, training, weight_readable, backward)


def multiply(
    layer: "VeraLayer",
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    index: Any = None,
    xa: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return x (W0 + delta W)^T + bias, (T, out), for one adapter, which has no parts.

    Args:
        layer: the layer.
        name: the adapter.
        x: (T, in), in the compute dtype.
        weight: W0 in the layer's own layout, one matrix, in the compute dtype.
        bias: (out,) or None.
        index: which matrix of a stack the weight is.
        xa: makes x A^T, where that is shared with other layers.
    """
    training = gradients_wanted(*layer.vectors(name))
    choice = choose(layer.entries[name], 0, x, training=training, weight_readable=True)
    projected = xa() if xa is not None and ROUTES[choice.route].uses_xa(training) else None
    (piece,) = layer.pieces(name, x.device, x.dtype)
    factors = piece.factors.at(index)
    return adapted_linear(x, weight, bias, factors, choice, transposed=layer.out_axis == 1, xa=projected)


def add(
    layer: "VeraLayer",
    name: str,
    output: Tensor,
    x: Tensor,
    *,
    index: Any = None,
    xa: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return output + x delta W^T, (T, out), for one adapter, through the rank.

    Args:
        layer, name, index, xa: as for `multiply`.
        output: (T, out).
        x: (T, in), of the output's dtype.
    """
    projected = None if xa is None else xa()
    outputs = []
    pieces = layer.pieces(name, x.device, x.dtype)
    for part, (outputs_of_part, factors) in enumerate(pieces):
        training = gradients_wanted(factors.b, factors.d)
        choice = choose(layer.entries[name], part, x, training=training, weight_readable=False)
        start = output if len(pieces) == 1 else output[:, outputs_of_part]
        if projected is None and len(pieces) > 1:
            projected = project(x, factors.A)
        outputs.append(residual(start, x, factors.at(index), choice, xa=projected))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
