"""Disable torch's fused transformer encoder, which reads weights without calling layers, while it has adapters."""

from typing import Any

from torch import nn

from veratune.layers.base import VeraLayer

# The attribute that disables the fused path in each class. A layer uses the path only if its activation is marked as
# ReLU or GELU; an encoder creates nested tensors, which only the fused path supports, only if `use_nested_tensor` is
# set. The attributes have no other effect.
_SWITCHES: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_KEPT = "_veratune_kept_switch"


def choose_paths(model: nn.Module) -> None:
    """Disable the fused path in each encoder that has adapted layers, and restore the setting in all others."""
    for module in model.modules():
        for encoder, switch, off in _SWITCHES:
            if isinstance(module, encoder) and switch in module.__dict__:
                adapted = any(isinstance(inside, VeraLayer) for inside in module.modules())
                if adapted and _KEPT not in module.__dict__:
                    module.__dict__[_KEPT] = module.__dict__[switch]
                    module.__dict__[switch] = off
                elif not adapted and _KEPT in module.__dict__:
                    module.__dict__[switch] = module.__dict__.pop(_KEPT)
