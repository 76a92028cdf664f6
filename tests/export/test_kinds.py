"""Adapters on every kind of weight as files of the real `peft` package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layer_kinds import Attention, Table, adapted, gpt_oss, llama4, logits, mixtral, seeded
from veratune.layers import VeraParameter

peft = pytest.importorskip("peft")

IMAGE = torch.linspace(-1, 1, 2 * 4 * 36).view(2, 4, 6, 6)
ROWS = torch.tensor([[3, 0, 3], [29, 7, 1]])
X = torch.linspace(-1, 1, 14).view(2, 7)

_EXPORTED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[Any], Tensor]]] = {
    "experts": (mixtral, {}, logits),
    "transposed experts": (gpt_oss, {}, logits),
    "transposed experts without a flag": (
        llama4,
        {"target_modules": None, "target_parameters": ["gate_up_proj"]},
        logits,
    ),
    "router": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}, logits),
    "convolution": (
        seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))),
        {"target_modules": ["0"]},
        lambda m: m(IMAGE),
    ),
    "1-d convolution": (
        seeded(lambda: nn.Sequential(nn.Conv1d(6, 5, 3, stride=2))),
        {"target_modules": ["0"]},
        lambda m: m(IMAGE.flatten(1, 2).view(8, 6, 6)),
    ),
    "embedding": (seeded(Table), {"target_modules": ["table"]}, lambda m: m(ROWS)),
    "parts": (seeded(lambda: nn.Sequential(nn.Linear(7, 12))), {"fused_parts": {"0": [6, 4, 2]}}, lambda m: m(X)),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("kind", _EXPORTED)
def test_lora_exports_give_the_same_outputs_in_peft(kind: str, tmp_path: Path) -> None:
    make, settings, call = _EXPORTED[kind]
    model = adapted(make, **settings)
    model.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    with torch.no_grad():
        expected = call(model)
        assert not torch.allclose(expected, call(make()))
        torch.testing.assert_close(call(theirs), expected, rtol=1e-4, atol=1e-5)


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    grouped = adapted(seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))), target_modules=["0"])
    attention = adapted(seeded(Attention))
    for model, name, reason in ((grouped, "0", "grouped convolution"), (attention, "attn.in_proj_weight", "as one")):
        with pytest.raises(ValueError, match=f"LoRA cannot hold the adapter on {name}: .*{reason}.*Merge the adapter"):
            model.export_lora(tmp_path)
    for make, settings, _ in _EXPORTED.values():
        model = adapted(make, **settings)
        special = next(
            name
            for name, layer in model.vera_layers().items()
            if layer.kind != "linear" or isinstance(layer, VeraParameter) or layer.entries["default"].parts
        )
        with pytest.raises(ValueError, match=f"VeRA cannot hold the adapter on {special}"):
            model.export_peft(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"dilation": 2}, "does not support dilation"), ({"padding_mode": "circular", "padding": 1}, "'circular'")],
)
def test_what_pefts_convolutions_leave_out_is_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = adapted(seeded(lambda: nn.Sequential(nn.Conv1d(4, 6, 3, **settings))), target_modules=["0"])
    with pytest.raises(ValueError, match=f"cannot hold the adapter on 0: .*{reason}"):
        model.export_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


class Twice(nn.Module):
    """One linear layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(7, 7)
        self.other = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.other(self.first(x))))
        return out


@pytest.mark.parametrize("export", ["export_lora", "export_peft"])
def test_a_layer_in_several_places_is_refused(export: str, tmp_path: Path) -> None:
    model = adapted(seeded(Twice), target_modules="all-linear", modules_to_save=[])
    with pytest.raises(ValueError, match=r"first: the model uses this module under several names \(first, second\)"):
        getattr(model, export)(tmp_path / "file")
    assert not (tmp_path / "file").exists()
    alone = adapted(seeded(Twice), target_modules=["other"], modules_to_save=[])
    getattr(alone, export)(tmp_path / "file")
    read = peft.PeftModel.from_pretrained(seeded(Twice)(), tmp_path / "file")
    torch.testing.assert_close(read(X), alone(X))
