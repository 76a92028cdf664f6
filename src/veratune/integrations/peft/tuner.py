"""The tuner that `peft` creates for a `VeratuneConfig`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from veratune.adapters.adapter_state import check_adapter_name
from veratune.adapters.names import ModuleName, module_names, unwrapped
from veratune.adapters.plan import AdapterPlan, make_scheme, vector_dtype
from veratune.adapters.surgery import prepare, undone_on_error
from veratune.adapters.target import Target, parts_of
from veratune.adapters.target_errors import check_not_sharded, check_settings
from veratune.adapters.targets import parameter_targets
from veratune.checkpoint.validate import LoadedAdapter, other_projections
from veratune.config import VeraConfig
from veratune.integrations.peft import files as peft_files
from veratune.integrations.peft import method as peft_method
from veratune.integrations.peft.config import VeratuneConfig
from veratune.integrations.peft.layers import (
    SharedProjections,
    TunedLayer,
    TunedModule,
    put_in_place_of,
    tuned_layer,
    tuned_parameter,
)
from veratune.integrations.peft.matching import is_meant
from veratune.integrations.peft.merging import MergingTuner
from veratune.integrations.peft.saved_states import saved_states_noted, wrappers_in
from veratune.integrations.peft.state import tensors_to_load, tensors_to_save, without_adapter_name
from veratune.layers import AdapterEntry, ComputeSettings, SavedModule, VectorInit, VeraLayer, VeraModule
from veratune.layers.entries import VECTOR_PREFIX
from veratune.layers.offloading import is_hooked, resident_copy
from veratune.layers.quantized import keep_differentiable
from veratune.layers.registry import adaptable_parameters, geometry, why_not_adaptable
from veratune.ops.calibration import load_calibration
from veratune.projections.schemes import Scheme
from veratune.utils.torch_private import follow_replacement, name_in_wrapper


class VeratuneTuner(MergingTuner):
    """PEFT's tuner for a `VeratuneConfig`."""

    prefix = VECTOR_PREFIX
    tuner_layer_cls = TunedLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
    _plan: AdapterPlan | None = None
    # The layers in the plan, by the id of the module, or of the tuned layer that wraps it for another adapter.
    _targets: Mapping[int, Target] | None = None
    # The adapter that is being added.
    _adding: str | None = None
    _named: set[str] | None = None
    # Parameters of modules trained in full that were trainable when the adapters were disabled.
    _frozen: Sequence[nn.Parameter] = ()
    _names: Mapping[str, ModuleName] | None = None

    @property
    def vera_A(self) -> SharedProjections:  # noqa: N802
        """PEFT's A, (r, max_in), of each adapter that uses one for all layers. Read-only."""
        return SharedProjections("A", self._entries())

    @property
    def vera_B(self) -> SharedProjections:  # noqa: N802
        """PEFT's B, (max_out, r), of each adapter that uses one for all layers. Read-only."""
        return SharedProjections("B", self._entries())

    def _entries(self) -> dict[str, AdapterEntry]:
        """Return each adapter's entry on one of its layers."""
        return {name: entry for layer in self._tuned_layers() for name, entry in layer.entries.items()}

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Reject `adapter_names` and `adapters` (one adapter per row), which would be silently ignored."""
        for name in ("adapter_names", "adapters"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"veratune's layers in PEFT do not support {name}: choose one adapter with set_adapter"
                )
        yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model. `adapter_names` is rejected here as well."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return super().forward(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter. Errors in its configuration are found before the model is changed."""
        check_adapter_name(adapter_name)
        _check_untuned(model)
        # If PEFT is given a file's state dict, its keys determine which layers to adapt.
        state = kwargs.get("state_dict")
        self._named = None if state is None else {key.rsplit(f".{self.prefix}", 1)[0] for key in state}
        before = _switched(model)
        disabled = any(module.disable_adapters for module in before)
        self._adding = adapter_name
        try:
            with undone_on_error(self), saved_states_noted(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                for wrapper in wrappers_in(self):
                    _keep_resident(wrapper, adapter_name)
                for module in _switched(model):
                    if disabled and all(module is not other for other in before):
                        module.enable_adapters(False)
                prepare(model)
        finally:
            self._plan = self._targets = self._named = self._names = self._adding = None
        config: Any = self.peft_config[adapter_name]
        if isinstance(config, VeratuneConfig):
            config._file = None  # the configuration now names the adapted layers

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; those that were loaded or configured for inference only stay frozen."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if self._adding is not None and self._adding not in names:
            return  # the active adapters stay; PEFT would unmerge and forget which were trainable or merged
        self._check_known(names)
        with undone_on_error(self), saved_states_noted(self):
            self._frozen = []
            super().set_adapter(adapter_name, inference_mode=inference_mode)
            for wrapper in wrappers_in(self):  # PEFT skips the copies of adapters that were not active before
                wrapper.set_requires_grad([name for name in wrapper._adapters if name not in names], False)
            for name in names:
                if name in self.peft_config and self.peft_config[name].inference_mode:
                    self.set_requires_grad(name, False)
            if not inference_mode:
                keep_differentiable(self.model)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known(names)
        super().set_requires_grad(names, requires_grad)
        copies = [copy for wrapper in wrappers_in(self) for name, copy in _copies(wrapper).items() if name in names]
        chosen = {id(parameter) for copy in copies for parameter in copy.parameters()}
        self._frozen = [parameter for parameter in self._frozen if id(parameter) not in chosen]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, or change nothing if an error occurs."""
        with undone_on_error(self), saved_states_noted(self, removed=adapter_name):
            super().delete_adapter(adapter_name)
            for name in self.active_adapters:  # which PEFT has made trainable
                if self.peft_config[name].inference_mode:
                    self.set_requires_grad(name, False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast an adapter's half-precision vectors to float32; PEFT's method also makes frozen vectors trainable."""
        layers = [layer for layer in self._tuned_layers() if adapter_name in layer.entries]
        flags = [vector.requires_grad for layer in layers for vector in layer.vectors(adapter_name).values()]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        vectors = [vector for layer in layers for vector in layer.vectors(adapter_name).values()]
        for vector, flag in zip(vectors, flags, strict=True):
            vector.requires_grad_(flag)

    def _tuned_layers(self) -> list[Any]:
        return [module for module in self.modules() if isinstance(module, TunedLayer)]

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # PEFT would make copies of modules trainable that were frozen before.
        copies = [parameter for wrapper in wrappers_in(self) for parameter in wrapper.parameters()]
        trainable = [*self._frozen, *(parameter for parameter in copies if parameter.requires_grad)]
        with undone_on_error(self), saved_states_noted(self):
            super()._enable_adapter_layers(enabled)
            if enabled:
                for parameter in copies:
                    parameter.requires_grad_(any(parameter is other for other in trainable))
            self._frozen = [] if enabled else trainable

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # the base layer is put back; PEFT's method also sets its `weight`, which not every layer has
            setattr(parent, child_name, new_module)
        put_in_place_of(self.model, child, new_module)  # PEFT replaces a module only in the first of several places

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        # The vectors in a file determine which layers are adapted, regardless of its configuration.
        named = getattr(peft_config, "target_parameters", None) or getattr(peft_config, "_file", None) is not None
        if peft_config.target_modules is None and named:
            peft_config.target_modules = set()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # PEFT calls this for every adapter, after completing the configuration and before searching for layers.
        file: LoadedAdapter | None = getattr(peft_config, "_file", None)
        if file is not None:
            peft_files.name_targets(peft_config, file, model)
        if peft_config.target_modules == "all-linear":
            _maybe_include_all_linear_layers(peft_config, model)
            names = module_names(model)
            peft_config.target_modules = {
                names[name].public if name in names else name for name in peft_config.target_modules
            }
        config = self._settings(peft_config)
        layers = self._matched_layers(peft_config, config, model)
        parameters = self._matched_parameters(config, model)
        targets = [*layers.values(), *parameters]
        if file is not None:
            peft_files.check_named(peft_config, file, {target.name for target in targets})
        if not targets:
            return  # PEFT raises an error
        check_settings(config, targets)
        check_not_sharded(targets)
        scheme = make_scheme(config, targets)
        self._check_projections(peft_config, scheme)
        self._plan, self._targets = AdapterPlan(config, targets, scheme), layers

    def _matched_layers(self, peft_config: Any, config: VeraConfig, model: nn.Module) -> dict[int, Target]:
        """Return the layers that PEFT is about to replace, after checking that they can be adapted."""
        found: dict[int, Target] = {}
        names = self._names = module_names(model)
        inside: tuple[str, ...] = ()
        compiled = name_in_wrapper(model) == "_orig_mod"
        for name, module in model.named_modules():
            public = names[name].public
            if not name or names[name].wrapper or (inside and name.startswith(inside)):
                continue
            if isinstance(module, TunedLayer):
                inside = (*inside, f"{name}.")
            wanted = _means(peft_config, public) if self._named is None else public in self._named
            if not wanted:
                continue
            if self._named is not None and (name.removeprefix("_orig_mod.") if compiled else name) != public:
                raise ValueError(
                    f"{public} is in a wrapper ({name}), where PEFT does not find it by the names in a state dict: add"
                    " the adapter before wrapping the model"
                )
            base = unwrapped(module)
            reason = why_not_adaptable(base)
            if reason is not None:
                instead = ", and name its weights in target_parameters" if adaptable_parameters(base) else ""
                raise ValueError(f"{public} cannot be adapted by VeRA, because {reason}: exclude it{instead}")
            size = geometry(base)
            parts = parts_of(public, size, config)
            found[id(module)] = Target(public, module, None, config.rank_of(public), size, parts)
        return found

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        """Match names without torch's wrappers, which are never targets themselves."""
        name = None if self._names is None else self._names.get(key)
        if name is None:
            return _means(peft_config, key)
        return False if name.wrapper else _means(peft_config, name.public)

    def _matched_parameters(self, config: VeraConfig, model: nn.Module) -> list[Target]:
        """Return the parameters that target_parameters names."""
        trained = {id(module) for wrapper in wrappers_in(model) for module in wrapper.modules()}
        found = parameter_targets(model, config) if config.target_parameters else []
        if any(target.module is model for target in found):
            raise ValueError(
                f"target_parameters={config.target_parameters!r}: parameters of the outermost module cannot be adapted"
                " in PEFT, which replaces modules: wrap the model in another module, or use veratune.get_peft_model"
            )
        return [target for target in found if id(target.module) not in trained]

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plan, targets = self._plan, self._targets
        assert plan is not None and targets is not None
        layer: Any = target
        if not isinstance(target, TunedLayer):
            layer = tuned_layer(target)
            self._replace_module(parent, target_name, layer, target)
            follow_replacement(parent)
        self._add(plan, adapter_name, layer, targets[id(target)])

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        plan = self._plan
        if plan is None:  # nothing to adapt: PEFT raises an error
            return []
        made: dict[int, TunedModule] = {}
        names: list[str] = []
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for target in plan.targets:
                if target.parameter is None:
                    continue
                holder: Any = made.get(id(target.module), target.module)
                if not isinstance(holder, TunedModule):
                    holder = made[id(target.module)] = TunedModule(target.module)
                    put_in_place_of(model, target.module, holder)
                if target.parameter not in holder.adapted:
                    holder.adapted[target.parameter] = tuned_parameter(holder.base_layer, target.parameter)
                self._add(plan, adapter_name, holder.adapted[target.parameter], target)
                names.append(target.name)
        return names

    def _add(self, plan: AdapterPlan, adapter_name: str, layer: Any, target: Target) -> None:
        config, weight = plan.config, layer.base_weight
        layer.add_adapter(
            adapter_name,
            target.name,
            plan.scheme,
            # PEFT casts half-precision vectors to float32 itself, after this.
            VectorInit(target.r, config.d_initial, config.init_weights, vector_dtype(weight.dtype, autocast=False)),
            ComputeSettings(config.vera_dropout, config.route, config.memory),
            plan.groups[target.name],
            target.parts,
        )
        load_calibration(weight.device)
        layer.activate(self.active_adapters)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        peft_method.let_trainer_find_best(VeratuneTuner)  # the Trainer's checkpoints are written through this method
        return tensors_to_save(model, config.bias, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return without_adapter_name(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return tensors_to_load(model, adapter_name, state_dict)

    def _settings(self, peft_config: Any) -> VeraConfig:
        """Return a PEFT configuration's settings as a `VeraConfig`."""
        settings: VeraConfig = peft_config.checked()
        return settings

    def _check_projections(self, peft_config: Any, scheme: Scheme) -> None:
        """Record the projections' fingerprint, and check that it is the one that the adapter was trained with."""
        peft_config.fingerprint = scheme.fingerprint()
        if peft_config._expected not in (None, peft_config.fingerprint):
            found = peft_config.fingerprint
            raise other_projections("this adapter", peft_config.checked(), peft_config._expected, found)


def _copies(wrapper: Any) -> dict[str, nn.Module]:
    """Return the copies in PEFT's wrapper of a module trained in full, by adapter name."""
    return dict(getattr(wrapper, "modules_to_save", {}))


def _keep_resident(wrapper: Any, adapter_name: str) -> None:
    """Replace an adapter's copy of an offloaded module with a resident copy, into which files can be loaded."""
    copied = _copies(wrapper).get(adapter_name)
    if copied is not None and any(is_hooked(module) for module in copied.modules()):
        trainable = any(parameter.requires_grad for parameter in copied.parameters())
        wrapper.modules_to_save[adapter_name] = resident_copy(wrapper.original_module).requires_grad_(trainable)


def _switched(model: nn.Module) -> list[Any]:
    """Return the modules of a model that PEFT enables and disables."""
    return [module for module in model.modules() if isinstance(module, TunedLayer | AuxiliaryTrainingWrapper)]


def _means(peft_config: Any, name: str) -> Any:
    """Return whether PEFT's rules select a module, as PEFT's function does, but without passing patterns to `re`."""
    meant = is_meant(peft_config, name)
    return _ExcludedModule() if meant is None else meant


def _check_untuned(model: nn.Module) -> None:
    """Raise ValueError if a `VeraModel` or a bank has adapted layers of this model."""
    for module in model.modules():
        if isinstance(module, VeraLayer | VeraModule | SavedModule) and not isinstance(
            module, TunedLayer | TunedModule
        ):
            raise ValueError(
                "this model has adapters of a VeraModel or a bank: pass PEFT the model that merge_and_unload() or"
                " unload() returns"
            )
