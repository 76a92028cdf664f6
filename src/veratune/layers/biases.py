"""Biases trained by an adapter (`bias="all"` or `"vera_only"`), which replace the model's while it is active."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from veratune.layers.offloading import is_offloaded, why_no_values
from veratune.layers.recomputation import State, StateLog, matters
from veratune.utils.sharding import all_gathered


class BiasCheck:
    """Forward pre-hook on a module whose bias is replaced by an adapter's.

    It raises RuntimeError if a pass is recomputed with a different bias, or if a trainable bias is offloaded.
    """

    def __init__(self, log: StateLog, name: str) -> None:
        self._log = log  # shared by all biases of an adapter
        self._values = StateLog()
        self._name = name

    def __call__(self, module: nn.Module, args: Any) -> None:
        if matters(module):
            self.check(module)
        bias = module._parameters.get("bias")
        learns = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        if learns and is_offloaded(module, "bias"):
            raise RuntimeError(
                f"{self._name} cannot be trained: {why_no_values(module, 'bias')}, or compute under torch.no_grad()"
            )

    def check(self, module: nn.Module) -> None:
        self._log.forward(self._name, ())
        self._values.forward(self._name, [module._parameters.get("bias")])


def only_bias_checks(module: nn.Module) -> bool:
    """Return whether all forward pre-hooks of a module are `BiasCheck`s."""
    return all(type(hook) is BiasCheck for hook in module._forward_pre_hooks.values())


def check_biases(module: nn.Module) -> None:
    """Run the `BiasCheck`s of a module without calling the module."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BiasCheck):
            hook.check(module)


@dataclass
class AdapterBiases:
    """One adapter's biases, which are in the model while the adapter is active and kept here while it is not.

    While the adapter is active, the base model's biases are kept here instead, so that disabling the adapter restores
    the base model exactly.

    Attributes:
        owners: dotted name of each bias (as in the model without adapters) to the modules that have it as `bias`.
        waiting: name to the parameter that is currently not in the model.
        installed: whether the adapter's biases are in the model.
        log: the record of when they were installed and removed.
        handles: the handles of the modules' hooks.
    """

    owners: dict[str, list[nn.Module]]
    waiting: dict[str, nn.Parameter] = field(default_factory=dict)
    installed: bool = False
    log: StateLog = field(default_factory=StateLog)
    handles: list[RemovableHandle] = field(default_factory=list)

    @classmethod
    def copies_of(cls, owners: dict[str, list[nn.Module]]) -> "AdapterBiases":
        biases = cls(owners)
        for name, modules in owners.items():
            current = modules[0].bias
            assert isinstance(current, nn.Parameter)
            with all_gathered([current]), torch.inference_mode(False):
                biases.waiting[name] = nn.Parameter(current.detach().clone(), requires_grad=False)
        for name, modules in owners.items():
            check = BiasCheck(biases.log, name)
            biases.handles += [module.register_forward_pre_hook(check) for module in modules]
        return biases

    def release(self) -> None:
        """Remove the hooks, because the adapter is deleted or its biases become the model's."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def check_swappable(self) -> None:
        """Raise ValueError if biases are offloaded and so cannot be swapped; nothing is changed."""
        for name, modules in self.owners.items():
            for module in modules:
                if is_offloaded(module, "bias"):
                    raise ValueError(f"{name} cannot be replaced by another bias: {why_no_values(module, 'bias')}")

    def swap(self, *, install: bool) -> None:
        """Install the adapter's biases in the model, or restore the base model's."""
        if install == self.installed:
            return
        self.check_swappable()
        for name, modules in self.owners.items():
            leaving = modules[0].bias
            assert isinstance(leaving, nn.Parameter)
            entering = self.waiting[name]
            if entering.device != leaving.device or entering.dtype != leaving.dtype:
                entering.data = entering.data.to(leaving.device, leaving.dtype)
            for module in modules:
                module.bias = entering
            self.waiting[name] = leaving
        self.installed = install
        self.log.record(State(own_bias=install))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's biases by name, whether they are in the model or not."""
        if not self.installed:
            return dict(self.waiting)
        own: dict[str, nn.Parameter] = {}
        for name, modules in self.owners.items():
            current = modules[0].bias
            assert isinstance(current, nn.Parameter)
            own[name] = current
        return own


def bias_owners(named: Iterable[tuple[str, nn.Module]]) -> dict[str, list[nn.Module]]:
    """Return the modules' floating-point biases by dotted name, each only once, with all modules that share it."""
    owners: dict[str, list[nn.Module]] = {}
    for _, first_name, module in _biases(named):
        if is_offloaded(module, "bias"):
            raise ValueError(f"{first_name} cannot be trained: {why_no_values(module, 'bias')}, or use bias='none'")
        holders = owners.setdefault(first_name, [])
        if module not in holders:
            holders.append(module)
    return owners


def bias_first_names(named: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """Return, for each dotted name of a bias, the name that `bias_owners` uses for it."""
    return {name: first_name for name, first_name, _ in _biases(named)}


def _biases(named: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (name, first name of the same parameter, module) of each floating-point bias."""
    first_names: dict[int, str] = {}
    for module_name, module in named:
        bias = module._parameters.get("bias")
        if bias is not None and torch.is_floating_point(bias):
            name = f"{module_name}.bias" if module_name else "bias"
            yield name, first_names.setdefault(id(bias), name), module
