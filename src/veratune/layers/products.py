"""Compute the output of one layer with one adapter, by the chosen route."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veratune.layers.entries import Block
from veratune.ops.factors import Factors
from veratune.ops.linear import adapted_linear, project, residual
from veratune.ops.planning import RouteChoice
from veratune.utils.tensors import gradients_wanted


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    choice: RouteChoice,
    *,
    transposed: bool,
    xa: Callable[[bool], Tensor] | None = None,
) -> Tensor:
    """Return x (W0 + delta W)^T + bias, (T, out), for one adapter on a layer that is not fused.

    Args:
        x: (T, in), in the compute dtype.
        weight: W0, one matrix, in the layer's layout and in the compute dtype.
        bias: (out,), in the compute dtype, or None.
        factors: the adapter.
        choice: the route.
        transposed: whether the weight is (in, out).
        xa: returns x A^T, if layers share it; in float32 if called with True.
    """
    return adapted_linear(x, weight, bias, factors, choice, transposed=transposed, xa=xa)


def add(
    output: Tensor,
    x: Tensor,
    blocks: Sequence[Block],
    choices: Sequence[RouteChoice],
    *,
    index: Any = None,
    xa: Callable[[bool], Tensor] | None = None,
) -> Tensor:
    """Return output + x delta W^T, (T, out), for one adapter, through the low-rank factors.

    Args:
        output: (T, out).
        x: (T, in), of the output's dtype.
        blocks: the adapter's factors for each block of outputs.
        choices: the route for each block.
        index: the index of the matrix in the stack; None if there is no stack.
        xa: returns x A^T, if layers share it; in float32 if called with True.
    """
    factors = blocks[0].factors
    exactly = any(choice.exact for choice in choices) and gradients_wanted(factors.b, factors.d)
    projected = None if xa is None else xa(exactly)
    if len(blocks) == 1:
        return residual(output, x, blocks[0].factors.at(index), choices[0], xa=projected)
    if projected is None:
        projected = project(x, factors.A, exactly=exactly)
    outputs = [
        residual(output[:, block.outputs], x, block.factors, choice, xa=projected)
        for block, choice in zip(blocks, choices, strict=True)
    ]
    return torch.cat(outputs, dim=-1)
