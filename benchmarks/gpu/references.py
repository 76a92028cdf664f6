"""Independent references in float64 on the CPU: dense algebra under ordinary autograd."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veratune import VeraModel
from veratune.layers import VeraConv1D, VeraEmbedding, VeraLayer, VeraParameter

LIMITS = {torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float64: 1e-12}
"""Largest error, relative to the largest value, of a result that is a few products in a row.

float32 (TF32 off): sums of up to 4,096 terms of unit roundoff 6e-8, 4e-6 in all, which two products in a row and the
division by a value that is not the sum of magnitudes raise; ten times TF32's error would be 1e-2. bfloat16: each of a
few roundings, of A, C, W0 + delta W, u and the result, is up to 4e-3 of a term.
"""


def errors_of(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return for each tensor the largest error relative to the largest value, and the relative error of the norm."""
    result = {}
    for name, expected in exact.items():
        difference = found[name].detach().cpu().double() - expected.detach()
        largest = float(expected.detach().abs().max())
        assert largest > 0, name
        result[name] = [
            float(difference.abs().max()) / largest,
            float(difference.norm() / expected.detach().norm()),
        ]
    return result


def verdict(errors: dict[str, list[float]], dtype: torch.dtype) -> dict[str, Any]:
    """Return whether all errors are within the dtype's limit, as figures of a case."""
    worst = max(values[0] for values in errors.values())
    passed = math.isfinite(worst) and worst <= LIMITS[dtype]
    line = f"largest error {worst:.1e}, {'within' if passed else 'NOT WITHIN'} {LIMITS[dtype]:.0e}"
    return {"passed": passed, "limit": LIMITS[dtype], "errors": errors, "line": line}


def dense_delta(b: Tensor, d: Tensor, a: Tensor, b_projection: Tensor, scale: float) -> Tensor:
    """Return diag(b) B diag(d) A with B given rank-major, (r, out)."""
    return torch.diag(b) @ (scale * b_projection).t() @ torch.diag(d) @ a


def dense_model(model: VeraModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (parameter name to W0 + delta W in float64, vector name to the leaf that it is computed from)."""
    weights, leaves = {}, {}
    for name, layer in model.vera_layers().items():
        b, d = (vector.detach().cpu().double().requires_grad_() for vector in layer.vectors("default").values())
        leaves[f"b.{name}"], leaves[f"d.{name}"] = b, d
        full = name if isinstance(layer, VeraParameter) else f"{name}.weight"
        base = dict(layer.base_layer.named_parameters())[full.rpartition(".")[2]].detach().cpu().double()
        delta = _delta_of(layer, b, d)
        weights[full] = base + delta.reshape(base.shape)
    return weights, leaves


def _delta_of(layer: VeraLayer, b: Tensor, d: Tensor) -> Tensor:
    """Return one layer's delta in the layout of its weight, flattened to a matrix."""
    entry = layer.entries["default"]
    up = [view.drawn().double() for view in entry.b]
    if isinstance(layer, VeraEmbedding):
        columns = entry.a.projection.scheme.one_hot_columns(entry.r, torch.arange(layer.in_features))
        return dense_delta(b, d, columns.double(), up[0], entry.scale).t()
    a = entry.a.drawn().double()
    if isinstance(layer, VeraParameter) and b.ndim == 2:
        stack = torch.stack([dense_delta(b[e], d[e], a, up[0], entry.scale) for e in range(len(b))])
        return stack.mT if layer.out_axis == 1 else stack
    if entry.parts:
        ends = [sum(entry.parts[: i + 1]) for i in range(len(entry.parts))]
        own = [
            dense_delta(b[end - size : end], d[i], a, up[i], entry.scale)
            for i, (size, end) in enumerate(zip(entry.parts, ends, strict=True))
        ]
        return torch.cat(own)
    delta = dense_delta(b, d, a, up[0], entry.scale)
    return delta.t() if isinstance(layer, VeraConv1D) else delta


def call_dense(model: nn.Module, weights: dict[str, Tensor], call: Callable[[Any], Tensor]) -> Tensor:
    """Call a float64 model with some of its parameters replaced."""
    return call(lambda *args, **kwargs: torch.func.functional_call(model, weights, args, kwargs))
