"""Independent references: plain Python integers for Philox, float64 dense algebra for VeRA."""

import math

import torch
from torch import Tensor, nn

MASK = 0xFFFFFFFF


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as in Salmon et al. 2011, section 3.3, on Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return tuple(c)


def unit(key: int, side: str, k: int, j: int, version: int = 1) -> float:
    """u[k, j] of the per_dimension scheme, or of the `blocks` scheme, which is version 2."""
    words = philox4x32_10((j // 4, k, "AB".index(side), version), (key & MASK, key >> 32))
    return (((words[j % 4] >> 8) | 1) - 2**23) / 2**23


def projections(key: int, rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of the paper, float64, for the per_dimension scheme."""
    a = torch.tensor([[unit(key, "A", k, j) for j in range(in_features)] for k in range(rank)], dtype=torch.float64)
    b = torch.tensor([[unit(key, "B", k, j) for k in range(rank)] for j in range(out_features)], dtype=torch.float64)
    return a * math.sqrt(6 / in_features), b * math.sqrt(6 / rank)


def block_projections(key: int, g: int, rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), float64, for the `blocks` scheme, element by element as its rules state them."""
    blocks_in, blocks_out = math.gcd(g, in_features), math.gcd(g, out_features)
    per_in, per_out = in_features // blocks_in, out_features // blocks_out
    a = torch.zeros(rank, in_features, dtype=torch.float64)
    b = torch.zeros(out_features, rank, dtype=torch.float64)
    for k in range(rank):
        for j in range(in_features):
            if j // per_in == k % g % blocks_in:
                a[k, j] = math.sqrt(6 / per_in) * unit(key, "A", k, j % per_in, version=2)
        for j in range(out_features):
            if j // per_out == (k + k // g) % g % blocks_out:
                b[j, k] = math.sqrt(6 * blocks_out / rank) * unit(key, "B", k, j % per_out, version=2)
    return a, b


def dense_delta(b: Tensor, d: Tensor, a_projection: Tensor, b_projection: Tensor) -> Tensor:
    """diag(b) B diag(d) A, (out, in), in float64; B is (out, r)."""
    return torch.diag(b.double()) @ b_projection.double() @ torch.diag(d.double()) @ a_projection.double()


def randomise(module: nn.Module, scale: float = 1.0) -> None:
    """Give every VeRA vector random values, so that adapters do something."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".vera_lambda_" in f".{name}":
                parameter.normal_(std=scale)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    actual, expected = actual.detach(), expected.detach()
    largest = expected.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((actual.double() - expected.double()).abs().max() / largest)
