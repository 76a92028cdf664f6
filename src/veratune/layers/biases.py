"""Biases trained beside the vectors (`bias="all"` or `"vera_only"`): an adapter's own, in place of the model's."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class AdapterBiases:
    """One adapter's biases, which stand in the model while the adapter is active and wait here while it is not.

    The model's own biases wait here in the meantime, so that disabling the adapter gives the base model exactly.

    Attributes:
        owners: dotted name of each bias (as in the model without adapters) to the modules that hold it as `bias`.
        waiting: name to the parameter that is not in the model at the moment.
        installed: whether the adapter's own biases are the ones in the model.
    """

    owners: dict[str, list[nn.Module]]
    waiting: dict[str, nn.Parameter] = field(default_factory=dict)
    installed: bool = False

    @classmethod
    def copies_of(cls, owners: dict[str, list[nn.Module]]) -> "AdapterBiases":
        biases = cls(owners)
        for name, modules in owners.items():
            current = modules[0].bias
            assert isinstance(current, nn.Parameter)
            biases.waiting[name] = nn.Parameter(current.detach().clone(), requires_grad=False)
        return biases

    def swap(self, *, install: bool) -> None:
        """Put the adapter's biases into the model, or the model's own back."""
        if install == self.installed:
            return
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

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's own biases by name, wherever they are at the moment."""
        if not self.installed:
            return dict(self.waiting)
        own: dict[str, nn.Parameter] = {}
        for name, modules in self.owners.items():
            current = modules[0].bias
            assert isinstance(current, nn.Parameter)
            own[name] = current
        return own


def bias_owners(named: Iterable[tuple[str, nn.Module]]) -> dict[str, list[nn.Module]]:
    """Return the floating-point bias parameters of these modules by dotted name, each once, with all that hold it."""
    names: dict[int, str] = {}
    owners: dict[str, list[nn.Module]] = {}
    for name, module in named:
        bias = module._parameters.get("bias")
        if bias is None or not torch.is_floating_point(bias):
            continue
        owner_name = names.setdefault(id(bias), f"{name}.bias" if name else "bias")
        modules = owners.setdefault(owner_name, [])
        if module not in modules:
            modules.append(module)
    return owners
