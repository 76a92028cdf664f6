"""Add, activate and remove the adapters of a model, without reading or writing files."""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from veratune.adapters.adapter_state import as_names, check_adapter_name
from veratune.adapters.merging import MergingModel
from veratune.adapters.names import base_modules
from veratune.adapters.plan import AdapterPlan, plan_adapter, vector_dtype
from veratune.adapters.routes_table import RouteTable, explain_routes
from veratune.adapters.surgery import replace_modules
from veratune.adapters.target import Target
from veratune.adapters.target_errors import check_not_sharded
from veratune.config import VeraConfig
from veratune.layers import ComputeSettings, SavedModule, VectorInit, VeraLayer, VeraModule
from veratune.layers.biases import AdapterBiases
from veratune.layers.pending import removal_noticed
from veratune.layers.quantized import keep_differentiable
from veratune.layers.recomputation import StateLog
from veratune.layers.registry import adapt, adapt_parameter
from veratune.ops.calibration import load_calibration
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import Scheme

# Held from the first check of a model until the change is complete, so that two threads cannot use the same name or
# replace the same layer. One lock for all models, because a model that holds a lock cannot be copied.
ADDING = threading.RLock()


class AdaptedModel(MergingModel):
    """A model with VeRA adapters. The model is modified in place.

    Attributes that this class does not define are looked up in the model, so a wrapper works wherever the model does.

    Attributes:
        base_model: the model, with adapted layers in it.
        peft_config: adapter name to its configuration.
        autocast_adapter_dtype: whether the vectors of a half-precision layer are float32 instead of the layer's dtype.
    """

    # Inspecting adapters

    def projection_scheme(self, adapter_name: str) -> Scheme:
        """Return the scheme of an adapter's projections."""
        self._check_known([adapter_name])
        return self._schemes[adapter_name]

    def get_base_model(self) -> nn.Module:
        """Return the model itself, with the adapted layers in it. `unload` removes them."""
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (number of trainable parameters, number of all parameters). Projections are not parameters."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(count for count, trainable in counts if trainable), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters, and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def explain_routes(
        self,
        tokens: int,
        adapter_name: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        training: bool = True,
    ) -> RouteTable:
        """Return the route of each layer of an adapter, with the operations, memory and time of each possible route.

        Print the result for a table. Times are estimated from the device's profile (see `calibrate`).

        Layers without a choice of route (convolutions, embeddings, packed attention, experts) are not listed, nor are
        layers in `fused_parts`, whose parts are routed separately. A compiled model uses the choice for 8, 256 or 4,096
        tokens, so that it is not recompiled for each number of tokens.

        Args:
            tokens: the product of the input's leading dimensions (batch times sequence length).
            adapter_name: the adapter's name; defaults to the active adapter.
            dtype: the compute dtype; defaults to each layer's.
            device: the device; defaults to each layer's.
            training: whether the gradients of the vectors are needed.

        Raises:
            TypeError: `tokens` is not an integer.
            ValueError: the adapter is unknown, or `tokens` is less than one.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_known([name])
        if not isinstance(tokens, int) or isinstance(tokens, bool):
            raise TypeError(f"tokens={tokens!r} is not allowed: it must be an integer")
        if tokens < 1:
            raise ValueError(f"tokens={tokens} is not allowed: it must be at least 1")
        return explain_routes(self.vera_layers().items(), name, tokens, dtype=dtype, device=device, training=training)

    # Adding and activating adapters

    def add_adapter(self, adapter_name: str, peft_config: VeraConfig) -> None:
        """Add another adapter, inactive until `set_adapter` activates it. It starts as an exact no-op (b = 0).

        Raises:
            ValueError: the name is taken or not allowed.
            TargetError: the configuration matches nothing in this model.
        """
        with ADDING:
            self.check_new_name(adapter_name)
            self.install_adapter(adapter_name, plan_adapter(self.base_model, peft_config))

    def check_new_name(self, adapter_name: str) -> None:
        """Raise ValueError unless the name is allowed and free."""
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(
                f"adapter_name={adapter_name!r} is taken: this model has the adapters {list(self.peft_config)}. Choose"
                " another name, or call delete_adapter first"
            )

    def install_adapter(self, adapter_name: str, plan: AdapterPlan) -> None:
        """Apply a plan made by `plan_adapter` for the current state of this model; on errors, nothing is changed."""
        check_not_sharded(plan.targets)
        with self.undone_on_error():
            self._install(adapter_name, plan)

    def _install(self, adapter_name: str, plan: AdapterPlan) -> None:
        replacements: dict[int, nn.Module] = {}
        self._swap_biases([])  # the new adapter copies the base model's biases
        modules = base_modules(self.base_model)
        for name in plan.config.modules_to_save or []:
            original = modules[name]
            saved = original if isinstance(original, SavedModule) else SavedModule(original)
            saved.add_adapter(adapter_name)
            if saved is not original:
                replacements[id(original)] = saved
        biases = AdapterBiases.copies_of(plan.bias_owners)
        self._swap_biases(self._computing())
        if plan.bias_owners:
            self._biases[adapter_name] = biases
        settings = ComputeSettings(plan.config.vera_dropout, plan.config.route, plan.config.memory)
        for target in plan.targets:
            layer = _layer_for(target, replacements)
            layer.add_adapter(
                adapter_name,
                target.name,
                plan.scheme,
                self._vector_init(plan.config, target.r, layer.base_weight.dtype),
                settings,
                plan.groups[target.name],
                target.parts,
            )
        replace_modules(self, replacements)
        for device in {layer.base_weight.device for layer in self._layers()}:
            load_calibration(device)
        self._schemes[adapter_name] = plan.scheme
        self.peft_config[adapter_name] = plan.config

    def _vector_init(self, config: VeraConfig, r: int, weight_dtype: torch.dtype) -> VectorInit:
        dtype = vector_dtype(weight_dtype, autocast=self.autocast_adapter_dtype)
        return VectorInit(r, config.d_initial, config.init_weights, dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Set the active adapter, or several adapters whose deltas are added. All others are frozen.

        The active adapters become trainable, except those that were loaded or configured for inference only.

        Args:
            adapter_name: a name or a list of names; with an empty list, only the base model runs.
            inference_mode: freeze the active adapters as well.

        Raises:
            ValueError: a name is unknown, the adapters cannot be active together, adapters are merged, or this is
                called within `disable_adapter` or `only`.
        """
        names = as_names(adapter_name)
        self._check_known(names)
        self._check_outside("set_adapter")
        self._check_unmerged("set_adapter")
        self._check_together(names)
        with self.undone_on_error():
            self._activate(names)
            for name in self.peft_config:
                trainable = name in names and not inference_mode and not self.peft_config[name].inference_mode
                for parameter in self.adapter_state(name).parameters():
                    if parameter.is_floating_point():
                        parameter.requires_grad_(trainable)
                if trainable:
                    keep_differentiable(self.base_model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and everything that only it used. If it was active, no other adapter is activated.

        Raises:
            ValueError: the name is unknown, adapters are merged, or as for `unload`.
        """
        self._check_known([adapter_name])
        self._check_unmerged("delete_adapter")
        owns = self._unwraps_computed(adapter_name)
        with removal_noticed(self.base_model, "delete_adapter") if owns else nullcontext(), self.undone_on_error():
            self._delete(adapter_name)
        projection_pool.trim()

    def _delete(self, adapter_name: str) -> None:
        self._activate([name for name in self._active if name != adapter_name])
        replacements: dict[int, nn.Module] = {}
        logs = self._logs()
        for module in list(self.modules()):
            if isinstance(module, VeraLayer) and adapter_name in module.entries:
                module.delete_adapter(adapter_name)
                if not module.entries and not module.of_parameter:
                    replacements[id(module)] = module.base_layer
            elif isinstance(module, VeraModule):
                module.delete_adapter(adapter_name)
                if not module.adapted:
                    replacements[id(module)] = module.base_layer
            elif isinstance(module, SavedModule) and adapter_name in module.modules_to_save:
                module.delete_adapter(adapter_name)
                if not module.modules_to_save:
                    replacements[id(module)] = module.original_module
        replace_modules(self, replacements)
        if adapter_name in self._biases:
            self._biases.pop(adapter_name).release()
        left = self._logs()
        if any(log.has_computed() for log in logs if log not in left):
            # A removed layer cannot detect its absence when a block is recomputed, so the remaining layers have to.
            for log in left:
                log.void()
        del self.peft_config[adapter_name], self._schemes[adapter_name]

    def _unwraps_computed(self, adapter_name: str) -> bool:
        """Return whether removing an adapter unwraps modules or restores biases that a forward pass with it used."""
        logs = [layer._log for layer in self._layers() if set(layer.entries) == {adapter_name}]
        saved = [module for module in self.modules() if isinstance(module, SavedModule)]
        logs += [module._log for module in saved if set(module.modules_to_save) == {adapter_name}]
        logs += [self._biases[adapter_name].log] if adapter_name in self._biases else []
        return any(log.has_computed() for log in logs)

    def _logs(self) -> list[StateLog]:
        """Return the logs that record in which states layers, saved modules and biases have run."""
        owners = [*self.modules(), *self._biases.values()]
        return [log for owner in owners for log in vars(owner).values() if isinstance(log, StateLog)]

    # Training

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enable gradient checkpointing in the model, and make its inputs require gradients for it."""
        model: Any = self.base_model
        model.gradient_checkpointing_enable(*args, **kwargs)
        self._let_inputs_require_grad()


def _layer_for(target: Target, replacements: dict[int, nn.Module]) -> VeraLayer:
    """Return a target's adapted layer; add any new wrapper to `replacements`."""
    module = target.module
    if target.parameter is None:
        if isinstance(module, VeraLayer):
            return module
        layer = adapt(module)
        replacements[id(module)] = layer
        return layer
    holder = module if isinstance(module, VeraModule) else replacements.get(id(module))
    if not isinstance(holder, VeraModule):
        holder = replacements[id(module)] = VeraModule(module)
    if target.parameter not in holder.adapted:
        holder.adapted[target.parameter] = adapt_parameter(holder.base_layer, target.parameter)
    return holder.parameter_layers()[target.parameter]
