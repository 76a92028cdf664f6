"""The way of an input through an adapted linear layer: each function once, the route decided once."""

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import randomise
from veratune import VeraConfig, VeraModel, get_peft_model


def holds(value: Any, storage: int) -> bool:
    if isinstance(value, tuple):
        return any(holds(part, storage) for part in value)
    return isinstance(value, Tensor) and value.untyped_storage().data_ptr() == storage


def walk(model: VeraModel, x: Tensor) -> list[str]:
    """Return the functions of `layers` and `ops` that are given x, or a view of it, by a function of another file."""
    found: list[str] = []
    storage = x.untyped_storage().data_ptr()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code, caller = frame.f_code, frame.f_back
        path = code.co_filename.rpartition("/veratune/")[2]
        if event != "call" or not path.startswith(("layers/", "ops/")) or "/<" in path:
            return
        if caller is not None and caller.f_code.co_filename == code.co_filename:
            return
        arguments = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        if any(holds(value, storage) for value in arguments):
            found.append(f"{path.removesuffix('.py')}.{code.co_name}")

    sys.setprofile(note)
    try:
        model(x)
    finally:
        sys.setprofile(None)
    return found


def adapted(adapters: int = 1, **settings: Any) -> VeraModel:
    wanted = VeraConfig(r=4, target_modules="all-linear", **settings)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 12)), wanted)
    for number in range(1, adapters):
        model.add_adapter(f"other_{number}", wanted)
    model.set_adapter(list(model.peft_config))
    randomise(model)
    model(torch.randn(5, 16)).sum().backward()  # draws the projections and fills the tables
    return model


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_an_input_passes_each_file_once(route: str) -> None:
    rooms = [name.rpartition(".")[0] for name in walk(adapted(route=route), torch.randn(5, 16))]
    assert {"layers/linear", "layers/plan", "ops/linear"} < set(rooms)
    assert all(rooms.count(room) == 1 for room in set(rooms) - {"ops/factors"}), rooms


@pytest.mark.parametrize(
    ("settings", "adapters"),
    [({}, 1), ({}, 2), ({"fused_parts": {"0": 3}}, 1), ({"fused_parts": {"0": 3}, "route": "dense"}, 1)],
)
def test_the_route_is_decided_once(settings: dict[str, Any], adapters: int) -> None:
    passed = walk(adapted(adapters, **settings), torch.randn(5, 16))
    assert [name for name in passed if name.startswith("layers/plan")] == ["layers/plan.plan_linear"]


def test_a_layer_without_active_adapters_passes_its_input_on() -> None:
    model = adapted()
    model.set_adapter([])
    assert walk(model, torch.randn(5, 16)) == ["layers/linear.forward"]
