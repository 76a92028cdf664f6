"""The table of a model's weights: what adapts each, and why nothing does."""

import pytest
import torch
from torch import nn

import veratune
from layer_kinds import Attention, llama4, mixtral
from tiny_models import tiny_model
from veratune import VeraConfig, get_peft_model, supported


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.conv = nn.Conv2d(3, 4, 2)
        self.back = nn.ConvTranspose2d(4, 3, 2)
        self.linear = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.bilinear = nn.Bilinear(2, 3, 4)


def test_each_weight_is_named_with_its_kind_and_what_adapts_it() -> None:
    rows = {info.name: (info.kind, info.shape, info.by) for info in supported(Zoo())}
    assert rows["table.weight"] == ("embedding", (10, 4), "target_modules")
    assert rows["conv.weight"] == ("convolution", (4, 3, 2, 2), "target_modules")
    assert rows["linear.weight"] == ("linear", (8, 4), "all-linear")
    assert rows["linear.bias"] == ("vector", (8,), "bias")
    assert rows["attention.in_proj_weight"] == ("parameter", (24, 8), "all-linear")
    assert rows["attention.out_proj.weight"] == ("linear", (8, 8), "all-linear")
    assert rows["attention.in_proj_bias"] == ("vector", (24,), "")
    assert rows["norm.weight"] == ("vector", (8,), "")
    assert rows["position"] == ("parameter", (1, 5, 8), "target_parameters")
    refused = {info.name: info.why_not for info in supported(Zoo()) if not info.adaptable and info.kind != "vector"}
    assert set(refused) == {"back.weight", "bilinear.weight"}
    assert "ConvTranspose2d does not use it as a matrix" in refused["back.weight"]
    assert len(rows) == len(dict(Zoo().named_parameters()))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit", "mixtral"])
def test_the_table_says_what_get_peft_model_does(kind: str) -> None:
    """Each weight that the table gives to all-linear is adapted by it, and no other one is."""
    model = tiny_model(kind)
    table = {info.name for info in supported(model) if info.by == "all-linear"}
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {info.name: info.shape for info in supported(model)} == before
    adapted = get_peft_model(model, VeraConfig(r=2, target_modules="all-linear"))
    layers = {name if name in before else f"{name}.weight" for name in adapted.vera_layers()}
    assert layers == table
    assert {info.name for info in supported(adapted.base_model) if info.by == "all-linear"} == table
    assert "classifier.weight" not in table  # the new head, trained in full


def test_every_weight_that_is_adaptable_by_name_can_be_adapted() -> None:
    for info in supported(Zoo()):
        names = (
            {"target_parameters": [info.name]}
            if info.by == "target_parameters"
            else {"target_modules": [info.name.rpartition(".")[0]]}
        )
        if info.adaptable:
            layers = get_peft_model(Zoo(), VeraConfig(r=2, **names)).vera_layers()
            assert {info.name.removesuffix(".weight"), info.name} & set(layers)


def test_coverage_is_the_share_of_matrix_elements() -> None:
    table = supported(Attention())
    assert table.coverage() == 1.0
    model = mixtral()
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
    linear = sum(size for name, size in matrices.items() if "proj" in name)
    assert supported(model).coverage(("all-linear",)) == pytest.approx(linear / sum(matrices.values()))
    assert supported(model).coverage() == 1.0
    assert supported(nn.ReLU()).coverage() == 0.0
    assert all(info.by for info in supported(llama4()) if info.kind != "vector")


def test_printing() -> None:
    lines = str(veratune.supported(Zoo())).splitlines()
    assert lines[0].split() == ["weight", "kind", "module", "shape", "adapted", "by"]
    assert any("back.weight" in line and "nothing: ConvTranspose2d" in line for line in lines)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(3, 4))])
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) @ sum(weight for weight in self.weights).T


def test_lists_of_parameters_are_refused_and_computed_weights_counted_once() -> None:
    table = supported(Listed())
    assert [(info.name, info.by) for info in table if info.kind != "vector"] == [
        ("weights.0", ""),
        ("linear", "all-linear"),
    ]
    with pytest.raises(veratune.TargetError, match="is in a ParameterList, whose owner reads it"):
        get_peft_model(Listed(), VeraConfig(r=2, target_parameters=["weights.0"]))
