"""`modules_to_save`: modules that are trained in full (a new classification head), one copy for each adapter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veratune.layers.offloading import HOOK_ATTRIBUTES, resident_copy
from veratune.layers.recomputation import State, StateLog, matters
from veratune.utils.sharding import all_gathered
from veratune.utils.torch_private import tree_leaves


class SavedModule(nn.Module):
    """A module with a trainable copy for each adapter; the active adapter's copy is called.

    Attributes:
        original_module: the base model's module, used while no adapter with a copy is active.
        modules_to_save: adapter name to that adapter's copy.
        active_adapters: a list with the adapter whose copy is called, or an empty list.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self._log = StateLog()
        self.training = original_module.training

    def add_adapter(self, name: str) -> None:
        with all_gathered(self.original_module.parameters()), torch.inference_mode(False):
            self.modules_to_save[name] = resident_copy(self.original_module).requires_grad_(False)

    def delete_adapter(self, name: str) -> None:
        del self.modules_to_save[name]
        self._log.forget(name)
        self.activate(self.active_adapters)

    def activate(self, names: Sequence[str]) -> None:
        """Use the copy of the given adapter that has one, or the original module if no adapter has a copy."""
        self.active_adapters = [name for name in names if name in self.modules_to_save]
        self._log.record(State(tuple(self.active_adapters)))

    def current(self) -> nn.Module:
        """Return the module that is currently in use."""
        return self.modules_to_save[self.active_adapters[0]] if self.active_adapters else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.current()
        if matters(self):
            called = f"a {type(self.original_module).__name__} that adapters train in full"
            self._log.forward(called, module.parameters())
        output = module(*args, **kwargs)
        if self.active_adapters and torch.is_grad_enabled() and _is_offloaded(module):
            for value in tree_leaves(output):
                if isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
        return output

    def __getitem__(self, index: Any) -> Any:
        module: Any = self.current()
        return module[index]

    def __setattr__(self, name: str, value: Any) -> None:
        # Assignments to weight or bias go to the module that is currently in use, from which both are also read.
        if name in ("weight", "bias"):
            setattr(self.current(), name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # accelerate's hooks belong to the inner module. If active_adapters is missing, this module is being copied
            # or unpickled.
            if name.startswith("__") or name in HOOK_ATTRIBUTES or "active_adapters" not in self.__dict__:
                raise
            return getattr(self.current(), name)


def _is_offloaded(module: nn.Module) -> bool:
    return not torch.compiler.is_compiling() and any(
        parameter.is_meta and parameter.requires_grad for parameter in module.parameters()
    )


def _refuse_gradient(gradient: Tensor) -> Tensor:
    if gradient.is_meta:
        return gradient
    raise RuntimeError(
        "a module of modules_to_save is offloaded by accelerate, which loses its gradients: call"
        " accelerate.hooks.remove_hook_from_submodules(model) before training, or offload the model before adding the"
        " adapter"
    )
