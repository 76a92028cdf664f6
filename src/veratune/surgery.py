"""Putting modules in the places of others."""

from torch import nn

from veratune.layers.fastpath import choose_paths
from veratune.torch_private import follow_replacement


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Put modules in the places of others, given by id, wherever those stand in a model."""
    if not replacements:
        return
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            # A wrapper just made holds what it wraps, and is not to be put into itself.
            if id(child) in replacements and replacements[id(child)] is not parent:
                parent._modules[name] = replacements[id(child)]
                follow_replacement(parent)
    choose_paths(model)
