"""Merging adapters into a model, for a while and for good."""

import contextlib

import pytest
from torch import nn

from small_net import FIRST_LAYER, small_adapted, small_net
from veratune import VeraConfig, get_peft_model


def test_a_failed_unmerge_keeps_the_weight():
    model = small_adapted()
    layer = model.base_model[0]
    original = layer.base_layer.weight
    model.merge_adapter()
    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())
    with contextlib.suppress(KeyError, AttributeError, RuntimeError, ValueError):
        model.unmerge_adapter()
    nn.utils.parametrize.remove_parametrizations(layer.base_layer, "weight")
    if model.merged_adapters:
        model.unmerge_adapter()
    assert layer.base_layer.weight is original


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["2"], "bias": "all"}, {"inference_mode": True}], ids=str)
def test_a_merged_model_is_as_trainable_as_it_was(settings):
    model = small_net()
    model[0].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    merged = get_peft_model(model, VeraConfig(**{**FIRST_LAYER, **settings})).merge_and_unload()
    assert {name: p.requires_grad for name, p in merged.named_parameters()} == flags
