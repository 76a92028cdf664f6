"""The chooser against the measured best of all routes, for a forward pass and for a training step of one layer.

    python benchmarks/choice.py --budget 240

Every route that `possible_choices` allows is measured at points (in, out, r, T); those that take half as long
again as the fastest, and 4 ms more, when warm are measured once only. The choice is made with the built-in constants,
and with those that `veratune.calibrate` measures on this machine. It counts as good within 5 % of the best.
"""

import itertools
import random
import statistics
import time
from collections.abc import Iterable

import torch
from torch import Tensor

import veratune
from common import Benchmark, Case, Table, Target, Times, Work, interleave, new_case, progress
from veratune.ops.calibration import device_profile
from veratune.ops.costs import LayerShape
from veratune.ops.factors import Factors
from veratune.ops.linear import adapted_linear
from veratune.ops.planning import RouteChoice, choose_route, possible_choices
from veratune.projections.structure import Matrix

SHAPES = (
    (384, 384),
    (384, 1536),
    (1536, 384),
    (768, 768),
    (768, 3072),
    (3072, 768),
    (2048, 2048),
    (2048, 5632),
)
RANKS = (64, 256, 1024)
TOKENS = (1, 8, 64, 512, 2048)
LARGEST = 5e9  # in * out * T
KINDS = ("forward", "training")
PROFILES = ("built-in", "calibrated")
TOLERANCE = 1.05


def all_points() -> list[LayerShape]:
    """Return the grid in an order that is random but always the same, so that any beginning of it is a fair sample."""
    grid = [LayerShape(n, m, r, tokens) for (n, m), r, tokens in itertools.product(SHAPES, RANKS, TOKENS)]
    points = [point for point in grid if point.in_features * point.out_features * point.tokens <= LARGEST]
    random.Random(0).shuffle(points)
    return points


class Layer:
    """One layer's tensors, on which any route can run."""

    def __init__(self, shape: LayerShape, dtype: torch.dtype) -> None:
        n, m, r, tokens = shape.in_features, shape.out_features, shape.r, shape.tokens

        def random_tensor(*size: int) -> Tensor:
            return torch.randn(size).to(dtype)

        self.x = random_tensor(tokens, n).requires_grad_()
        self.gradient = random_tensor(tokens, m)
        self.weight = random_tensor(m, n)
        self.projections = Matrix(random_tensor(r, n)), Matrix(random_tensor(r, m))
        self.b = torch.full((m,), 0.01, requires_grad=True)
        self.d = torch.full((r,), 0.1, requires_grad=True)

    def run(self, choice: RouteChoice) -> Tensor:
        """Return the layer's output, computed by a route."""
        return adapted_linear(self.x, self.weight, None, Factors(*self.projections, self.b, self.d, 1.0), choice)

    def work(self, choice: RouteChoice, kind: str) -> Work:
        """Return a function that runs a route, forward only or forward and backward."""
        if kind == "forward":
            return torch.no_grad()(lambda: self.run(choice))
        return lambda: torch.autograd.grad(self.run(choice), (self.x, self.b, self.d), self.gradient)


def near_the_best(seconds: dict[str, float]) -> set[str]:
    """Return the routes that may still turn out to be the fastest; a short run may have been held up."""
    limit = 1.5 * min(seconds.values()) + 0.004
    return {name for name, value in seconds.items() if value <= limit}


def measure(shape: LayerShape, dtype_name: str, rounds: int) -> Case:
    """Time all routes of one point."""
    n, m, r, tokens = shape.in_features, shape.out_features, shape.r, shape.tokens
    key = f"{n}->{m} r={r} T={tokens} {dtype_name}"
    case = new_case(key, shape=[n, m], r=r, tokens=tokens, dtype=dtype_name, chosen={})
    layer = Layer(shape, getattr(torch, dtype_name))
    for kind in KINDS:
        choices = possible_choices("auto", "balanced", shape, training=kind == "training", weight_readable=True)
        works = {str(choice): layer.work(choice, kind) for choice in choices}
        case[kind] = interleave(works, rounds, least_seconds=0.005, worth_repeating=near_the_best)
    return case


def choose(cases: list[Case], profile_name: str) -> None:
    """Record in each case the route chosen with the current constants."""
    for case in cases:
        profile = device_profile(torch.device("cpu"), getattr(torch, case["dtype"]))
        shape = LayerShape(*case["shape"], case["r"], case["tokens"])
        case["chosen"][profile_name] = {
            kind: str(choose_route("auto", "balanced", shape, profile, training=kind == "training")) for kind in KINDS
        }


def regret(case: Case, kind: str, profile: str) -> float:
    """Return the time of the chosen route relative to the best one's."""
    times: Times = case[kind]
    medians = {route: statistics.median(values) for route, values in times.items()}
    return medians[case["chosen"][profile][kind]] / min(medians.values())


def tables(cases: list[Case]) -> list[Table]:
    """Return a summary and all points."""
    return [_summary(cases), *(_points(cases, kind) for kind in KINDS)]


def _summary(cases: list[Case]) -> Table:
    rows = []
    for profile, kind, dtype in itertools.product(PROFILES, KINDS, sorted({case["dtype"] for case in cases})):
        values = [regret(case, kind, profile) for case in cases if case["dtype"] == dtype]
        good = sum(value <= TOLERANCE for value in values)
        mean = statistics.geometric_mean(values)
        rows.append(
            (
                f"{kind}, {dtype}, {profile} constants",
                str(len(values)),
                f"{100 * good / len(values):.0f} %",
                f"{mean:.3f}",
                f"{max(values):.2f}",
            )
        )
    return Table("All points", ("", "points", "within 5 % of the best", "mean", "worst"), rows)


def _points(cases: list[Case], kind: str) -> Table:
    rows = []
    for case in sorted(cases, key=lambda case: (case["dtype"], list(case["shape"]), case["r"], case["tokens"])):
        medians = {route: statistics.median(values) for route, values in case[kind].items()}
        best = min(medians, key=lambda route: medians[route])
        chosen = [f"{case['chosen'][profile][kind]} ({regret(case, kind, profile):.2f})" for profile in PROFILES]
        rows.append((case["key"], best, f"{1e3 * medians[best]:.3g}", *chosen))
    header = ("", "best route", "its ms", "chosen (time relative to the best)", "chosen after calibrate")
    return Table(f"Points, {kind}", header, rows)


def targets(cases: list[Case]) -> list[Target]:
    """Return the targets, on all points."""
    found = [Target("points measured", len(cases), 60, at_least=True)]
    for profile, kind in itertools.product(PROFILES, KINDS):
        values = [regret(case, kind, profile) for case in cases]
        share = 100 * sum(value <= TOLERANCE for value in values) / len(values)
        found.append(
            Target(f"{kind}, {profile} constants: choice within 5 % of the best", share, 100, at_least=True, unit=" %")
        )
    return found


BENCHMARK = Benchmark("choice", tables, targets)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--points", type=int, help="how many points at most; quick: 12")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32",))
    parser.add_argument("--rounds", type=int, help="default: 7; quick: 5")
    parser.add_argument("--budget", type=float, default=float("inf"), help="begin no point after so many seconds")
    options = BENCHMARK.parse(parser)
    points = all_points()[: options.points or (12 if options.quick else None)]
    cases = measure_within(
        options.budget, itertools.product(points, options.dtypes), options.rounds or (5 if options.quick else 7)
    )
    choose(cases, "built-in")
    progress("choice: calibrating")
    veratune.calibrate()
    choose(cases, "calibrated")
    BENCHMARK.finish(cases, options.output)


def measure_within(budget: float, points: Iterable[tuple[LayerShape, str]], rounds: int) -> list[Case]:
    """Measure points until the time is spent."""
    end = time.monotonic() + budget
    cases = []
    for shape, dtype in points:
        if time.monotonic() > end:
            progress("choice: the time is spent")
            break
        cases.append(measure(shape, dtype, rounds))
        progress(f"choice: {len(cases)}: {cases[-1]['key']}")
    return cases


if __name__ == "__main__":
    main()
