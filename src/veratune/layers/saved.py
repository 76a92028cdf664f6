"""Modules that are trained in full beside the vectors (a new classification head), one copy for each adapter."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from veratune.layers.spread import whole


class SavedModule(nn.Module):
    """A module and the trainable copies that adapters have of it; the active adapter's copy computes.

    Attributes:
        original_module: the module as it was, used while no adapter with a copy is active.
        modules_to_save: adapter name to that adapter's copy.
        active_adapters: the adapter whose copy computes, alone in a list, or an empty list.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.training = original_module.training

    def add_adapter(self, name: str) -> None:
        with whole(self.original_module.parameters()):
            self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(False)

    def delete_adapter(self, name: str) -> None:
        del self.modules_to_save[name]
        self.activate(self.active_adapters)

    def activate(self, names: Sequence[str]) -> None:
        """Let the copy of the one of these adapters that has any compute."""
        self.active_adapters = [name for name in names if name in self.modules_to_save]

    def current(self) -> nn.Module:
        """Return the module that computes now."""
        return self.modules_to_save[self.active_adapters[0]] if self.active_adapters else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current()(*args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        module: Any = self.current()
        return module[index]

    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever sets a head's weight or bias means what computes, as for reading them.
        if name in ("weight", "bias"):
            setattr(self.current(), name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "active_adapters" not in self.__dict__:  # being copied or unpickled
                raise
            return getattr(self.current(), name)
