"""Parameters that a module reads itself (experts, packed attention), and layers in parts, inside PEFT."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_suite import outputs
from reference import dense_delta, projections, relative
from tiny_models import randomise_trainable, tiny_model

peft = pytest.importorskip("peft")

from veratune import VeraConfig, get_peft_model  # noqa: E402
from veratune.integrations.peft import VeratuneConfig, install  # noqa: E402
from veratune.integrations.peft.layers import TunedLayer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(autouse=True)
def _installed() -> None:
    install()


def experts(**settings: Any) -> Any:
    config = VeratuneConfig(**{"r": 4, "target_modules": ["q_proj"], "target_parameters": EXPERTS, **settings})
    return randomise_trainable(peft.get_peft_model(tiny_model("mixtral"), config), std=0.3)


def tuned_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, TunedLayer)}


def test_experts_compute_the_dense_result() -> None:
    model, dense = experts(), tiny_model("mixtral")
    assert torch.equal(
        outputs(peft.get_peft_model(tiny_model("mixtral"), VeratuneConfig(r=4, target_parameters=EXPERTS)), "mixtral"),
        outputs(dense, "mixtral"),
    )
    found = tuned_layers(model.base_model.model)
    assert sum(".adapted." in name for name in found) == 4 and len(found) == 6
    for name, layer in found.items():
        weight = dense.get_parameter(name.replace(".adapted", "") if ".adapted." in name else f"{name}.weight")
        pair = projections(0, 4, layer.in_features, layer.out_features)
        b, d = (vector.detach() for vector in layer.vectors("default").values())
        with torch.no_grad():
            if b.ndim == 1:
                weight.add_(dense_delta(b, d, *pair).float())
            for index in range(len(b) if b.ndim == 2 else 0):
                weight[index].add_(layer._outputs_first(dense_delta(b[index], d[index], *pair).float()))
    torch.testing.assert_close(outputs(model, "mixtral"), outputs(dense, "mixtral"), rtol=1e-3, atol=1e-4)


def test_experts_are_those_of_veratunes_own_model() -> None:
    """The same vectors and the same outputs as without PEFT."""
    ours = get_peft_model(tiny_model("mixtral"), VeraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS))
    model = experts()
    values = {
        name.replace(".adapted", ""): layer.vectors("default").values()
        for name, layer in tuned_layers(model.base_model.model).items()
    }
    with torch.no_grad():
        for name, layer in ours.vera_layers().items():
            for own, value in zip(layer.vectors("default").values(), values[name], strict=True):
                own.copy_(value)
    assert torch.equal(outputs(ours, "mixtral"), outputs(model, "mixtral"))


def test_experts_train_merge_and_come_off_again() -> None:
    model, plain = experts(), outputs(tiny_model("mixtral"), "mixtral")
    expected = outputs(model, "mixtral")
    assert relative(expected, plain) > 0.01
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 12 and all(".vera_lambda_" in name for name in trained)
    with model.disable_adapter():
        assert torch.equal(outputs(model, "mixtral"), plain)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(outputs(model, "mixtral"), expected, rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(outputs(model, "mixtral"), plain)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(outputs(model, "mixtral"), expected)
    unloaded = copy.deepcopy(model).unload()
    assert torch.equal(outputs(unloaded, "mixtral"), plain)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, "mixtral"), expected, rtol=1e-3, atol=1e-4)
    for left in (unloaded, merged):
        assert {n: type(m) for n, m in left.named_modules()} == {
            n: type(m) for n, m in tiny_model("mixtral").named_modules()
        }
    model = experts()
    with torch.no_grad():
        list(tuned_layers(model).values())[-1].vectors("default")["b"].fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs"):
        model.merge_and_unload(safe_merge=True)
    assert len(tuned_layers(model)) == 6 and not any(layer.merged for layer in tuned_layers(model).values())


@pytest.mark.parametrize("low", [False, True])
def test_experts_are_saved_and_loaded_beside_others(low: bool, tmp_path: Path) -> None:
    model = experts()
    first = outputs(model, "mixtral")
    model.save_pretrained(tmp_path / "first")
    loaded = peft.PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "first", low_cpu_mem_usage=low)
    assert torch.equal(outputs(loaded, "mixtral"), first)
    second = VeratuneConfig(r=7, target_parameters=EXPERTS[:1], target_modules=[], projection_prng_key=3)
    model.add_adapter("other", second)
    model.set_adapter("other")
    randomise_trainable(model, seed=9, std=0.3)
    expected = outputs(model, "mixtral")
    model.set_adapter("default")
    assert torch.equal(outputs(model, "mixtral"), first)
    model.save_pretrained(tmp_path / "both")
    loaded.load_adapter(tmp_path / "both" / "other", "other", low_cpu_mem_usage=low)
    loaded.set_adapter("other")
    assert torch.equal(outputs(loaded, "mixtral"), expected)
    alone = peft.PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "both" / "other")
    assert torch.equal(outputs(alone, "mixtral"), expected) and len(tuned_layers(alone)) == 2
    loaded.delete_adapter("default")
    assert torch.equal(outputs(loaded, "mixtral"), expected)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_packed_attention(tmp_path: Path) -> None:
    torch.manual_seed(4)
    plain = Attending().eval()
    x = torch.randn(2, 5, 8)
    config = VeratuneConfig(r=3, target_modules=["out_proj"], target_parameters=["in_proj_weight"])
    model = randomise_trainable(peft.get_peft_model(copy.deepcopy(plain), config), std=0.3)
    with torch.no_grad():
        expected = model.eval()(x)
        assert relative(expected, plain(x)) > 0.01
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
        assert torch.equal(loaded(x), expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)
    assert type(model.base_model.model.attention) is nn.MultiheadAttention


def test_a_fused_layer_in_parts_has_a_d_for_each(tmp_path: Path) -> None:
    config = VeratuneConfig(r=4, target_modules=["c_attn"], fused_parts={"c_attn": 3})
    model = randomise_trainable(peft.get_peft_model(tiny_model("gpt2"), config), std=0.3)
    assert all(layer.vectors("default")["d"].shape == (3, 4) for layer in tuned_layers(model).values())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path)
    assert torch.equal(outputs(loaded, "gpt2"), outputs(model, "gpt2"))


def test_what_cannot_be_is_refused_before_any_change() -> None:
    net = Attending()
    for settings, message in (
        ({"target_modules": ["attention"]}, r"reads its weights directly.*target_parameters"),
        ({"target_parameters": ["foo"]}, "no parameter is called 'foo'"),
        ({"target_parameters": ["out_proj.weight"]}, "name the module in target_modules"),
        ({"target_parameters": ["in_proj_weight"], "vera_dropout": 0.5}, "vera_dropout=0.5 is not supported on"),
        ({"target_parameters": ["in_proj_weight"], "projection": "peft"}, "projection='peft' cannot adapt"),
        ({"target_modules": ["out_proj"], "fused_parts": {"out_proj": 3}}, "does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(net, VeratuneConfig(r=3, **settings))
        assert not tuned_layers(net) and type(net.attention) is nn.MultiheadAttention
    with pytest.raises(ValueError, match="outermost module"):
        peft.get_peft_model(net.attention, VeratuneConfig(r=3, target_parameters=["in_proj_weight"]))


def test_ranks_by_layer() -> None:
    config = VeratuneConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={r"layers\.1\..*v_proj": 9})
    model = peft.get_peft_model(tiny_model("llama"), config)
    ranks = {name: layer.entries["default"].r for name, layer in tuned_layers(model.base_model.model).items()}
    assert {rank for name, rank in ranks.items() if "layers.1" in name and "v_proj" in name} == {9}
    assert sorted(ranks.values()) == [4, 4, 4, 9]


def test_the_encoders_of_torch_do_not_pass_adapters_over() -> None:
    """In eval mode they compute with the layers' weights in one kernel, which knows of no adapters."""
    torch.manual_seed(4)
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    config = VeratuneConfig(r=3, target_modules=["linear1", "out_proj"], target_parameters=["in_proj_weight"])
    model = randomise_trainable(peft.get_peft_model(copy.deepcopy(plain), config), std=0.3).eval()
    expected = model(x)
    with torch.no_grad():
        base = plain(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert relative(expected, base) > 0.01
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
        assert not tuned_layers(merged)
