"""Decide how a layer computes an input: whether it reads the weight, in which dtype, and by which routes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from veratune.layers.entries import AdapterEntry
from veratune.ops.calibration import device_profile
from veratune.ops.factors import Factors
from veratune.ops.planning import RouteChoice, exact_rows_pay, look_up, representative_tokens, table_for
from veratune.utils.tensors import gradients_wanted


def compute_dtype(x: Tensor, weight_dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which torch would compute a linear layer, or None if it would raise an error."""
    device, dtype = x.device.type, x.dtype
    if (
        device != "meta"
        and torch.is_autocast_enabled(device)
        and all(each.is_floating_point and each != torch.float64 for each in (dtype, weight_dtype))
    ):
        return torch.get_autocast_dtype(device)
    return dtype if dtype == weight_dtype else None


def are_wide(vectors: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Return whether the vectors are in float32 or wider while `dtype`, that of products, is half precision."""
    return dtype.itemsize == 2 and all(vector.dtype.itemsize > 2 for vector in vectors)


def choose(
    entry: AdapterEntry, vectors: Sequence[Tensor], x: Tensor, dtype: torch.dtype, *, weight_readable: bool
) -> tuple[RouteChoice, ...]:
    """Return one adapter's routes for an input, one for each part of the outputs.

    Args:
        entry: the adapter.
        vectors: b and d, whose gradients may be required.
        x: (..., in).
        dtype: the compute dtype.
        weight_readable: whether the route may compute with W0 itself.
    """
    graded = torch.is_grad_enabled()
    b, d = vectors
    training = graded and (b.requires_grad or d.requires_grad)
    backward = training or (graded and x.requires_grad)
    wide_vectors = training and are_wide(vectors, dtype)
    settings = entry.settings
    flags = (training, weight_readable, backward, wide_vectors)
    if torch.compiler.is_compiling():
        few_or_many = representative_tokens(math.prod(x.shape[:-1]))
        keys = [shape.key for shape in entry.shapes]
        tables = [table_for(settings.route, settings.memory, key, x.device, dtype, *flags) for key in keys]
        return tuple([look_up(table, few_or_many) for table in tables])
    found = entry.tables.get(settings.route, settings.memory, entry.shapes, x.device, dtype, *flags)
    tokens = x.shape[0] if x.ndim == 2 else math.prod(x.shape[:-1])
    return (look_up(found[0], tokens),) if len(found) == 1 else tuple([look_up(table, tokens) for table in found])


def exact_rows(entry: AdapterEntry, factors: Factors, x: Tensor) -> bool:
    """Return whether to compute the gradients of a stack's vectors exactly for rows x (T, in)."""
    vectors = factors.b, factors.d
    if not (are_wide(vectors, x.dtype) and gradients_wanted(*vectors)) or torch.compiler.is_compiling():
        return False
    return exact_rows_pay(replace(entry.shapes[0], tokens=x.shape[0]), device_profile(x.device, x.dtype))


class LinearPlan(NamedTuple):
    """How one call of a linear layer is computed.

    Attributes:
        how: "weight" calls the base layer with the adapted weight; "together" computes the base layer and the first
            adapter in one product, then adds the others; "residual" calls the unchanged base layer, then adds all
            adapters.
        dtype: the compute dtype.
        choices: the routes of each adapter, one for each part of the outputs.
    """

    how: Literal["weight", "together", "residual"]
    dtype: torch.dtype
    choices: list[tuple[RouteChoice, ...]]


def plan_linear(
    adapters: Sequence[tuple[AdapterEntry, tuple[Tensor, Tensor]]],
    x: Tensor,
    *,
    weight_dtype: torch.dtype | None,
    replaceable: bool,
    together: bool,
) -> LinearPlan:
    """Decide how a linear layer computes its output, given its active adapters.

    Args:
        adapters: the entry and the vectors of each active adapter; there is at least one.
        x: (..., in).
        weight_dtype: W0's dtype if the output depends only on x, W0 and the bias; otherwise None.
        replaceable: whether the base layer may be called with the adapted weight instead.
        together: whether the base layer and the first adapter may be computed in one product.
    """
    dtype = None if weight_dtype is None else compute_dtype(x, weight_dtype)
    together = together and dtype is not None and not adapters[0][0].parts
    if dtype is None:
        dtype = compute_dtype(x, x.dtype) or x.dtype
    first = None
    if replaceable and weight_dtype is not None and (len(adapters) > 1 or adapters[0][0].parts):
        # Adapters that would each be cheapest with W0 + delta W are cheapest with the sum of their deltas.
        choices = [choose(entry, vectors, x, dtype, weight_readable=True) for entry, vectors in adapters]
        if all(_largest_is_dense(entry, own) for (entry, _), own in zip(adapters, choices, strict=True)):
            return LinearPlan("weight", dtype, choices)
        first = choices[0] if together else None
    if first is None:
        first = choose(*adapters[0], x, dtype, weight_readable=together)
    choices = [first]
    for entry, vectors in adapters[1:] if len(adapters) > 1 else ():
        choices.append(choose(entry, vectors, x, dtype, weight_readable=False))
    return LinearPlan("together" if together else "residual", dtype, choices)


def _largest_is_dense(entry: AdapterEntry, choices: Sequence[RouteChoice]) -> bool:
    return choices[entry.parts.index(max(entry.parts)) if entry.parts else 0].reads_weight
