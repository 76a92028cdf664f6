"""`VeraModel`: saving and loading."""

import json

import pytest

from small_net import small_adapted, small_net
from veratune import VeraModel, parameter_groups


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
