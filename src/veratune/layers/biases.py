"""Biases trained beside the vectors (`bias="all"` or `"vera_only"`): an adapter's own, in place of the model's."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from veratune.layers.spread import whole


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
            with whole([current]):
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
    owners: dict[str, list[nn.Module]] = {}
    for _, first_name, module in _biases(named):
        holders = owners.setdefault(first_name, [])
        if module not in holders:
            holders.append(module)
    return owners


def bias_first_names(named: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """Return for every dotted name of a bias the one under which `bias_owners` has it."""
    return {name: first_name for name, first_name, _ in _biases(named)}


def _biases(named: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (name, first name of the same parameter, module) of each floating-point bias."""
    first_names: dict[int, str] = {}
    for module_name, module in named:
        bias = module._parameters.get("bias")
        if bias is not None and torch.is_floating_point(bias):
            name = f"{module_name}.bias" if module_name else "bias"
            yield name, first_names.setdefault(id(bias), name), module
