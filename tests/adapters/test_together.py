"""Several adapters on one model."""

import pytest
import torch

from small_net import FIRST_LAYER, small_adapted, small_inputs, small_net
from veratune import CheckpointError, TargetError, VeraConfig


def test_an_adapter_cannot_train_in_full_what_another_adapts():
    model = small_adapted(target_modules=["0", "2"])
    state = list(model.adapter_state("default").vectors)
    with pytest.raises(TargetError, match="another adapter adapts 2"):
        model.add_adapter("b", VeraConfig(**{**FIRST_LAYER, "modules_to_save": ["2"]}))
    assert list(model.adapter_state("default").vectors) == state
    other = small_adapted(modules_to_save=["2"])
    with pytest.raises(TargetError, match="another adapter trains 2 in full"):
        other.add_adapter("b", VeraConfig(**{**FIRST_LAYER, "target_modules": ["2"]}))
    assert list(other.peft_config) == ["default"]
    other.add_adapter("c", VeraConfig(**{**FIRST_LAYER, "target_modules": "all-linear"}))
    assert list(other.adapter_state("c").vectors) == ["0"]


def test_nor_can_a_loaded_one(tmp_path):
    small_adapted(modules_to_save=["2"]).save_pretrained(tmp_path)
    model = small_adapted(target_modules=["0", "2"])
    expected = model(x := small_inputs(3))
    with pytest.raises(CheckpointError, match="conflicts with the adapters already in the model"):
        model.load_adapter(tmp_path, "b")
    assert torch.equal(model(x), expected)
    assert list(model.peft_config) == ["default"]


def test_a_new_adapter_is_a_no_op_while_another_has_trained_biases():
    base, x = small_net()(y := small_inputs(3)), y
    model = small_adapted(bias="all")
    with torch.no_grad():
        for bias in model.adapter_state("default").biases.values():
            bias.add_(1)
    model.add_adapter("c", VeraConfig(**{**FIRST_LAYER, "bias": "all"}))
    model.add_adapter("d", VeraConfig(**{**FIRST_LAYER, "modules_to_save": ["2"]}))
    for name in ("c", "d"):
        model.set_adapter(name)
        assert torch.equal(model(x), base)


def test_set_adapter_within_disable_adapter_is_refused():
    model = small_adapted()
    model.add_adapter("other", VeraConfig(**FIRST_LAYER))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.disable_adapter(), pytest.raises(ValueError, match="within disable_adapter"):
        model.set_adapter("other")
    assert model.active_adapters == ["default"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    model.set_adapter("other")


def test_no_single_active_adapter_says_what_to_do():
    model = small_adapted()
    model.add_adapter("other", VeraConfig(r=2, target_modules="all-linear"))
    model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="pass adapter_name, or choose one with set_adapter"):
        model.explain_routes(tokens=4)
