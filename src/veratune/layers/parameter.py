"""VeRA for parameters that a module's forward reads directly: expert tensors, packed attention weights."""

import inspect
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor, nn

from veratune.layers.base import VeraLayer
from veratune.layers.base_call import call_with, stand_in_for
from veratune.layers.geometry import Geometry
from veratune.layers.kind import Export
from veratune.layers.offloading import HOOK_ATTRIBUTES


class VeraParameter(VeraLayer):
    """The adapters on one parameter of a module: a matrix, or a stack of matrices with separate vectors.

    `base_layer` is the module that has the parameter. It is not a submodule of this one: `VeraModule` holds both.
    """

    kind = "parameter"
    of_parameter = True
    exports: ClassVar[frozenset[Export]] = frozenset(("lora", "gguf"))

    def __init__(self, owner: nn.Module, name: str, geometry: Geometry, *, transposed: bool = False) -> None:
        self.weight_name = name
        self.out_axis = 1 if transposed else 0
        super().__init__(owner, geometry)

    def _hold(self, base_layer: nn.Module) -> None:
        object.__setattr__(self, "base_layer", base_layer)

    def matrix(self, weight: Tensor) -> Tensor:
        count = self.geometry.count
        # A stack stored as one matrix: query, key and value.
        return weight.view(count, -1, weight.shape[-1]) if count is not None and weight.ndim == 2 else weight

    def like_weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.base_weight.shape)

    @property
    def bias(self) -> None:
        """None, because the module's biases do not belong to this parameter."""
        return None

    # Export as a LoRA: lora_A (n r, in), lora_B (out, r n) for a stack of n matrices

    def why_not_lora(self) -> str | None:
        if isinstance(self.base_layer, nn.MultiheadAttention):
            return "for torch.nn.MultiheadAttention, it treats the query, key and value projections as one matrix"
        return super().why_not_lora()

    def lora_keys(self, name: str, beside: Collection[str]) -> tuple[str, str]:
        # PEFT wraps a module once for each parameter, in the module's order: the last wrapper is the outermost.
        adapted = [other for other in self.base_layer._parameters if other in beside]
        depth = len(adapted) - 1 - adapted.index(self.weight_name)
        return super().lora_keys(name.rpartition(".")[0] + ".base_layer" * depth, beside)

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        if self.geometry.count is None:
            return super().lora_factors(name)
        a, (b_projection,), b, d = self._drawn_factors(name)
        inner, outer = d[:, :, None] * a, b[:, :, None] * b_projection
        if self.out_axis == 1 and not getattr(self.base_layer, "is_transposed", False):
            # PEFT relies on `is_transposed` alone, and swaps inputs and outputs if a module lacks this attribute.
            inner, outer = outer.mT, inner.mT
        # The stack's index varies slowest in lora_A and fastest in lora_B.
        return inner.flatten(0, 1).float(), outer.permute(1, 2, 0).flatten(1).float()


class VeraModule(nn.Module):
    """A module that reads some adapted parameters directly.

    Attributes:
        base_layer: the module, unchanged.
        adapted: parameter name to the adapters on it.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapted = nn.ModuleDict()
        self.training = base_layer.training

    def parameter_layers(self) -> dict[str, VeraParameter]:
        """Return the adapted parameters by name."""
        layers: dict[str, VeraParameter] = {}
        for name, layer in self.adapted.items():
            assert isinstance(layer, VeraParameter)
            layers[name] = layer
        return layers

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter from all parameters, and the layers of parameters that have no adapters left."""
        for parameter, layer in self.parameter_layers().items():
            if name in layer.entries:
                layer.delete_adapter(name)
            if not layer.entries:
                del self.adapted[parameter]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for layer in self.parameter_layers().values():
            layer.check_recomputation()
        if not any(layer.added_adapters for layer in self.parameter_layers().values()):
            return self.base_layer(*args, **kwargs)
        return call_with(self.base_layer, self._weights, args, kwargs)

    def _weights(self) -> dict[str, Tensor]:
        return {
            name: layer.weight_over(getattr(self.base_layer, name))
            for name, layer in self.parameter_layers().items()
            if layer.added_adapters
        }

    def __setattr__(self, name: str, value: Any) -> None:
        # Assignments to an adapted parameter go to the module inside.
        modules = self.__dict__.get("_modules", {})
        if name in modules.get("adapted", ()):
            modules["adapted"][name].weight = value
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            # accelerate's hooks belong to the module inside. If `adapted` is missing, this module is being copied or
            # unpickled.
            if name.startswith("__") or name in HOOK_ATTRIBUTES or "adapted" not in modules:
                raise
            if name in modules["adapted"]:
                return modules["adapted"][name].weight
            base: Any = modules["base_layer"]
            value = getattr(base, name)
            if inspect.ismethod(value) and id(value.__self__) == id(base) and not hasattr(nn.Module, name):
                # The module's other methods read the adapted parameters too, not only its forward.
                return getattr(stand_in_for(base, self._weights()), name)
            return value
