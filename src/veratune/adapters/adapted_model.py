"""Adapters on a model: adding, choosing and removing them. Nothing here reads or writes files."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from veratune.adapters.adapter_state import as_names, check_adapter_name
from veratune.adapters.merging import MergingModel
from veratune.adapters.names import base_modules
from veratune.adapters.plan import AdapterPlan, input_groups, plan_adapter, vector_dtype
from veratune.adapters.routes_table import RouteTable, explain_routes
from veratune.adapters.surgery import replace_modules
from veratune.adapters.target import Target
from veratune.adapters.target_errors import check_not_sharded
from veratune.config import VeraConfig
from veratune.layers import ComputeSettings, SavedModule, VectorInit, VeraLayer, VeraModule
from veratune.layers.biases import AdapterBiases
from veratune.layers.pending import check_nothing_pending
from veratune.layers.quantized import keep_differentiable
from veratune.layers.recomputation import StateLog
from veratune.layers.registry import adapt, adapt_parameter
from veratune.ops.calibration import load_calibration
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import Scheme

# Held from the look at a model to the end of its change: two threads must not take one name, or replace one layer. It
# is not a model's own, so that models can be copied.
ADDING = threading.RLock()


class AdaptedModel(MergingModel):
    """A model whose linear layers have VeRA adapters. The adapters are put into the model itself, in place.

    What this class does not have itself is looked up in the model, so that it can stand wherever the model stood.

    Attributes:
        base_model: the model, with adapted layers in it.
        peft_config: adapter name to its configuration.
        autocast_adapter_dtype: whether vectors on a half-precision layer are float32 rather than of its dtype.
    """

    # Looking at adapters

    def projection_scheme(self, adapter_name: str) -> Scheme:
        """Return the description of an adapter's projections."""
        self._check_known([adapter_name])
        return self._schemes[adapter_name]

    def get_base_model(self) -> nn.Module:
        """Return the model itself, with the adapted layers in it. `unload` takes them out."""
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return (number of trainable parameters, number of all parameters). Projections are no parameters."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(count for count, trainable in counts if trainable), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the two numbers of `get_nb_trainable_parameters` and their ratio."""
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
        """Return the route of each layer of an adapter, with operations, memory and time of all that it could take.

        Printing the result gives a table. The times are estimates by the device's profile (see `calibrate`).

        Left out are layers without a choice (convolutions, embeddings, packed attention) and those whose route follows
        from how their module computes (experts, fused layers in parts). A compiled model chooses as for 8, 256 or 4,096
        tokens, so that it is not compiled anew for each number.

        Args:
            tokens: the product of the input's leading dimensions (batch times sequence length).
            adapter_name: which adapter; the active one by default.
            dtype: the compute dtype; the layers' own by default.
            device: the device; the layers' own by default.
            training: whether the vectors' gradients are wanted.

        Raises:
            ValueError: an unknown adapter, or a number of tokens below one.
        """
        name = self.active_adapter if adapter_name is None else adapter_name
        self._check_known([name])
        if tokens < 1:
            raise ValueError(f"tokens={tokens} is not allowed: it must be at least 1")
        return explain_routes(self.vera_layers().items(), name, tokens, dtype=dtype, device=device, training=training)

    # Adding and choosing adapters

    def add_adapter(self, adapter_name: str, peft_config: VeraConfig) -> None:
        """Add another adapter, inactive until `set_adapter` chooses it. It starts as an exact no-op (b = 0).

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
                f"adapter_name={adapter_name!r} is taken: this model has the adapters {list(self.peft_config)};"
                " delete_adapter removes one"
            )

    def install_adapter(self, adapter_name: str, plan: AdapterPlan) -> None:
        """Carry out a plan that `plan_adapter` made for this model as it is now, or leave the model unchanged."""
        check_not_sharded(plan.targets)
        with self.undone_on_error():
            self._install(adapter_name, plan)

    def _install(self, adapter_name: str, plan: AdapterPlan) -> None:
        replacements: dict[int, nn.Module] = {}
        self._swap_biases([])  # the new adapter starts from the model's own
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
        groups = input_groups(plan.targets, plan.scheme)
        settings = ComputeSettings(plan.config.vera_dropout, plan.config.route, plan.config.memory)
        for target in plan.targets:
            layer = _layer_for(target, replacements)
            layer.add_adapter(
                adapter_name,
                target.name,
                plan.scheme,
                self._vector_init(plan.config, target.r, layer.base_weight.dtype),
                settings,
                groups[target.name],
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
        """Choose the active adapter, or several whose deltas add. All others are frozen.

        The chosen ones become trainable, but for those that were loaded or configured for inference only.

        Args:
            adapter_name: a name or a list of names; an empty list leaves the base model alone.
            inference_mode: leave the chosen adapters frozen as well.

        Raises:
            ValueError: an unknown name, adapters that cannot be active together, while adapters are merged, or within
                `disable_adapter`.
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
        """Remove an adapter and what only it used. If it was active, no other adapter takes its place.

        Raises:
            ValueError: an unknown name, or adapters are merged, or the backward pass of a checkpointed block is still
                to come that would not notice what is missing.
        """
        self._check_known([adapter_name])
        self._check_unmerged("delete_adapter")
        if self._owns_wrappers(adapter_name):
            check_nothing_pending(self, "delete_adapter")
        with self.undone_on_error():
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
            # What is gone cannot notice that it is missing where a block is computed again.
            for log in left:
                log.void()
        del self.peft_config[adapter_name], self._schemes[adapter_name]

    def _owns_wrappers(self, adapter_name: str) -> bool:
        """Return whether what has computed with an adapter is the model's own again once this adapter is removed."""
        logs = [layer._log for layer in self._layers() if set(layer.entries) == {adapter_name}]
        saved = [module for module in self.modules() if isinstance(module, SavedModule)]
        logs += [module._log for module in saved if set(module.modules_to_save) == {adapter_name}]
        logs += [self._biases[adapter_name].log] if adapter_name in self._biases else []
        return any(log.has_computed() for log in logs)

    def _logs(self) -> list[StateLog]:
        """Return what the layers, the saved modules and the biases know of the states they computed in."""
        owners = [*self.modules(), *self._biases.values()]
        return [log for owner in owners for log in vars(owner).values() if isinstance(log, StateLog)]

    # Training

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn gradient checkpointing on in the model, and let its inputs require gradients, as it needs then."""
        model: Any = self.base_model
        model.gradient_checkpointing_enable(*args, **kwargs)
        self._let_inputs_require_grad()


def _layer_for(target: Target, replacements: dict[int, nn.Module]) -> VeraLayer:
    """Return the adapted layer that a target is, or becomes; what is made for it is noted in `replacements`."""
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
