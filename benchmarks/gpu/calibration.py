"""Stage: the cost model's constants on this device, and what the chooser picks against the measured best route."""

import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from gpu.harness import Figures, Stage, interleave
from gpu.models import DENSE_SCHEME, structured_schemes
from veratune.ops import calibration
from veratune.ops.costs import DeviceProfile, LayerShape
from veratune.ops.factors import Factors
from veratune.ops.linear import adapted_linear
from veratune.ops.planning import RouteChoice, choose_route, possible_choices
from veratune.projections.pool import ProjectionPool
from veratune.projections.schemes import SCHEMES
from veratune.projections.structure import Matrix

SHAPES = ((4096, 4096), (4096, 11008), (2048, 2048), (2048, 8192), (8192, 2048), (2048, 512), (768, 3072), (768, 768))
RANKS = (64, 256, 1024)
TOKENS = (1, 16, 128, 1024, 8192)
DTYPES = (torch.bfloat16, torch.float32)
KINDS = ("training", "forward")
TOLERANCE = 1.05

Profiles = dict[str, DeviceProfile]


def run(stage: Stage) -> None:
    profiles: dict[torch.dtype, Profiles] = {
        dtype: {"built-in": calibration.device_profile(stage.device, dtype)} for dtype in DTYPES
    }

    def measured() -> Figures:
        found = calibrated(stage.device)
        for dtype, profile in found.items():
            profiles[dtype]["calibrated"] = profile
        return {
            "built_in": {str(dtype): asdict(own["built-in"]) for dtype, own in profiles.items()},
            "calibrated": {str(dtype): asdict(profile) for dtype, profile in found.items()},
            "copy_bytes_per_second": copy_bandwidth(stage.device),
            "line": ", ".join(
                f"{d}: {p.flops:.3g}/s, {p.bandwidth:.3g} B/s, {p.launch:.2g} s" for d, p in found.items()
            ),
        }

    stage.case("constants", measured)
    for dtype, (shape, scheme) in itertools.product(DTYPES, points(stage.toy)):
        short = str(dtype).removeprefix("torch.")
        key = f"{shape.in_features}->{shape.out_features} r={shape.r} T={shape.tokens} {scheme} {short}"
        stage.case(key, partial(one_point, stage, shape, scheme, dtype, profiles[dtype]), seconds=1)
    stage.case("summary", lambda: summary(stage.cases))


def points(toy: bool) -> list[tuple[LayerShape, str]]:
    """Return the grid in an order, always the same, of which any beginning has all dimensions about equally often."""
    if toy:
        return [(LayerShape(24, 40, 8, 6), DENSE_SCHEME), (LayerShape(40, 24, 16, 32), DENSE_SCHEME)]
    found = []
    for (n, m), r, tokens in itertools.product(SHAPES, RANKS, TOKENS):
        for scheme in (DENSE_SCHEME, *structured_schemes(r, n, m)):
            own = SCHEMES[scheme].for_layers(0, r, n, m)
            found.append((LayerShape(n, m, r, tokens, density=own.structure("B", r, m).density), scheme))
    random.Random(0).shuffle(found)
    return balanced(found)


def balanced(found: list[tuple[LayerShape, str]]) -> list[tuple[LayerShape, str]]:
    """Order points greedily: next is always the one whose layer, rank, tokens and scheme were seen least."""
    seen: Counter[tuple[object, ...]] = Counter()
    rest, ordered = list(found), []

    def levels(point: tuple[LayerShape, str]) -> list[tuple[object, ...]]:
        shape, scheme = point
        layer = (shape.in_features, shape.out_features)
        own = [("layer", layer), ("rank", shape.r), ("tokens", shape.tokens), ("scheme", scheme)]
        return [*own, ("pair", shape.r, shape.tokens), ("pair", layer, shape.tokens)]

    while rest:
        point = min(rest, key=lambda point: sum(seen[level] for level in levels(point)))
        rest.remove(point)
        seen.update(levels(point))
        ordered.append(point)
    return ordered


def calibrated(device: torch.device) -> dict[torch.dtype, DeviceProfile]:
    """Measure the constants, without using them or keeping them for later."""
    before = dict(calibration._profiles)
    try:
        return calibration.calibrate(device, DTYPES)
    finally:
        calibration._profiles.clear()
        calibration._profiles.update(before)
        calibration.calibration_path().unlink(missing_ok=True)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read and written, of copying a tensor."""
    size = 1 << (20 if device.type == "cpu" else 28)
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / calibration._seconds(lambda: target.copy_(source), device)


class Layer:
    """One layer's tensors on the device."""

    def __init__(self, shape: LayerShape, scheme: str, dtype: torch.dtype, device: torch.device) -> None:
        n, m, r, tokens = shape.in_features, shape.out_features, shape.r, shape.tokens
        self.x = torch.randn(tokens, n, device=device).to(dtype).requires_grad_()
        self.gradient = torch.randn(tokens, m, device=device).to(dtype)
        self.weight = torch.randn(m, n, device=device).to(dtype)
        self.b = torch.full((m,), 0.01, device=device, requires_grad=True)
        self.d = torch.full((r,), 0.1, device=device, requires_grad=True)
        own, pool = SCHEMES[scheme].for_layers(0, r, n, m), ProjectionPool()
        self.views = pool.view(own, "A", r, n), pool.view(own, "B", r, m)
        self.a, self.up = (Matrix(*view.matrix(device, dtype)) for view in self.views)

    def call(self, choice: RouteChoice) -> Tensor:
        factors = Factors(self.a, self.up, self.b, self.d, 1.0)
        return adapted_linear(self.x, self.weight, None, factors, choice)

    def work(self, choice: RouteChoice, kind: str) -> Callable[[], object]:
        if kind == "forward":
            return torch.no_grad()(lambda: self.call(choice))
        return lambda: torch.autograd.grad(self.call(choice), (self.x, self.b, self.d), self.gradient)

    def frozen(self, kind: str) -> Callable[[], object]:
        """Return what the layer does without an adapter."""
        if kind == "forward":
            return torch.no_grad()(lambda: torch.nn.functional.linear(self.x, self.weight))
        return lambda: torch.autograd.grad(torch.nn.functional.linear(self.x, self.weight), self.x, self.gradient)


FROZEN = "frozen"


def near_the_best(seconds: dict[str, float]) -> set[str]:
    """Return the routes that may still turn out to be the fastest, and the frozen layer."""
    best = min((value for name, value in seconds.items() if name != FROZEN), default=0.0)
    return {name for name, value in seconds.items() if value <= 1.5 * best + 5e-5 or name == FROZEN}


def one_point(stage: Stage, shape: LayerShape, scheme: str, dtype: torch.dtype, profiles: Profiles) -> Figures:
    """Time all routes that a configuration may choose at one point."""
    layer = Layer(shape, scheme, dtype, stage.device)
    found: Figures = {"shape": asdict(shape), "scheme": scheme, "dtype": str(dtype), "passed": {}}
    lines = []
    for kind in KINDS:
        training = kind == "training"
        choices = possible_choices(
            "auto", "balanced", shape, training=training, weight_readable=True, profile=profiles["calibrated"]
        )
        works = {FROZEN: layer.frozen(kind)} | {str(choice): layer.work(choice, kind) for choice in choices}
        timing = interleave(works, stage, 5, least_seconds=0.002, keep=near_the_best)
        ms = {name: 1e3 * timing.median(name) for name in timing.times}
        best = min((name for name in ms if name != FROZEN), key=lambda name: ms[name])
        regrets, chosen = {}, {}
        for name, profile in profiles.items():
            choice = str(choose_route("auto", "balanced", shape, profile, training=training))
            chosen[name] = choice
            regrets[name] = ms[choice] / ms[best]
        found[kind] = {"ms": ms, "best": best, "chosen": chosen, "regret": regrets, "errors": timing.errors}
        picks = ", ".join(f"{name} {chosen[name]} {value:.2f}" for name, value in regrets.items())
        lines.append(f"{kind}: best {best} {ms[best]:.3f} ms (frozen {ms[FROZEN]:.3f}); {picks}")
    return found | {"line": " | ".join(lines)}


def summary(cases: list[Figures]) -> Figures:
    """Return, for each kind, dtype and profile, how many choices are within 5 % of the best."""
    measured = [case for case in cases if "training" in case]
    found = {}
    for kind, dtype in itertools.product(KINDS, sorted({case["dtype"] for case in measured})):
        own = [case[kind]["regret"] for case in measured if case["dtype"] == dtype]
        for profile in own[0]:
            regrets = [regret[profile] for regret in own if profile in regret]
            good = sum(regret <= TOLERANCE for regret in regrets) / len(regrets)
            mean = statistics.geometric_mean(regrets)
            found[f"{kind}, {dtype}, {profile}"] = {
                "points": len(regrets),
                "within_5_percent": good,
                "mean": mean,
                "worst": max(regrets),
            }
    line = "; ".join(
        f"{name}: {100 * own['within_5_percent']:.0f} %, worst {own['worst']:.2f}" for name, own in found.items()
    )
    return {"chooser": found, "line": line}
