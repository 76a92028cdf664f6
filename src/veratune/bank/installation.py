"""Install a bank's layers in a model, and remove them again."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from veratune.adapters.surgery import replace_modules
from veratune.adapters.target import Target
from veratune.bank.layers import BANKED_LAYERS, BankedLinear
from veratune.bank.layout import BankError, Layout
from veratune.bank.saved_modules import BankedModule
from veratune.layers.holder import vector_device
from veratune.layers.registry import layer_class
from veratune.ops.planning import RouteName


class Installation:
    """A bank's layers; they replace the model's layers from `install` until `undo`.

    Attributes:
        owner: the object that identifies this bank's calls to its layers.
        layers: the bank's layers by name.
        device: the device that all layers compute on.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        targets: Sequence[Target],
        layout: Layout,
        route: RouteName,
    ) -> None:
        self.owner = object()
        self.device = _device_of(targets)
        self.layers: dict[str, BankedLinear] = {}
        self._model = model
        self._replacements: dict[int, nn.Module] = {}
        self._originals: dict[int, nn.Module] = {}
        for target in targets:
            columns = layout.layers[target.name].columns
            banked = BANKED_LAYERS[layer_class(target.module)]
            layer = banked(target.module, target.geometry, self.owner, target.name, columns, route)
            self.layers[target.name] = layer
            self._replace(target.module, layer)
        for name, saved in layout.modules_to_save.items():
            self._replace(modules[name], BankedModule(modules[name], self.owner, name, saved.parameters))
        self._modes = [(module, module.training) for module in model.modules()]

    def _replace(self, original: nn.Module, layer: nn.Module) -> None:
        self._replacements[id(original)], self._originals[id(layer)] = layer, original

    def install(self) -> None:
        """Replace the model's layers."""
        replace_modules(self._model, self._replacements)

    def undo(self) -> None:
        """Restore the model's layers and training modes."""
        replace_modules(self._model, self._originals)
        for module, training in self._modes:
            module.training = training

    def current_device(self) -> torch.device:
        """Return the layers' current device; the model may have been moved."""
        layer = next(iter(self.layers.values()))
        return vector_device(layer.base_layer, layer.base_weight)


def _device_of(targets: Sequence[Target]) -> torch.device:
    """Return the device that all of these layers compute on."""
    devices = set()
    for target in targets:
        weight = next(itertools.chain(target.module.parameters(), target.module.buffers()))
        devices.add(vector_device(target.module, weight))
    if len(devices) > 1:
        named = ", ".join(sorted(map(str, devices)))
        raise BankError(f"the model's layers are on several devices ({named}), but a bank supports only one device")
    return devices.pop()
