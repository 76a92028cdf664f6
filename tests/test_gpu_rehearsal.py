"""`make gpu` on the CPU at toy sizes: every stage runs, its checks hold, and a run that is cut short leaves figures."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("gpu.run")
    finally:
        sys.path.remove(str(BENCHMARKS))


def rehearse(gpu: Any, path: Path, *more: str) -> dict[str, Any]:
    gpu.measure(gpu.options_of(["--rehearse", "--output", str(path), *more]))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.filterwarnings("default")
def test_every_stage_reports_and_its_checks_hold(gpu: Any, tmp_path: Path) -> None:
    found = rehearse(gpu, tmp_path / "gpu.json", "--minutes", "60")
    assert found["finished"] and list(found["stages"]) == list(gpu.STAGES)
    for name, stage in found["stages"].items():
        assert stage["state"] == "done" and stage["cases"], name
        assert (stage["failed"], stage["skipped"]) == ([], []), name
        assert stage["checks_passed"] == stage["checks"], name
    checks = {name: stage["checks"] for name, stage in found["stages"].items()}
    assert checks["bits"] >= 6 and checks["gradients"] >= 60 and checks["tests"] >= 1 and checks["bank"] >= 1
    steps = found["stages"]["steps"]["cases"]
    assert {"frozen", "PEFT LoRA r=8", "PEFT VeRA", "per_dimension auto"} <= set(steps[0]["ratios"])
    assert {"frozen", "per_dimension auto", "blocks auto", "blocks folded"} <= set(steps[1]["ratios"])
    assert {"frozen", "per_dimension auto", "per_dimension mixed", "blocks folded"} <= set(steps[-1]["ratios"])
    assert {"frozen", "per_dimension auto", "frozen, eager"} <= set(found["stages"]["compiled"]["cases"][0]["ratios"])
    assert found["stages"]["calibration"]["cases"][-1]["chooser"]
    errors = [case["relative_error"] for case in found["stages"]["precision"]["cases"]]
    assert all(0 < value < 0.05 for error in errors for value in error.values())


def test_a_wrong_gradient_and_wrong_bits_are_found(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import bits
    from veratune.ops.routes import ROUTES
    from veratune.ops.routes.base import Gradients
    from veratune.projections.schemes import PerDimension

    backward, draw = type(ROUTES["folded"]).backward, PerDimension.draw
    measured = torch.device("cpu")

    def wrong(self: Any, *arguments: Any) -> Gradients:
        grads = backward(self, *arguments)
        return grads._replace(d=None if grads.d is None else grads.d * 1.001)

    def other(self: Any, side: Any, rows: range, width: int, device: torch.device) -> torch.Tensor:
        drawn = draw(self, side, rows, width, device)
        return drawn + (2.0**-24 if device is measured else 0.0)

    monkeypatch.setattr(type(ROUTES["folded"]), "backward", wrong)
    found = rehearse(gpu, tmp_path / "gpu.json", "--minutes", "60", "--stages", "gradients")["stages"]["gradients"]
    routes = [key for key in found["failed"] if key.startswith("(")]
    assert routes and all("folded" in key and "float32" in key for key in routes)
    monkeypatch.setattr(PerDimension, "draw", other)
    stage = gpu.Stage("bits", measured, True, float("inf"), gpu.Report(tmp_path / "bits.json", {}))
    figures = bits.compare(stage, PerDimension(0), 4, (6,))
    assert not figures["passed"] and figures["differing"]


def test_no_time_no_figures_and_the_file_says_so(gpu: Any, tmp_path: Path) -> None:
    found = rehearse(gpu, tmp_path / "gpu.json", "--minutes", "0", "--stages", "bits", "calibration")
    assert found["finished"] and all(stage["skipped"] for stage in found["stages"].values())
    assert not any("passed" in case for stage in found["stages"].values() for case in stage["cases"])


def test_a_stage_that_fails_or_overruns_does_not_stop_the_others(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overrun(_: object) -> None:
        raise gpu.StageOverrun("interrupted after 1 s")

    def fail(_: object) -> None:
        raise RuntimeError("out of memory")

    def work(stage: Any) -> None:
        stage.case("whole", lambda: {"passed": True})
        stage.case("broken", lambda: {}["nothing"])

    stages = {"first": (overrun, 1), "second": (fail, 1), "third": (work, 1)}
    monkeypatch.setattr(gpu, "STAGES", stages)
    found = rehearse(gpu, tmp_path / "gpu.json")["stages"]
    assert found["first"]["state"] == "interrupted after 1 s" and found["second"]["state"].startswith("failed: Runtime")
    assert found["third"]["state"] == "done" and found["third"]["failed"] == ["broken"]
    assert "KeyError" in found["third"]["cases"][1]["error"]
