"""Errors of the route `triton` against float64, its kernel in Triton's interpreter. `tests/ops/test_triton.py` runs it.

It is a program because the interpreter has to be chosen before anything imports triton.
"""

import json
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from veratune.ops.factors import Factors
from veratune.ops.linear import adapted_linear, residual
from veratune.ops.planning import RouteChoice
from veratune.projections.structure import Matrix

SCALE = 0.7
# (T, in, out, r): less than one block, blocks that are not full, two programs for one tile, the largest rank.
SHAPES = ((3, 5, 6, 4), (70, 130, 200, 20), (2, 20, 130, 256))
EVERYTHING = {"x", "b", "d", "start"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GENERATOR = torch.Generator().manual_seed(0)


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=GENERATOR)


def errors(shape: tuple[int, int, int, int], dtype: torch.dtype, wanted: set[str], kind: str) -> dict[str, float]:
    """Return the relative error of the output and of each gradient."""
    tokens, n, m, r = shape
    given = {
        "x": normal(tokens, n).to(dtype),
        "start": normal(tokens, m).to(dtype),
        "weight": (normal(m, n) / n**0.5).to(dtype),
        "a": (normal(r, n) / n**0.5).to(dtype),
        "up": (normal(r, m) / r**0.5).to(dtype),
        "b": normal(m),
        "d": normal(r),
    }
    if kind == "strided":  # every second column, and rows of a wider tensor
        given["x"] = normal(tokens, 2 * n).to(dtype)[:, ::2]
    leaves = {name: given[name].detach().requires_grad_(name in wanted) for name in given}
    exact = {name: given[name].double().requires_grad_(name in wanted) for name in given}
    gradient = normal(tokens, m).to(dtype)

    def ours(x: Tensor, start: Tensor, b: Tensor, d: Tensor) -> Tensor:
        factors = Factors(Matrix(given["a"]), Matrix(given["up"]), b, d, SCALE)
        choice = RouteChoice("triton", keep=bool(wanted & {"b", "d"}))
        if kind == "residual" or "start" in wanted:
            return residual(start, x, factors, choice)
        return adapted_linear(x, given["weight"], None, factors, choice)

    call = torch.compile(ours, backend="aot_eager", fullgraph=True) if kind == "compiled" else ours
    output = call(*(leaves[name] for name in ("x", "start", "b", "d")))
    base = exact["start"]
    if not (kind == "residual" or "start" in wanted):
        base = exact["x"] @ exact["weight"].t()
    expected = base + ((exact["x"] @ exact["a"].t()) * (SCALE * exact["d"])) @ exact["up"] * exact["b"]
    output.backward(gradient)
    expected.backward(gradient.double())
    found = {"output": (output, expected)} | {name: (leaves[name].grad, exact[name].grad) for name in wanted}
    return {name: float((own.double() - right).norm() / right.norm()) for name, (own, right) in found.items()}


def cases() -> Iterator[tuple[tuple[int, int, int, int], torch.dtype, set[str], str]]:
    for dtype in DTYPES:
        for shape in SHAPES:
            yield shape, dtype, EVERYTHING, "linear"
    for wanted in ({"b", "d"}, {"x"}, EVERYTHING):
        for kind in ("linear", "residual", "strided", "compiled"):
            yield SHAPES[0], torch.float32, wanted, kind
    yield SHAPES[1], torch.float32, EVERYTHING, "strided"


def main() -> None:
    found: dict[str, float] = {}
    for shape, dtype, wanted, kind in cases():
        for name, error in errors(shape, dtype, wanted, kind).items():
            found[f"{dtype} {shape} {sorted(wanted)} {kind}: {name}"] = error / torch.finfo(dtype).eps
    refused = []
    for other in (torch.float64, torch.float8_e4m3fn):
        try:
            errors(SHAPES[0], other, {"x"}, "residual")
        except TypeError as error:
            refused.append(str(error))
    json.dump({"errors": found, "refused": refused}, sys.stdout)


if __name__ == "__main__":
    main()
