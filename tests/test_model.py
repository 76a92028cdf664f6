"""`VeraModel`: saving and loading."""

import json

import pytest
import torch

from small_net import small_adapted, small_net
from veratune import VeraConfig, VeraModel, get_peft_model, parameter_groups


def test_odd_base_model_names_can_be_saved(tmp_path):
    model = small_adapted()
    model.peft_config["default"].base_model_name_or_path = "\ud800 lone"
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "\ud800 lone"
    VeraModel.from_pretrained(small_net(), tmp_path)


def test_a_string_is_one_name_and_pefts_arguments_are_known(tmp_path):
    model = small_adapted()
    model.merge_adapter("default")
    assert model.merged_adapters == ["default"]
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "a", safe_serialization=True, selected_adapters="default", is_main_process=True)
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="never pickles"):
        model.save_pretrained(tmp_path / "b", safe_serialization=False)
    with pytest.raises(TypeError, match=r"low_cpu_mem_usage.*subfolder"):
        VeraModel.from_pretrained(small_net(), tmp_path / "a", low_cpu_mem_usage=True)


def test_a_frozen_adapter_is_loaded_in_eval_mode_and_says_how_to_train_it(tmp_path):
    small_adapted().save_pretrained(tmp_path)
    base = small_net().train()
    loaded = VeraModel.from_pretrained(base, tmp_path)
    assert not loaded.training and not any(module.training for module in loaded.modules())
    with pytest.raises(ValueError, match="is_trainable=True"):
        parameter_groups(loaded)
    again = VeraModel.from_pretrained(small_net().train(), tmp_path, is_trainable=True)
    assert again.training and parameter_groups(again)
    with pytest.raises(TypeError, match="get_peft_model"):
        parameter_groups(small_net())


def test_training_a_merged_adapter_is_refused():
    model = small_adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged, so their vectors get no gradients: call unmerge_adapter"):
        parameter_groups(model)
    model.unmerge_adapter()
    assert parameter_groups(model)


@pytest.mark.parametrize("name", ["adapter_names", "adapters"])
def test_an_adapter_for_each_row_is_refused_where_the_model_would_ignore_it(name):
    class Tolerant(torch.nn.Sequential):
        def forward(self, x, **kwargs):
            return super().forward(x)

    model, x = get_peft_model(Tolerant(torch.nn.Linear(3, 2)), VeraConfig(r=2, target_modules=["0"])), torch.randn(4, 3)
    with pytest.raises(TypeError, match=f"{name} is not supported here: all rows use the active adapters"):
        model(x, **{name: ["default", None, "other", "default"]})
    assert model(x, **{name: None}).shape == (4, 2)

    class Takes(torch.nn.Sequential):
        def forward(self, x, adapters=None, adapter_names=None):
            assert adapters or adapter_names
            return super().forward(x)

    own = get_peft_model(Takes(torch.nn.Linear(3, 2)), VeraConfig(r=2, target_modules=["0"]))
    assert own(x, **{name: ["its own"]}).shape == (4, 2)


def test_swapped_arguments_are_named():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not str"):
        VeraModel.from_pretrained("directory", small_net())
    with pytest.raises(TypeError, match="tokens='64' is not allowed: it must be an integer"):
        small_adapted().explain_routes("64")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_peft_and_veratune_do_not_adapt_each_others_models(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(small_net(), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="this model has PEFT adapters"):
        get_peft_model(theirs, VeraConfig(r=2, target_modules="all-linear"))
    ours = small_adapted()
    with pytest.raises(TypeError, match="a LoraConfig cannot be added to a VeraModel"):
        peft.get_peft_model(ours, peft.LoraConfig(target_modules=["0"]))
    assert list(ours.peft_config) == ["default"] and isinstance(ours.peft_config["default"], VeraConfig)
    ours.save_pretrained(tmp_path)
