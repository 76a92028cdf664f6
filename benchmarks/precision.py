"""How exact the gradients of b and d are in half precision: relative errors against float64, compared with PEFT's.

    python benchmarks/precision.py

All have the same weights, projections and vectors, which half precision can represent, so that only the computation
differs. "Vectors float32" is what both libraries do by default with a layer in half precision; PEFT then converts the
input and computes its products in float32, while veratune's are in half precision and its sums over them in float32.

A target of 1.1 stands for "no worse": the error of a gradient of 256 numbers is itself known to some 5 %.
"""

import itertools
from contextlib import nullcontext

import peft
import torch
from torch import Tensor, nn

import veratune
from common import Benchmark, Case, Table, Target, new_case, progress

POINTS = ((384, 1536, 256, 4096), (1536, 384, 256, 4096), (768, 768, 1024, 512), (2048, 2048, 256, 16))
DTYPES = ("bfloat16", "float16")
SETTINGS = {
    "half": "half layer, vectors half",
    "float32": "half layer, vectors float32",
    "autocast": "float32 layer under autocast",
}
PEFT, OURS, FACTORED, DENSE = "PEFT", "veratune", "route=factored", "route=dense"
ROUTES = {OURS: "auto", FACTORED: "factored", DENSE: "dense"}
KEY = 0

Gradients = dict[str, Tensor]


class Problem:
    """A layer, its input and output's gradient, and vectors that an adapter may have learned."""

    def __init__(self, n: int, m: int, r: int, tokens: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype).float()

        self.r, self.dtype = r, dtype
        self.x, self.gradient = normal(tokens, n), normal(tokens, m)
        self.weight = (normal(m, n) / n**0.5).to(dtype).float()
        self.b = (0.1 * normal(m)).to(dtype).float()
        self.d = (0.1 + 0.05 * normal(r)).to(dtype).float()

    def reference(self, a: Tensor, b_projection: Tensor) -> Gradients:
        """Return the gradients in float64; the frozen part of the layer has no share in them."""
        b, d = (vector.double().requires_grad_() for vector in (self.b, self.d))
        added = ((self.x.double() @ a.double().t()) * d @ b_projection.double().t()) * b
        added.backward(self.gradient.double())
        return {"b": b.grad, "d": d.grad}

    def gradients(self, name: str, setting: str) -> tuple[Gradients, tuple[Tensor, Tensor]]:
        """Return the gradients as a library computes them, and A and B if they are PEFT's."""
        weight_dtype = torch.float32 if setting == "autocast" else self.dtype
        base = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False)
        base.weight.data = self.weight.to(weight_dtype)
        wide = setting != "half"
        projections = ()
        if name == PEFT:
            config = peft.VeraConfig(r=self.r, target_modules=["0"], projection_prng_key=KEY)
            layer = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=wide).base_model.model[0]
            projections = layer.vera_A["default"], layer.vera_B["default"]
        else:
            config = veratune.VeraConfig(
                r=self.r, target_modules=["0"], projection="peft", projection_prng_key=KEY, route=ROUTES[name]
            )
            model = veratune.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=wide)
            layer = model.base_model[0]
        vectors = {"b": layer.vera_lambda_b["default"], "d": layer.vera_lambda_d["default"]}
        vectors["b"].data.copy_(self.b)
        vectors["d"].data.copy_(self.d)
        x = self.x.to(weight_dtype).requires_grad_()
        with torch.autocast("cpu", self.dtype) if setting == "autocast" else nullcontext():
            output = layer(x)
        output.backward(self.gradient.to(output.dtype))
        return {key: vector.grad for key, vector in vectors.items()}, projections


def measure(point: tuple[int, int, int, int], dtype_name: str, setting: str) -> Case:
    """Compute the relative errors at one point."""
    n, m, r, tokens = point
    problem = Problem(n, m, r, tokens, getattr(torch, dtype_name))
    found, projections = problem.gradients(PEFT, setting)
    exact = problem.reference(*projections)
    errors = {PEFT: relative_errors(found, exact)}
    for name in ROUTES:
        errors[name] = relative_errors(problem.gradients(name, setting)[0], exact)
    key = f"{dtype_name}, {n}->{m} r={r} T={tokens}, {setting}"
    return new_case(key, point=point, dtype=dtype_name, setting=setting, errors=errors)


def relative_errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Return the norm of each gradient's error relative to the gradient's norm."""
    return {key: float((found[key].double() - exact[key]).norm() / exact[key].norm()) for key in exact}


def tables(cases: list[Case]) -> list[Table]:
    """Return a table for each setting."""
    return [
        _table(title, chosen)
        for setting, title in SETTINGS.items()
        if (chosen := [case for case in cases if case["setting"] == setting])
    ]


def _table(title: str, cases: list[Case]) -> Table:
    rows = [
        (
            "{}, {} -> {}, r = {}, T = {}".format(case["dtype"], *case["point"]),
            *(f"{case['errors'][name][vector]:.1e}" for vector in "bd" for name in case["errors"]),
        )
        for case in cases
    ]
    names = list(cases[0]["errors"])
    return Table(title, ("", *(f"∂{vector}: {name}" for vector in "bd" for name in names)), rows)


def targets(cases: list[Case]) -> list[Target]:
    """Return the targets: errors no larger than PEFT's, here as the largest ratio of any point."""
    return [
        Target(f"{title}: largest error of ∂{vector} relative to PEFT's", _worst(cases, setting, vector), 1.1)
        for setting, title in SETTINGS.items()
        for vector in "bd"
    ]


def _worst(cases: list[Case], setting: str, vector: str) -> float | None:
    ratios = [
        case["errors"][OURS][vector] / case["errors"][PEFT][vector] for case in cases if case["setting"] == setting
    ]
    return max(ratios, default=None)


BENCHMARK = Benchmark("precision", tables, targets)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    options = BENCHMARK.parse(parser)
    points = POINTS[2:] if options.quick else POINTS
    cases = []
    for point, dtype, setting in itertools.product(points, DTYPES, SETTINGS):
        progress(f"precision: {point}, {dtype}, {setting}")
        cases.append(measure(point, dtype, setting))
    BENCHMARK.finish(cases, options.output, keep=False)


if __name__ == "__main__":
    main()
