"""Torch's fused transformer encoder, which reads weights without calling layers: off while it has adapters."""

from typing import Any

from torch import nn

from veratune.layers.base import VeraLayer

# What each class decides by: torch takes the fused path only for an activation it knows, and hands nested tensors,
# which only that path can take, only on request. Nothing else is told by these attributes.
_SWITCHES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_KEPT = "_veratune_kept_switch"


def choose_paths(model: nn.Module) -> None:
    """Turn the fused path off in each encoder that has adapted layers, and back to what it was in each other."""
    for module in model.modules():
        for kind, switch, off in _SWITCHES:
            if isinstance(module, kind) and switch in module.__dict__:
                adapted = any(isinstance(inside, VeraLayer) for inside in module.modules())
                if adapted and _KEPT not in module.__dict__:
                    module.__dict__[_KEPT] = module.__dict__[switch]
                    module.__dict__[switch] = off
                elif not adapted and _KEPT in module.__dict__:
                    module.__dict__[switch] = module.__dict__.pop(_KEPT)
