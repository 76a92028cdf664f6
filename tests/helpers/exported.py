from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dense import dense_parameters
from tiny_models import randomise_trainable
from veratune import VeraConfig, VeraModel, get_peft_model


def adapted(make: Callable[[], nn.Module], **settings: Any) -> VeraModel:
    settings = {"r": 4, "target_modules": "all-linear", "modules_to_save": [], **settings}
    model = get_peft_model(make(), VeraConfig(**settings))
    randomise_trainable(model)
    return model


def deltas(model: VeraModel) -> dict[str, Tensor]:
    """Return each adapted weight's delta in transformers' layout, float64, without veratune's own computing of it."""
    weights, _ = dense_parameters(model)
    found = {}
    for name, weight in weights.items():
        layer = model.vera_layers()[name if name in model.vera_layers() else name.removesuffix(".weight")]
        found[name] = (weight - layer.base_weight.double()).detach()
    return found
