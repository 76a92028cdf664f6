"""Fit the cost model's constants to the routes' times in a file of `make gpu`. Runs anywhere, without a GPU.

    PYTHONPATH=src:benchmarks python -m gpu.fit benchmarks/results/gpu_<device>.json

Each case of one layer gives the times of several routes. What counts is the regret: how much longer the route takes
that the model chooses than the fastest one. Among constants of equal regret those win that predict better how much
longer each route takes than the fastest.
"""

import argparse
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from veratune.ops.calibration import device_profile
from veratune.ops.costs import DeviceProfile, LayerShape
from veratune.ops.planning import RouteChoice, estimate
from veratune.ops.routes import ROUTES

TOLERANCE = 1.05
WEIGHT_OF_ERRORS = 0.1
# Rates stay near the measured ones: with few tokens any rate fits, and would take over what launches explain.
RATE_STEPS = (0.7, 0.84, 1.0, 1.2, 1.4)
LAUNCH_STEPS = (0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8, 1.0, 1.1, 1.25, 1.6, 2.2)
_LAYER = re.compile(r"(\d+)->(\d+) r=(\d+) T=(\d+)$")


@dataclass(frozen=True)
class Case:
    """The measured milliseconds of one layer's routes, all in the same conditions.

    Attributes:
        source: the stage, and "forward" or "training".
        shape: the call.
        dtype: the compute dtype.
        training: whether vectors' gradients were computed.
        ms: the time of each route.
    """

    source: str
    shape: LayerShape
    dtype: str
    training: bool
    ms: dict[RouteChoice, float]


def cases_of(report: dict[str, Any]) -> Iterator[Case]:
    """Yield the cases of single layers: of the stages "calibration", "steps" and "graphs"."""
    stages = report["stages"]
    for case in stages.get("calibration", {}).get("cases", []):
        for kind in ("training", "forward"):
            if kind in case:
                numbers = {name: value for name, value in case["shape"].items() if name != "key"}
                if "rank" in numbers:  # an older report
                    numbers["r"] = numbers.pop("rank")
                ms = routes_of(case[kind]["ms"])
                if len(ms) > 1:
                    yield Case(f"calibration, {kind}", LayerShape(**numbers), case["dtype"], kind == "training", ms)
    layers = [(name, case) for name in ("steps", "graphs") for case in stages.get(name, {}).get("cases", [])]
    for stage, case in layers:
        found = _LAYER.match(case["key"])
        if found is None or "ms" not in case:
            continue
        n, m, r, tokens = map(int, found.groups())
        medians = {name: value[1] for name, value in case["ms"].items()}
        dense = {name.split(" ", 1)[1]: value for name, value in medians.items() if name.startswith("per_dimension ")}
        ms = routes_of(dense)
        if len(ms) > 1:
            yield Case(stage, LayerShape(n, m, r, tokens), "torch.bfloat16", True, ms)


def routes_of(ms: dict[str, float]) -> dict[RouteChoice, float]:
    """Return the times of those names that are routes."""
    names = {str(choice): choice for choice in (RouteChoice(route, keep) for route in ROUTES for keep in (False, True))}
    return {names[name]: value for name, value in ms.items() if name in names}


def regret(case: Case, profile: DeviceProfile) -> tuple[float, float]:
    """Return the time of the chosen route relative to the fastest one's, and the error of the predicted differences."""
    predicted = {
        choice: 1e3 * estimate(choice, case.shape, profile, training=case.training).seconds for choice in case.ms
    }
    chosen = min(predicted, key=lambda choice: predicted[choice])
    best = min(case.ms, key=lambda choice: case.ms[choice])
    # What the layer takes without an adapter is in the times, and in no estimate: differences are free of it.
    errors = [
        abs((predicted[choice] - predicted[best]) - (case.ms[choice] - case.ms[best])) / case.ms[best]
        for choice in case.ms
        if choice != best
    ]
    return case.ms[chosen] / case.ms[best], statistics.fmean(errors)


def loss(cases: list[Case], profile: DeviceProfile) -> float:
    found = [regret(case, profile) for case in cases]
    return statistics.fmean(math.log(ratio) + WEIGHT_OF_ERRORS * min(error, 1.0) for ratio, error in found)


def fit(cases: list[Case], start: DeviceProfile) -> DeviceProfile:
    """Return the constants with the smallest loss on a grid around `start`."""
    grid = (
        replace(start, flops=start.flops * flops, bandwidth=start.bandwidth * bandwidth, launch=start.launch * launch)
        for flops, bandwidth, launch in itertools.product(RATE_STEPS, RATE_STEPS, LAUNCH_STEPS)
    )
    return min(grid, key=lambda profile: loss(cases, profile))


def measured_profile(report: dict[str, Any], dtype: str, otherwise: DeviceProfile) -> DeviceProfile:
    """Return the constants that the stage "calibration" has measured."""
    for case in report["stages"].get("calibration", {}).get("cases", []):
        if case["key"] == "constants" and dtype in case.get("calibrated", {}):
            return DeviceProfile(**case["calibrated"][dtype])
    return otherwise


def described(cases: list[Case], profile: DeviceProfile) -> str:
    ratios = [regret(case, profile)[0] for case in cases]
    good = sum(ratio <= TOLERANCE for ratio in ratios) / len(ratios)
    return f"{100 * good:3.0f} % within 5 %, mean {statistics.geometric_mean(ratios):.3f}, worst {max(ratios):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    report = json.loads(options.file.read_text(encoding="utf-8"))
    cases = list(cases_of(report))
    # Launches from Python and those of a replayed graph take different times.
    for dtype, replayed in itertools.product(sorted({case.dtype for case in cases}), (False, True)):
        own = [case for case in cases if case.dtype == dtype and (case.source == "graphs") == replayed]
        if not own:
            continue
        before = device_profile(torch.device("cuda"), getattr(torch, dtype.removeprefix("torch.")))
        measured = measured_profile(report, dtype, before)
        profiles = {"built-in": before, "calibrated": measured, "fitted": fit(own, measured)}
        print(f"{report['device']}, {dtype}, {'replayed graphs' if replayed else 'eager'}, {len(own)} cases")
        for name, profile in profiles.items():
            print(f"  {name}: {profile.flops:.3g}/s, {profile.bandwidth:.3g} B/s, launch {profile.launch:.2g} s")
            for source in ("all", *sorted({case.source for case in own})):
                part = [case for case in own if source in ("all", case.source)]
                print(f"    {source:22} {len(part):3} cases: {described(part, profile)}")


if __name__ == "__main__":
    main()
