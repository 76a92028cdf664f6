"""A net of two linear layers in float64, and an adapter on its first."""

import torch
from torch import nn

from reference import dense_delta, projections, randomise
from veratune import VeraConfig, get_peft_model

FIRST_LAYER = {"r": 4, "target_modules": ["0"], "modules_to_save": []}


def small_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()


def small_adapted(**settings):
    model = get_peft_model(small_net(), VeraConfig(**{**FIRST_LAYER, **settings}))
    randomise(model, scale=0.5)
    return model


def small_inputs(*shape):
    return torch.randn(*shape, 8, dtype=torch.float64)


def dense_weight(layer):
    b, d = (vector.detach() for vector in layer.vectors("default").values())
    a_projection, b_projection = projections(0, d.numel(), layer.in_features, layer.out_features)
    return layer.base_weight.detach().double() + dense_delta(b, d, a_projection, b_projection)
