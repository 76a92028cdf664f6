"""The Triton kernel, in Triton's interpreter on the CPU, and where its route is chosen."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from veratune.ops.calibration import device_profile
from veratune.ops.costs import LayerShape
from veratune.ops.planning import choose_route, possible_choices

# Where `make test` puts the package, apart from the environment: others behave differently where they can import it.
PACKAGE = Path(sys.prefix) / "triton"
LAYER = LayerShape(4096, 4096, 256, 2048)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux alone")
def test_the_kernel_against_float64() -> None:
    """Outputs and gradients are as exact as the dtype: a few roundings, whatever the sizes, strides and dtypes."""
    script = Path(__file__).parents[1] / "helpers" / "interpreted_kernel.py"
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(PACKAGE)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    errors = found["errors"]
    assert len(errors) > 60 and len(set(errors.values())) > 50
    assert len(found["refused"]) == 2 and all("needs a single dtype" in message for message in found["refused"])
    assert {name: error for name, error in errors.items() if not error < 6.0} == {}


def test_it_takes_part_only_where_it_was_measured_and_is_chosen_only_where_it_is_faster() -> None:
    profile = device_profile(torch.device("cuda"), torch.bfloat16)

    def chosen(flops: float, shape: LayerShape = LAYER) -> str:
        measured = replace(profile, triton_flops=flops)
        return choose_route("factored", "balanced", shape, measured, training=True).route

    names = [c.route for c in possible_choices("auto", "balanced", LAYER, training=True, weight_readable=True)]
    assert "triton" not in names and chosen(0.0) != "triton"
    low = possible_choices(
        "auto", "low", LAYER, training=True, weight_readable=True, profile=replace(profile, triton_flops=1.0)
    )
    # It keeps x A^T, so that the backward pass has no use for the input.
    assert {c.route: c.input_again for c in low}["triton"] is False and any(c.input_again for c in low)
    assert chosen(profile.flops / 100) != "triton"
    assert chosen(profile.flops) == "triton"
    assert chosen(profile.flops, replace(LAYER, r=257)) != "triton"
    assert chosen(profile.flops, replace(LAYER, density=0.5)) != "triton"
