"""The adapters of a model: which exist, which are active, and their parameters."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from veratune.adapters.adapter_state import AdapterState
from veratune.adapters.names import adapted_layers, base_modules, base_parameters, first_names, public_state
from veratune.adapters.surgery import undone_on_error
from veratune.adapters.wrapper import ForwardOfBase, ModelWrapper
from veratune.config import VeraConfig
from veratune.layers import SavedModule, VeraLayer
from veratune.layers.biases import AdapterBiases
from veratune.projections.schemes import Scheme


class AdapterConfigs(dict[str, VeraConfig]):
    """Adapter name to its configuration. Configurations of other classes, which PEFT might add, are rejected."""

    def __setitem__(self, name: str, config: VeraConfig) -> None:
        _check_config(config)
        super().__setitem__(name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        added = dict(*args, **kwargs)
        for config in added.values():
            _check_config(config)
        super().update(added)


def _check_config(config: object) -> None:
    if not isinstance(config, VeraConfig):
        raise TypeError(
            f"a {type(config).__name__} cannot be added to a VeraModel: call its add_adapter with a VeraConfig, or pass"
            " PEFT the model that merge_and_unload() or unload() returns"
        )


def saved_copies(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """Return an adapter's copies of the modules that it trains in full, by their names in the model without adapters.

    Args:
        model: the model without a wrapper.
        adapter_name: which adapter.
    """
    return {
        name: module.modules_to_save[adapter_name]
        for name, module in first_names(base_modules(model), SavedModule).items()
        if adapter_name in module.modules_to_save
    }


class AdapterSet(ModelWrapper):
    """A model and its adapters: which exist, which are active, and their parameters.

    Attributes:
        base_model: the model, with adapted layers in it.
        peft_config: adapter name to its configuration.
        autocast_adapter_dtype: whether the vectors of a half-precision layer are float32 instead of the layer's dtype.
    """

    def __init__(self, model: nn.Module, *, autocast_adapter_dtype: bool = True) -> None:
        super().__init__()
        self.peft_config: dict[str, VeraConfig] = AdapterConfigs()
        self.autocast_adapter_dtype = autocast_adapter_dtype
        self._schemes: dict[str, Scheme] = {}
        self._biases: dict[str, AdapterBiases] = {}
        self._active: list[str] = []
        self._disabled = 0
        # Stored by name, because sharding, offloading and merging replace the parameters themselves.
        self._trainable_before = {name for name, parameter in base_parameters(model) if parameter.requires_grad}
        self.base_model = model
        self.training = model.training
        model.requires_grad_(False)
        self._inputs_require_grad = False
        if _checkpoints(model):
            self._let_inputs_require_grad()

    forward = ForwardOfBase()

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in the order in which they were activated."""
        return list(self._active)

    @property
    def active_adapter(self) -> str:
        """The name of the only active adapter.

        Raises:
            ValueError: no adapter is active, or several are.
        """
        if len(self._active) != 1:
            remedy = (
                "pass adapter_name, or choose one with set_adapter" if self.peft_config else "all adapters were removed"
            )
            raise ValueError(f"there is no single active adapter (active_adapters is {self._active}): {remedy}")
        return self._active[0]

    @property
    def merged_adapters(self) -> list[str]:
        """The names of the adapters that are currently merged into the weights."""
        merged = {name for layer in self._layers() for name in layer.merged_adapters}
        return [name for name in self.peft_config if name in merged]

    def adapter_state(self, adapter_name: str) -> AdapterState:
        """Return the tensors of an adapter by their names in the model without adapters."""
        self._check_known([adapter_name])
        return AdapterState(
            vectors={
                name: layer.vectors(adapter_name)
                for name, layer in adapted_layers(self.base_model).items()
                if adapter_name in layer.entries
            },
            saved={name: public_state(copy) for name, copy in saved_copies(self.base_model, adapter_name).items()},
            biases=dict(self._biases[adapter_name].parameters()) if adapter_name in self._biases else {},
        )

    def vera_layers(self) -> dict[str, VeraLayer]:
        """Return the adapted layers by their names in the model without adapters."""
        return adapted_layers(self.base_model)

    def undone_on_error(self) -> AbstractContextManager[None]:
        """Return a context manager that undoes all changes to the model and its adapters if an exception is raised.

        In-place changes of tensors' values are not undone.
        """
        return undone_on_error(self, *self._biases.values())

    def _activate(self, names: Sequence[str]) -> None:
        for name, biases in self._biases.items():
            if biases.installed != (name in names):
                biases.check_swappable()
        self._active = list(dict.fromkeys(names))
        for layer in self._layers():
            layer.activate(self._active)
        self._choose_saved()

    def _computing(self) -> list[str]:
        """Return the adapters that affect outputs: those merged into the weights, and the active ones."""
        return list(dict.fromkeys([*self.merged_adapters, *self._active]))

    def _choose_saved(self) -> None:
        """Activate the saved modules and biases of the adapters that affect outputs."""
        names = self._computing()
        for module in self.modules():
            if isinstance(module, SavedModule):
                module.activate(names)
        self._swap_biases(names)

    def _swap_biases(self, names: Sequence[str]) -> None:
        # Remove all before installing any: two adapters may train the same bias.
        for biases in self._biases.values():
            biases.swap(install=False)
        for name in names:
            if name in self._biases:
                self._biases[name].swap(install=True)

    def _layers(self) -> list[VeraLayer]:
        return [module for module in self.modules() if isinstance(module, VeraLayer)]

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise ValueError(
                    f"adapter {name!r} does not exist: this model has the adapters {list(self.peft_config)}"
                )

    def _check_outside(self, operation: str) -> None:
        if self._disabled:
            raise ValueError(
                f"{operation} cannot be used within disable_adapter() or only(), which restore the active and merged"
                " adapters on exit"
            )

    def _check_unmerged(self, operation: str) -> None:
        merged = self.merged_adapters
        if merged:
            raise ValueError(
                f"{operation} cannot be used while the adapters {merged} are merged: call unmerge_adapter first"
            )

    def _check_together(self, names: Sequence[str]) -> None:
        with_biases = [name for name in dict.fromkeys(names) if name in self._biases]
        if len(with_biases) > 1:
            raise ValueError(f"the adapters {with_biases} train biases and cannot be active together")
        for name, module in first_names(base_modules(self.base_model), SavedModule).items():
            owners = [adapter for adapter in dict.fromkeys(names) if adapter in module.modules_to_save]
            if len(owners) > 1:
                raise ValueError(
                    f"the adapters {owners} each have a trained copy of {name!r} and cannot be active together:"
                    " create adapters with modules_to_save=[] to train no copy"
                )

    def _let_inputs_require_grad(self) -> None:
        # Reentrant checkpointing computes no gradients in a block unless an input of the block requires them, which is
        # not the case if the embeddings are frozen.
        enable: Callable[[], None] | None = getattr(self.base_model, "enable_input_require_grads", None)
        if enable is not None and not self._inputs_require_grad:
            enable()
            self._inputs_require_grad = True


def _checkpoints(model: nn.Module) -> bool:
    """Return whether gradient checkpointing is enabled in a transformers model, in any supported version."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return False
