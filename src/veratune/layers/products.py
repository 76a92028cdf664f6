"""One layer's product with its adapted weight, by the route that is the cheapest for its shape."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veratune.ops.calibration import device_profile
from veratune.ops.linear import gradients_wanted, project, vera_add, vera_linear
from veratune.ops.planning import Plan, look_up, plan_table, representative_tokens
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


def plan_for(entry: "AdapterEntry", part: int, x: Tensor, *, training: bool, weight_readable: bool) -> Plan:
    """Return the plan of one adapter, or of one of its parts, for an input (..., in) in the compute dtype."""
    backward = training or gradients_wanted(x)
    table = _plan_table(entry, part, x.device, x.dtype, training, weight_readable, backward)
    tokens = math.prod(x.shape[:-1])
    return look_up(table, representative_tokens(tokens) if torch.compiler.is_compiling() else tokens)


@constant_while_compiling
def _plan_table(
    entry: "AdapterEntry",
    part: int,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
    weight_readable: bool,
    backward: bool,
) -> tuple[tuple[int, Plan], ...]:
    # A compiler need not trace the search for what depends on constants alone.
    profile = device_profile(device, dtype)
    route, memory = entry.settings.route, entry.settings.memory
    return plan_table(route, memory, entry.shapes[part], profile, training, weight_readable, backward)


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
    entry = layer.entries[name]
    b, d = layer.vectors(name)
    plan = plan_for(entry, 0, x, training=gradients_wanted(b, d), weight_readable=True)
    if index is not None:
        b, d = b[index], d[index]
    a_projection = entry.a.tensor(x.device, x.dtype)
    projected = None
    if plan.needs_xa:
        projected = project(x, a_projection) if xa is None else xa()
    return vera_linear(
        x,
        weight,
        bias,
        a_projection,
        entry.b[0].tensor(x.device, x.dtype),
        b,
        d,
        entry.scale,
        plan,
        transposed=layer.out_axis == 1,
        xa=projected,
    )


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
    entry = layer.entries[name]
    a_projection = entry.a.tensor(x.device, x.dtype)
    projected = project(x, a_projection) if xa is None else xa()
    outputs = []
    pieces = layer.pieces(name, x.device, x.dtype)
    for part, piece in enumerate(pieces):
        plan = plan_for(entry, part, x, training=gradients_wanted(piece.b, piece.d), weight_readable=False)
        b, d = (piece.b, piece.d) if index is None else (piece.b[index], piece.d[index])
        start = output if len(pieces) == 1 else output[:, piece.outputs]
        outputs.append(vera_add(start, x, a_projection, piece.b_projection, b, d, entry.scale, plan, xa=projected))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
