"""The reference for adapters on weights of any kind: the model itself, with W + diag(b) B diag(d) A as parameters."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reference import block_projections, projections, unit
from veratune import VeraModel
from veratune.layers import VeraConv, VeraConv1D, VeraEmbedding, VeraParameter


def dense_parameters(model: VeraModel, adapter: str = "default") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (parameter name to W + delta in float64, vector name to the leaf that it was computed from)."""
    weights, leaves = {}, {}
    config = model.peft_config[adapter]
    key = config.projection_prng_key

    def drawn(rank: int, n: int, m: int) -> tuple[Tensor, Tensor]:
        if config.projection == "blocks":
            return block_projections(key, config.projection_blocks, rank, n, m)
        return projections(key, rank, n, m)

    for name, layer in model.vera_layers().items():
        if adapter not in layer.entries:
            continue
        b, d = (vector.detach().double().requires_grad_() for vector in layer.vectors(adapter).values())
        leaves[f"b.{name}"], leaves[f"d.{name}"] = b, d
        rank, n, m = d.shape[-1], layer.in_features, layer.out_features
        a, widest = drawn(rank, n, m)
        full = name if isinstance(layer, VeraParameter) else f"{name}.weight"
        base = dict(layer.base_layer.named_parameters())[full.rpartition(".")[2]].detach().double()
        parts = layer.entries[adapter].parts
        if isinstance(layer, VeraEmbedding):
            # Its inputs are one-hot: A is dense, with a fan-in of one.
            columns = torch.tensor(
                [
                    [unit(key, "A", k, j, 2 if config.projection == "blocks" else 1) for j in range(n)]
                    for k in range(rank)
                ],
                dtype=torch.float64,
            )
            delta = _delta(b, d, columns * math.sqrt(6), widest).t()
        elif isinstance(layer, VeraParameter) and b.ndim == 2:
            stack = torch.stack([_delta(b[e], d[e], a, widest) for e in range(len(b))])
            delta = stack.mT if layer.out_axis == 1 else stack
        elif parts:
            starts = [sum(parts[:i]) for i in range(len(parts))]
            delta = torch.cat(
                [
                    _delta(b[s : s + p], d[i], a, drawn(rank, n, p)[1])
                    for i, (s, p) in enumerate(zip(starts, parts, strict=True))
                ]
            )
        else:
            delta = _delta(b, d, a, widest)
        if isinstance(layer, VeraConv1D):
            delta = delta.t()
        if isinstance(layer, VeraConv):
            assert base.flatten(1).shape == delta.shape
        weights[full] = base + delta.reshape(base.shape)
    return weights, leaves


def _delta(b: Tensor, d: Tensor, a: Tensor, b_projection: Tensor) -> Tensor:
    return torch.diag(b) @ b_projection @ torch.diag(d) @ a


def check_against_dense(
    make: Callable[[], nn.Module], model: VeraModel, call: Callable[[Any], Tensor], tolerance: float = 1e-5
) -> None:
    """Compare an adapted model's output, and its vectors' gradients, with those of the dense model in float64.

    Args:
        make: makes the base model anew, with the same weights.
        model: the adapted one.
        call: calls a model, float32 or float64, and returns a tensor.
        tolerance: largest difference relative to the largest value.
    """
    weights, leaves = dense_parameters(model)
    dense = make().double()
    output = _call_with(dense, weights, call)
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.autograd.grad((output * weighting).sum(), list(leaves.values()))
    vectors = [vector for layer in model.vera_layers().values() for vector in layer.vectors("default").values()]
    ours = call(model)
    got = torch.autograd.grad((ours * weighting.to(ours.dtype)).sum(), vectors)
    _close("output", ours, output, tolerance)
    for name, mine, theirs in zip(leaves, got, expected, strict=True):
        _close(name, mine, theirs, tolerance)
    with torch.no_grad():
        _close("output without gradients", call(model), output, tolerance)


def _call_with(model: nn.Module, weights: dict[str, Tensor], call: Callable[[Any], Tensor]) -> Tensor:
    class Dense:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, weights, args, kwargs)

    return call(Dense())


def _close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = float(expected.detach().abs().max())
    difference = float((actual.detach().double() - expected.detach()).abs().max())
    assert largest > 0 and difference <= tolerance * largest, f"{what}: off by {difference:.3e} of {largest:.3e}"
