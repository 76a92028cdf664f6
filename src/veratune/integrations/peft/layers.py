"""veratune's layers with the `peft` package's layer interface."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from veratune.layers import AdapterEntry, VeraLayer, VeraModule, VeraParameter
from veratune.layers.entries import VECTOR_PREFIX, VECTORS
from veratune.layers.registry import LAYER_KINDS, geometry, layer_class, parameter_layout
from veratune.projections.schemes import PeftShared, Side, Stored
from veratune.utils.torch_private import follow_replacement

PeftScheme = PeftShared | Stored

# Held weakly: while a tensor is in use, all adapters with these projections share it.
_tensors: WeakValueDictionary[tuple[Side, PeftScheme, int], Tensor] = WeakValueDictionary()


def shared_projection(side: Side, entry: AdapterEntry) -> Tensor:
    """Return PEFT's A, (r, max_in), or its B, (max_out, r), of an adapter on one of its layers, in float32 on the CPU.

    The result is an inference tensor: the layers use a separate copy, and torch refuses to write to this one.
    """
    scheme: Any = entry.a.projection.scheme
    key = side, scheme, entry.r
    tensor = _tensors.get(key)
    if tensor is None:
        with torch.inference_mode():
            drawn = scheme.draw(side, range(entry.r), scheme.storage_width(side, 0), torch.device("cpu"))
            tensor = drawn.clone() if side == "A" else (drawn * scheme.scale(entry.r)).t().contiguous()
        _tensors[key] = tensor
    return tensor


class SharedProjections(Mapping[str, Tensor]):
    """PEFT's A or B by adapter name. Only adapters of PEFT's own `VeraConfig` or `projection="peft"` have them."""

    def __init__(self, side: Side, entries: Mapping[str, AdapterEntry]) -> None:
        self._side, self._entries = side, entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        if not isinstance(entry.a.projection.scheme, PeftScheme):
            raise KeyError(f"adapter {name!r} has separate projections for each width, not PEFT's")
        return shared_projection(self._side, entry)

    def __iter__(self) -> Iterator[str]:
        return (name for name, entry in self._entries.items() if isinstance(entry.a.projection.scheme, PeftScheme))

    def __len__(self) -> int:
        return len(list(iter(self)))


class TunedLayer(BaseTunerLayer):
    """Mixin that adds PEFT's layer interface to a `VeraLayer`."""

    adapter_layer_names = tuple(VECTOR_PREFIX + which for which in VECTORS)
    other_param_names = ("vera_dropout", "entries")
    # The adapters that were merged when all adapters were disabled.
    _taken_out: Sequence[str] = ()
    # The adapters that were trainable at that time.
    _frozen: Sequence[str] = ()

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, whether this layer has them or not."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

    @active_adapters.setter
    def active_adapters(self, names: Sequence[str]) -> None:
        self._active_adapter = list(names)

    @property
    def vera_A(self) -> SharedProjections:  # noqa: N802
        """PEFT's A, (r, max_in), of each adapter that uses one for all layers. Read-only."""
        layer: Any = self
        return SharedProjections("A", layer.entries)

    @property
    def vera_B(self) -> SharedProjections:  # noqa: N802
        """PEFT's B, (max_out, r), of each adapter that uses one for all layers. Read-only."""
        layer: Any = self
        return SharedProjections("B", layer.entries)

    def activate(self, names: Sequence[str]) -> None:
        self.active_adapters = list(names)
        layer: Any = self
        layer._choose_added()

    def _computing(self) -> list[str]:
        return [] if self.disable_adapters else self.active_adapters

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, which become trainable unless `inference_mode` is true."""
        self._taken_out = self._frozen = []
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        layer: Any = self
        layer._choose_added()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._frozen = [name for name in self._frozen if name not in names]

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters; enabling restores which of them were trainable and merged.

        PEFT's method would make frozen active adapters trainable, and forget which were merged.
        """
        layer: Any = self
        vectors = [(name, vector) for name in layer.entries for vector in layer.vectors(name).values()]
        if not enabled:
            self._take_out()
            self._frozen = [*self._frozen, *(name for name, vector in vectors if vector.requires_grad)]
        for name, vector in vectors:
            if not enabled or name in self._frozen:
                vector.requires_grad_(enabled)
        self._disable_adapters = not enabled
        layer._choose_added()
        if enabled:
            self.merge_again([name for name in self._taken_out if name in layer.entries])
            self._taken_out = self._frozen = []

    def _take_out(self) -> None:
        """Unmerge until adapters are enabled again."""
        layer: Any = self
        if layer.merged_adapters:
            merged = list(layer.merged_adapters)
            self._vera_class().unmerge(layer)
            self._taken_out = merged

    def merge_again(self, names: Sequence[str]) -> None:
        """Merge adapters that were merged before."""
        layer: Any = self
        if names:
            self._vera_class().merge(layer, names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, PEFT activates another one."""
        super().delete_adapter(adapter_name)
        layer: Any = self
        layer._log.forget(adapter_name)
        layer._choose_added()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the layer's weight with one that includes these adapters' deltas."""
        layer: Any = self
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in layer.entries]
        if not names:
            return
        layer.check_mergeable(names, safe=safe_merge, called=str(layer.base_layer))
        if self.disable_adapters:  # merge once they are enabled
            self._taken_out = list(dict.fromkeys([*self._taken_out, *names]))
            return
        # Merge all of them into the original weight together, which rounds only once.
        before = list(layer.merged_adapters)
        self._vera_class().unmerge(layer)
        self._vera_class().merge(layer, [*before, *names])

    def unmerge(self) -> None:
        """Restore the layer's original weight, bit for bit."""
        layer: Any = self
        if self._taken_out:
            self._taken_out = []
            return
        if not layer.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._vera_class().unmerge(layer)

    def _vera_class(self) -> type[VeraLayer]:
        kinds = (kind for kind in type(self).__mro__ if not issubclass(kind, TunedLayer))
        return next(kind for kind in kinds if issubclass(kind, VeraLayer))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        layer.check_recomputation()
        if self.disable_adapters and layer.merged_adapters:
            self._take_out()
        output: Tensor = self._vera_class().forward(layer, input, *args, **kwargs)
        return output

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether PEFT can convert this layer's adapters to LoRA: true unless the layer adapts a parameter."""
        layer: Any = self
        return not layer.of_parameter


class TunedModule(VeraModule):
    """A module that reads adapted parameters itself, for PEFT; the parameters' layers are submodules."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for layer in self.parameter_layers().values():
            tuned: Any = layer
            tuned.check_recomputation()
            if tuned.disable_adapters and tuned.merged_adapters:
                tuned._take_out()
        return super().forward(*args, **kwargs)

    def merge(self, adapter_names: list[str] | None) -> None:
        """Merge adapters into the parameters."""
        for layer in self.parameter_layers().values():
            tuned: Any = layer
            tuned.merge(adapter_names=adapter_names)


_tuned_classes: dict[type[VeraLayer], type] = {}


def _tuned_class(kind: type[VeraLayer]) -> type:
    """Return the subclass of a layer class that PEFT can use."""
    if kind not in _tuned_classes:
        # PEFT's properties would return the weight without the adapters.
        namespace = {"weight": kind.weight, "bias": kind.bias, "__module__": __name__}
        _tuned_classes[kind] = type(f"Tuned{kind.__name__}", (TunedLayer, kind), namespace)
    return _tuned_classes[kind]


def __getattr__(name: str) -> type:
    # Unpickling a layer looks up its class here.
    for kind in (*LAYER_KINDS, VeraParameter):
        if name == f"Tuned{kind.__name__}":
            return _tuned_class(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def tuned_layer(module: nn.Module) -> Any:
    """Wrap an adaptable module in a layer for PEFT, initially without adapters."""
    return _tuned_class(layer_class(module))(module, geometry(module))


def tuned_parameter(module: nn.Module, name: str) -> Any:
    """Create a layer for PEFT, initially without adapters, for a parameter that its module reads itself."""
    size, transposed = parameter_layout(module, name)
    return _tuned_class(VeraParameter)(module, name, size, transposed=transposed)


def put_in_place_of(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Replace `module` with `other` everywhere in a model, except inside `other`."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module and parent is not other:
                parent._modules[name] = other
                follow_replacement(parent)
