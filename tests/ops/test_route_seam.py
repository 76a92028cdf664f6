"""A route is one class and one line in `ROUTES`: a toy is planned, explained, computed and differentiated."""

import pytest
import torch
from torch import Tensor, nn

from dense import check_against_dense
from reference import randomise
from veratune import VeraConfig, get_peft_model
from veratune.ops import planning
from veratune.ops.costs import Cost, DeviceProfile, LayerShape
from veratune.ops.routes import ROUTES, Gradients, LinearInputs, MemoryName, Wanted
from veratune.ops.routes.folded import Folded


class Free(Folded):
    """The folded route, which claims to cost nothing, so that it is always chosen. It keeps C."""

    name = "free"
    keeps = "C"
    calls: tuple[str, ...] = ()

    def worth_keeping(self, shape: LayerShape, memory: MemoryName, *, training: bool, backward: bool) -> bool:
        return training

    def forward(self, inputs: LinearInputs, keep: bool) -> tuple[Tensor, Tensor | None]:
        type(self).calls += ("forward",)
        return super().forward(inputs, keep)[0], inputs.factors.folded().values if keep else None

    def backward(
        self, g: Tensor, inputs: LinearInputs, kept: Tensor | None, wanted: Wanted, weight_gradient: Tensor | None
    ) -> Gradients:
        type(self).calls += ("backward",)
        assert kept is not None and torch.equal(kept, inputs.factors.folded().values)
        return super().backward(g, inputs, kept, wanted, weight_gradient)

    def cost(self, cost: Cost, shape: LayerShape, *, training: bool, backward: bool, keep: bool) -> None:
        pass


class Elsewhere(Free):
    """The same for devices that this test has none of."""

    name = "elsewhere"

    def available(self, profile: DeviceProfile, shape: LayerShape) -> bool:
        return profile.device_type == "cuda"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTES, "elsewhere", Elsewhere())
    monkeypatch.setitem(ROUTES, "free", Free())
    monkeypatch.setattr(Free, "calls", ())
    # Tables that were made without the toys, and those with them, must not meet.
    monkeypatch.setattr(planning, "route_table", planning.route_table.__wrapped__)


def test_it_is_chosen_explained_computed_and_differentiated() -> None:
    def base() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    model = get_peft_model(base(), VeraConfig(r=3, target_modules="all-linear"))
    randomise(model, scale=0.4)
    x = torch.randn(5, 6, dtype=torch.float64)
    check_against_dense(base, model, lambda net: net(x))
    assert {"forward", "backward"} == set(Free.calls)
    table = model.explain_routes(5)
    assert [str(routes.chosen.choice) for routes in table] == ["free, C kept"] * 2
    assert "free" in str(table) and "elsewhere" not in str(table)
