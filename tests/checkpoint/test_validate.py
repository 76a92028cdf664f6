"""Checks of a loaded adapter against the model it is loaded into."""

import pytest
from torch import nn

from small_net import small_adapted, small_net
from veratune import CheckpointError, VeraConfig, VeraModel, get_peft_model


def test_two_names_of_one_module(tmp_path):
    separate = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    get_peft_model(separate, VeraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path)
    layer = nn.Linear(8, 8)
    shared = nn.Sequential(layer, layer)
    with pytest.raises(CheckpointError, match="are the same module"):
        VeraModel.from_pretrained(shared, tmp_path)
    assert shared[0] is shared[1] is layer
    assert layer.weight.requires_grad


def test_loading_onto_a_model_without_values(tmp_path):
    small_adapted().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="meta device"):
        VeraModel.from_pretrained(small_net().to("meta"), tmp_path)


def test_loading_what_is_no_adapter_says_what_it_is(tmp_path):
    with pytest.raises(CheckpointError, match="has no adapter"):
        VeraModel.from_pretrained(small_net(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has a full model"):
        VeraModel.from_pretrained(small_net(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model = get_peft_model(small_net(), VeraConfig(r=2, target_modules="all-linear"), "one")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"in the subfolders \['one'\]: pass one of them as subfolder="):
        VeraModel.from_pretrained(small_net(), tmp_path)


def test_an_adapter_of_a_shallower_model_is_loaded_with_a_warning(tmp_path):
    get_peft_model(nn.Sequential(nn.Linear(3, 3)), VeraConfig(r=2, target_modules="all-linear")).save_pretrained(
        tmp_path
    )
    deeper = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="adapts 1 of the 2 layers .* but not 2: is this the model"):
        VeraModel.from_pretrained(deeper, tmp_path)
