"""Add the output of one adapter to that of a layer, fused or not, by the chosen routes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veratune.layers.entries import Part
from veratune.ops.linear import project, residual
from veratune.ops.planning import RouteChoice
from veratune.utils.tensors import gradients_wanted


def plus_adapter(
    output: Tensor,
    x: Tensor,
    parts: Sequence[Part],
    choices: Sequence[RouteChoice],
    *,
    index: Any = None,
    xa: Callable[[bool], Tensor] | None = None,
) -> Tensor:
    """Return output + x delta W^T, (T, out), for one adapter, through the low-rank factors.

    Args:
        output: (T, out).
        x: (T, in), in the output's dtype.
        parts: the adapter's factors for each part of the outputs.
        choices: the route for each part.
        index: the index of the matrix in the stack; None if there is no stack.
        xa: returns x A^T if layers share it, in float32 if called with True.
    """
    factors = parts[0].factors
    exactly = any(choice.exact for choice in choices) and gradients_wanted(factors.b, factors.d)
    projected = None if xa is None else xa(exactly)
    if len(parts) == 1:
        return residual(output, x, parts[0].factors.at(index), choices[0], xa=projected)
    if projected is None:
        projected = project(x, factors.A, exactly=exactly)
    outputs = [
        residual(output[:, part.outputs], x, part.factors, choice, xa=projected)
        for part, choice in zip(parts, choices, strict=True)
    ]
    return torch.cat(outputs, dim=-1)
