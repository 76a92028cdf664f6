"""Nets of two layers, and adapters on them."""

from typing import Any

import torch
from torch import Tensor, nn

from reference import dense_delta, projections, randomise
from veratune import VeraConfig, VeraModel, get_peft_model

FIRST_LAYER = {"r": 4, "target_modules": ["0"], "modules_to_save": []}


def small_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()


class TwoLayers(nn.Module):
    """The second layer may be of another class, made with its numbers of inputs and outputs."""

    def __init__(self, second: Any = nn.Linear, sizes: tuple[int, int, int] = (12, 8, 6)) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(*sizes[:2]), second(*sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(x)))
        return output


def all_adapted(base: nn.Module, **settings: Any) -> VeraModel:
    """Return a model with a random adapter on all of its layers."""
    model = get_peft_model(base, VeraConfig(target_modules="all-linear", **settings))
    torch.manual_seed(4)
    randomise(model)
    return model


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
