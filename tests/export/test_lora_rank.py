"""LoRA exports of another rank, and for vLLM: the same products, or a refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from exported import adapted, deltas
from layer_kinds import Table, mixtral, seeded
from reference import relative
from tiny_models import main_output, tiny_model
from veratune import VeraModel
from veratune.export.vllm import max_lora_rank

peft = pytest.importorskip("peft")


def products(directory: Path) -> dict[str, torch.Tensor]:
    """Return lora_B lora_A (alpha / r) of each linear layer in float64."""
    tensors = load_file(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    found = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")]
            assert a.shape[0] == b.shape[1] == config["r"]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{name}.weight"] = b.double() @ a.double() * (config["lora_alpha"] / config["r"])
    return found


def half_of_d(model: VeraModel) -> None:
    """Let half of the terms of all layers be zero, others of each."""
    with torch.no_grad():
        for i, layer in enumerate(model.vera_layers().values()):
            _, d = layer.vectors("default").values()
            d[(torch.arange(len(d)) + i) % 2 == 0] = 0


def most_of_b(model: VeraModel) -> None:
    with torch.no_grad():
        for layer in model.vera_layers().values():
            b, _ = layer.vectors("default").values()
            b[3:-2] = 0


def nothing(model: VeraModel) -> None:
    pass


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize(
    ("settings", "change", "rank"),
    [
        ({"r": 6}, nothing, 8),  # filled up
        ({"r": 6, "rank_pattern": {"v_proj": 3}}, nothing, 8),
        ({"r": 6}, nothing, 6),
        ({"r": 12}, half_of_d, 6),
        ({"r": 20, "target_modules": ["k_proj", "v_proj", "q_proj"]}, nothing, 16),  # as many as inputs
        ({"r": 20, "target_modules": ["k_proj", "v_proj"]}, nothing, 8),  # as many as outputs
        ({"r": 20}, most_of_b, 5),
        ({"r": 20, "fused_parts": {"gate_proj": 2}, "target_modules": ["gate_proj"]}, nothing, 17),
    ],
)
def test_another_rank_has_the_same_product(
    settings: dict[str, Any], change: Callable[[VeraModel], None], rank: int, tmp_path: Path
) -> None:
    model = adapted(lambda: tiny_model("llama"), **settings)
    change(model)
    model.export_lora(tmp_path, rank=rank)
    found, expected = products(tmp_path), deltas(model)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert relative(found[name], delta) < 1e-6, name
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    with torch.no_grad():
        output = main_output(model.eval(), "llama")
        assert relative(main_output(theirs.eval(), "llama"), output) < 1e-5
        assert relative(main_output(tiny_model("llama"), "llama"), output) > 0.01


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("rank", [6, 9])
def test_stacks_of_experts_have_one_rank_for_each_matrix(rank: int, tmp_path: Path) -> None:
    model = adapted(mixtral, r=12 if rank == 9 else 4).eval()
    if rank == 9:
        with torch.no_grad():
            for layer in model.vera_layers().values():
                _, d = layer.vectors("default").values()
                d[..., 9:] = 0
    model.export_lora(tmp_path, rank=rank)
    theirs = peft.PeftModel.from_pretrained(mixtral(), tmp_path).eval()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        assert relative(theirs(ids).logits, model(ids).logits) < 1e-5
        assert relative(mixtral()(ids).logits, model(ids).logits) > 0.01


def test_a_rank_that_would_be_an_approximation_is_refused(tmp_path: Path) -> None:
    model = adapted(lambda: tiny_model("llama"), r=12)
    with pytest.raises(ValueError, match=r"rank=11 cannot hold .*layers\.0\.self_attn\.q_proj.* has rank 12"):
        model.export_lora(tmp_path, rank=11)
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"rank={rank} is not allowed"):
            model.export_lora(tmp_path, rank=rank)
    assert list(tmp_path.iterdir()) == []


def _zeros_beyond(count: int) -> Callable[[VeraModel], None]:
    def change(model: VeraModel) -> None:
        with torch.no_grad():
            for layer in model.vera_layers().values():
                layer.vectors("default")["d"][count:] = 0

    return change


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: tiny_model("llama"), {"r": 4, "modules_to_save": ["lm_head"]}, "cannot hold .* in full: lm_head"),
        (lambda: tiny_model("gpt2"), {"r": 4, "bias": "vera_only"}, r"in full: transformer\.h\.0\.attn\.c_attn\.bias"),
        (
            mixtral,
            {"r": 4},
            r"only supports linear layers, and model\.layers\.0\.mlp\.experts\.gate_up_proj is not linear",
        ),
        (seeded(Table), {"r": 4, "target_modules": ["table"]}, "only supports linear layers, and table is not linear"),
        # The widest of these deltas has rank 16 or less: all that a tiny layer can hold.
        (lambda: tiny_model("llama"), {"r": 513}, "up to 512, not 513; rank=16 .* holds this adapter exactly"),
        (
            lambda: nn.Sequential(nn.Linear(600, 530)),
            {"r": 520, "target_modules": ["0"]},
            "up to 512, not 520; no smaller rank .* Merge it",
        ),
    ],
)
def test_what_vllm_would_not_load_is_refused(
    make: Callable[[], nn.Module], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = adapted(make, **settings)
    with pytest.raises(ValueError, match=message):
        model.export_lora(tmp_path, engine="vllm")
    assert list(tmp_path.iterdir()) == []


def test_for_vllm_a_rank_that_it_takes_is_written(tmp_path: Path) -> None:
    model = adapted(lambda: tiny_model("llama"), r=513)
    model.export_lora(tmp_path / "small", engine="vllm", rank=16)
    model.export_lora(tmp_path / "own")
    small, own = products(tmp_path / "small"), products(tmp_path / "own")
    assert small.keys() == own.keys()
    for name, delta in own.items():
        assert relative(small[name], delta) < 1e-6, name
    assert [max_lora_rank(rank) for rank in (1, 8, 9, 24, 256, 257, 321, 512)] == [8, 8, 16, 32, 256, 320, 512, 512]
    with pytest.raises(ValueError, match="engine='sglang' is not supported"):
        model.export_lora(tmp_path / "other", engine="sglang")  # type: ignore[arg-type]
