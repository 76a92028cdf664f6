"""How exact gradients are with a half-precision layer and float32 vectors, by route, and what exactness costs.

    python benchmarks/gradients.py

Errors are relative to float64 algebra on the same values: A and B as they are after rounding to the layer's dtype,
which PEFT's VeRA does as well. "A, B" is what that rounding alone changes. The last tables are of ways to compute the
vectors' gradients from x and g; their times are relative to the frozen layer's forward and backward pass.
`gradients_training.py` has the loss curves.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import peft
import torch
from torch import Tensor, nn

import veratune
from common import Benchmark, Case, Table, Target, interleave, median_ratio, new_case, progress
from veratune.layers import plan
from veratune.ops.calibration import device_profile
from veratune.ops.costs import LayerShape
from veratune.ops.planning import RouteChoice, choose_route
from veratune.ops.routes import ROUTES

# (in, out, r, T)
POINTS = (
    (384, 1536, 256, 64),
    (384, 1536, 256, 512),
    (384, 1536, 256, 8192),
    (1536, 384, 1024, 2048),
    (1024, 1024, 256, 2048),
    (4096, 4096, 256, 64),
    (4096, 4096, 256, 512),
)
QUICK_POINTS = ((64, 96, 32, 64),)
COST_POINTS = ((384, 1536, 256, 4096), (1024, 1024, 64, 2048), (4096, 4096, 256, 512))
DTYPES = (torch.bfloat16, torch.float16)
PEFT, ROUNDING = "PEFT VeRA", "A, B"
COMPARED = [name for name, route in ROUTES.items() if not route.keeps_xa]  # the Triton route, which has none
KEY = 0

Gradients = dict[str, Tensor]


@contextmanager
def forced(choice: RouteChoice) -> Iterator[None]:
    """Make adapted layers take one route in this context."""
    chooser = plan.choose
    plan.choose = lambda entry, *_, **__: (choice,) * len(entry.shapes)
    try:
        yield
    finally:
        plan.choose = chooser


class Problem:
    """A layer's values, all of which its dtype can represent but the vectors'."""

    def __init__(self, n: int, m: int, r: int, tokens: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.r, self.dtype = r, dtype
        self.x, self.g = normal(tokens, n).to(dtype), normal(tokens, m).to(dtype)
        self.weight = (normal(m, n) / n**0.5).to(dtype)
        self.b, self.d = 0.1 * normal(m), 0.1 + 0.05 * normal(r)

    def base(self) -> nn.Module:
        base = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, dtype=self.dtype)
        base.weight.data = self.weight
        return nn.Sequential(base).requires_grad_(False)

    def exact(self, a: Tensor, b_projection: Tensor) -> Gradients:
        """Return the gradients in float64 for A (r, in) and B (out, r)."""
        x, b, d = (tensor.double().requires_grad_() for tensor in (self.x, self.b, self.d))
        added = ((x @ a.double().t()) * d @ b_projection.double().t()) * b
        (added + x @ self.weight.double().t()).backward(self.g.double())
        return {"b": b.grad, "d": d.grad, "x": x.grad}

    def of(self, model: nn.Module, layer: nn.Module) -> Gradients:
        b, d = layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]
        assert b.dtype == d.dtype == torch.float32
        with torch.no_grad():
            b.copy_(self.b)
            d.copy_(self.d)
        b.grad = d.grad = None
        x = self.x.clone().requires_grad_()
        model(x).backward(self.g)
        return {"b": b.grad, "d": d.grad, "x": x.grad}


def measure(point: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    """Return the relative errors at one point: of PEFT, of every route, and of rounding the projections."""
    problem = Problem(*point, dtype)
    theirs = peft.get_peft_model(
        problem.base(), peft.VeraConfig(r=problem.r, target_modules=["0"], projection_prng_key=KEY)
    )
    layer = theirs.base_model.model[0]
    a, up = layer.vera_A["default"].detach(), layer.vera_B["default"].detach()
    exact = problem.exact(a, up)
    errors = {PEFT: relative_errors(problem.of(theirs, layer), exact)}
    ours = veratune.get_peft_model(
        problem.base(),
        veratune.VeraConfig(r=problem.r, target_modules=["0"], projection="peft", projection_prng_key=KEY),
    )
    layer = ours.vera_layers()["0"]
    entry = layer.entries["default"]
    drawn, drawn_up = entry.a.drawn(), entry.b[0].drawn().t() * entry.scale
    assert torch.equal(drawn.to(dtype).float(), a.float()), "PEFT's A is not ours rounded"
    errors[ROUNDING] = relative_errors(exact, problem.exact(drawn, drawn_up))
    for route, exactly in itertools.product(COMPARED, (False, True)):
        choice = RouteChoice(route, exact=exactly)
        with forced(choice):
            errors[str(choice)] = relative_errors(problem.of(ours, layer), exact)
    chosen = {"auto": str(choice_at(point, dtype))}
    name = short(dtype)
    return new_case(f"{name} {point}", kind="errors", point=point, dtype=name, errors=errors, **chosen)


def choice_at(point: tuple[int, int, int, int], dtype: torch.dtype) -> RouteChoice:
    profile = device_profile(torch.device("cpu"), dtype)
    return choose_route("auto", "balanced", LayerShape(*point), profile, training=True, wide_vectors=True)


def relative_errors(found: Gradients, exact: Gradients) -> dict[str, float]:
    """Return the norm of each gradient's error relative to the gradient's norm."""
    return {key: float((found[key].double() - exact[key]).norm() / exact[key].norm()) for key in exact}


# What exactness costs: ways to compute P = B * (u^T g), u = x A^T, from which both gradients follow.


def rounded(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
    return (x @ a.t()).t().mm(g).float()


def in_float32(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
    return (x.float() @ a.float().t()).t() @ g.float()


def u_in_two_parts(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """u in float32, split in two for products in the layer's dtype, whose results are rounded."""
    u = x.float() @ a.float().t()
    high = u.to(x.dtype)
    return (high.t() @ g).float() + ((u - high).to(x.dtype).t() @ g).float()


def remainders(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """Products in the layer's dtype alone: each again, less its rounded result, which leaves what was lost."""
    u = x @ a.t()
    lost = torch.addmm(u, x, a.t(), beta=-1).neg_()
    first = u.t() @ g
    second = torch.addmm(first, u.t(), g, beta=-1)
    return first.float() + second.float() - (lost.t() @ g).float()


def weight_gradient(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
    return a.float() @ (g.float().t() @ x.float()).t()


def bf16_mode(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """Multiply float32 tensors in bfloat16, by a setting of the whole process, for which reason it is not used."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        u = x.float() @ a.float().t()
        wide = g.float()
        high = u.to(x.dtype).float()
        return high.t() @ wide + (u - high).t() @ wide
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "in the layer's dtype (rounded)": rounded,
    "in float32 (exact, as used on CPUs)": in_float32,
    "u in two parts, rounded sums": u_in_two_parts,
    "remainders, in the layer's dtype": remainders,
    "g^T x in float32": weight_gradient,
}
FROZEN = "frozen layer"


def cost(point: tuple[int, int, int, int], dtype: torch.dtype, rounds: int) -> Case:
    """Time each way, and compare its result with float64."""
    problem = Problem(*point, dtype)
    a = torch.randn(point[2], point[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = (problem.x.double() @ a.double().t()).t() @ problem.g.double()
    ways = WAYS | ({"float32 with oneDNN's bf16 mode": bf16_mode} if dtype == torch.bfloat16 else {})

    def frozen() -> tuple[Tensor, Tensor]:
        return problem.x @ problem.weight.t(), problem.g @ problem.weight

    work: dict[str, Callable[[], object]] = {FROZEN: frozen}
    errors = {}
    for name, way in ways.items():
        errors[name] = float((way(problem.x, a, problem.g).double() - exact).norm() / exact.norm())
        work[name] = lambda way=way: way(problem.x, a, problem.g)
    seconds = interleave(work, rounds)
    name = short(dtype)
    return new_case(
        f"cost, {name} {point}",
        kind="cost",
        point=point,
        dtype=name,
        errors=errors,
        seconds=seconds,
        auto=str(choice_at(point, dtype)),
    )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tables(cases: list[Case]) -> list[Table]:
    """Return a table of errors for each vector, and one of costs for each point."""
    found = []
    chosen = [case for case in cases if case["kind"] == "errors"]
    for what in ("b", "d", "x") if chosen else ():
        names = list(chosen[0]["errors"])
        rows = [
            (
                "{}, {} -> {}, r = {}, T = {}".format(case["dtype"], *case["point"]),
                *(f"{case['errors'][name][what]:.1e}" for name in names),
                case["auto"],
            )
            for case in chosen
        ]
        found.append(Table(f"relative error of ∂{what}", ("", *names, "chosen"), rows))
    for case in cases:
        if case["kind"] == "cost":
            rows = [
                (name, f"{error:.1e}", f"{median_ratio(case['seconds'], name, FROZEN):.2f}")
                for name, error in case["errors"].items()
            ]
            title = "{}, {} -> {}, r = {}, T = {}".format(case["dtype"], *case["point"])
            title += f" (chosen: {case['auto']})"
            found.append(Table(title, ("uᵀg", "error", "time / frozen layer's step"), rows))
    return found


def targets(cases: list[Case]) -> list[Target]:
    """Return the target of point 4: where exact, errors of float32's size."""
    worst = [
        max(case["errors"][name][what] for name in case["errors"] if "exact" in name for what in "bd")
        / case["point"][3] ** 0.5
        for case in cases
        if case["kind"] == "errors"
    ]
    limit = 2 * torch.finfo(torch.float32).eps
    return [Target("exact routes: largest error of ∂b, ∂d / sqrt(T)", max(worst, default=None), limit)]


BENCHMARK = Benchmark("gradients", tables, targets)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--rounds", type=int, help="of the times; default: 7; quick: 3")
    options = BENCHMARK.parse(parser)
    rounds = options.rounds or (3 if options.quick else 7)
    for point, dtype in itertools.product(QUICK_POINTS if options.quick else POINTS, DTYPES):
        progress(f"gradients: {point}, {dtype}")
        BENCHMARK.finish([measure(point, dtype)], options.output)
    for point, dtype in itertools.product(QUICK_POINTS if options.quick else COST_POINTS, DTYPES):
        progress(f"gradients, cost: {point}, {dtype}")
        BENCHMARK.finish([cost(point, dtype, rounds)], options.output)


if __name__ == "__main__":
    main()
