"""veratune's layers inside the `peft` package, for everything that asks for a `peft.PeftModel`.

    from veratune.integrations.peft import VeratuneConfig, install

    install()  # once, before the first configuration is made or read
    model = peft.get_peft_model(model, VeratuneConfig(target_modules="all-linear"))

`PeftModel.from_pretrained`, transformers' `Trainer`, and whatever else knows PEFT's models then work with it. PEFT
writes the files: the vectors, and modules trained in full; no projections. `veratune.VeraModel` reads them, and PEFT
what a `VeraModel` has written.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import InitVar, dataclass, replace
from functools import partial
from typing import Any, Self

try:
    import peft
    from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, _maybe_include_all_linear_layers
    from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper, PeftType
    from peft.utils.integrations import init_empty_weights
except ImportError:
    from veratune.integrations.peft.method import check_version

    check_version()  # says which versions there may be, which is the likely reason
    raise

import torch
from torch import Tensor, nn

from veratune.adapters.adapter_state import check_adapter_name
from veratune.adapters.names import ModuleName, adapted_layers, module_names, unwrapped
from veratune.adapters.plan import input_groups, make_scheme, vector_dtype
from veratune.adapters.surgery import StructureBefore, prepare, undone_on_error
from veratune.adapters.target import Target, parts_of
from veratune.adapters.target_errors import check_not_sharded, check_settings
from veratune.adapters.targets import parameter_targets
from veratune.checkpoint.peft_plugin import PLUGIN_TYPE
from veratune.checkpoint.validate import LoadedAdapter, other_projections
from veratune.config import PEFT_TYPE, VeraConfig, VeraFields, explains_unknown_fields
from veratune.config_fields import settings_of
from veratune.integrations.peft import files as peft_native
from veratune.integrations.peft import method as peft_method
from veratune.integrations.peft.layers import TunedLayer, TunedModule, tuned_layer, tuned_parameter
from veratune.integrations.peft.matching import is_meant
from veratune.integrations.peft.saved_states import saved_states_noted
from veratune.integrations.peft.saving import saving
from veratune.integrations.peft.state import tensors_to_load, tensors_to_save, without_adapter_name
from veratune.layers import AdapterEntry, ComputeSettings, InputGroup, VectorInit, VeraLinear
from veratune.layers.guards import guard_loading
from veratune.layers.input_cache import InputCache
from veratune.layers.pending import check_nothing_pending
from veratune.layers.quantized import keep_differentiable, leave_to_library
from veratune.layers.registry import adaptable_parameters, geometry, layer_class, why_not_adaptable
from veratune.ops.calibration import load_calibration
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import Scheme, Side, Stored
from veratune.utils.torch_private import follow_replacement


def install(*, replace_vera: bool = False) -> None:
    """Make `VeratuneConfig` and veratune's own files known to PEFT. A second call does nothing more.

    Nothing else changes PEFT: neither importing this package nor making a configuration. Where transformers' `Trainer`
    is in use when an adapter is saved, its `load_best_model_at_end` then also loads adapters not called "default".

    Args:
        replace_vera: let PEFT's own `VeraConfig` use veratune's layers as well, so that a script that knows nothing of
            veratune runs on them. Files stay PEFT's, with the same outputs.

    Raises:
        ImportError: PEFT is of a version in which this does not work.
    """
    peft_method.check_version()
    if not peft_method.has_method(PLUGIN_TYPE):
        peft_method.add_method(PLUGIN_TYPE, VeratuneConfig, VeratuneTuner)
        placing = partial(peft_native.placing, own_tuner=VeratuneTuner)
        peft_method.add_reader(PEFT_TYPE, VeratuneConfig, peft_native.reading, placing)
        peft_method.wrap_changes(_undone_if_adapted)
        peft_method.add_writer(partial(saving, own_tuner=VeratuneTuner))
    if replace_vera:
        peft_method.replace_vera(PeftVeraTuner)


@explains_unknown_fields
@dataclass
class VeratuneConfig(VeraFields, peft.PeftConfig):
    """A configuration for PEFT, with the fields of `veratune.VeraConfig` that PEFT does not handle itself.

    `fingerprint` is of the projections; it is filled in, and compared when an adapter is loaded.

    Raises:
        RuntimeError: `install()` was not called, and PEFT could not use this.
    """

    fingerprint: str | None = None
    # What the JSON beside a native file has besides, and is of no use here.
    save_projection: InitVar[bool] = False
    base: InitVar[dict[str, Any] | None] = None

    def __post_init__(self, save_projection: bool, base: dict[str, Any] | None) -> None:
        peft_method.check_installed(PLUGIN_TYPE)
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._native: LoadedAdapter | None = None
        self._of_native_json = self.peft_type == PEFT_TYPE
        self.peft_type = PeftType[PLUGIN_TYPE]
        if save_projection and not self._of_native_json:
            raise ValueError(
                "save_projection=True cannot be had in PEFT: a VeratuneConfig's files have no projections, only their"
                " fingerprint. Leave it out, or save with veratune.VeraModel, whose VeraConfig has save_projection"
            )
        self._expected = self.fingerprint  # what a file says, where this comes from one
        self.checked()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the configuration of an adapter that PEFT wrote, or of veratune's own."""
        peft_method.check_installed(PLUGIN_TYPE)
        read: Any = super().from_pretrained
        config: Any = read(pretrained_model_name_or_path, subfolder, **kwargs)
        if not getattr(config, "_of_native_json", False):
            return config
        return cls._of_native(*peft_native.read_for_peft(pretrained_model_name_or_path, subfolder=subfolder, **kwargs))

    @classmethod
    def _of_native(cls, loaded: LoadedAdapter, fingerprint: str) -> Self:
        own = loaded.config
        # PEFT names tasks otherwise, and an empty list is a choice there.
        kept = {*settings_of(VeraFields), *VeraConfig.names_with(peft="any")} - {"modules_to_save", "task_type"}
        config = cls(
            **{name: getattr(own, name) for name in kept},
            task_type=peft_native.task_type_for_peft(loaded),
            modules_to_save=own.modules_to_save or None,
            fingerprint=fingerprint,
        )
        config._native = loaded
        return config

    def checked(self) -> VeraConfig:
        """Return the same as a `veratune.VeraConfig`, which refuses what cannot be."""
        # An empty list says beside target_parameters that there is no layer to adapt.
        wanted = None if self.target_parameters and not self.target_modules else self.target_modules
        return VeraConfig(
            **{name: getattr(self, name) for name in settings_of(VeraFields)} | {"target_modules": wanted}
        )


@dataclass(frozen=True)
class _Plan:
    """All that is needed to add one adapter, found before the model is changed.

    Attributes:
        config: its settings.
        scheme: its projections.
        layers: the layers to adapt, by the id of the module or of the tuned layer that another adapter made of it.
        parameters: the parameters to adapt that their modules read themselves.
        groups: what layers of one input have in common, by the target's name.
    """

    config: VeraConfig
    scheme: Scheme
    layers: dict[int, Target]
    parameters: list[Target]
    groups: dict[str, InputGroup]


class VeratuneTuner(BaseTuner):
    """What PEFT makes of a model for a `VeratuneConfig`."""

    prefix = "vera_lambda_"
    tuner_layer_cls = TunedLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
    _plan: _Plan | None = None
    _named: set[str] | None = None
    # Parameters of modules trained in full that were trainable when the adapters were disabled.
    _frozen: Sequence[nn.Parameter] = ()
    _names: Mapping[str, ModuleName] | None = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # A PeftModel gives all its configurations by name, inject_adapter_in_model gives one.
        if getattr(peft_config, "_native", None) is not None:
            raise ValueError(
                f"{peft_config._native.origin} is in veratune's own format, which transformers' load_adapter and"
                " inject_adapter_in_model cannot read: use peft.PeftModel.from_pretrained or"
                " veratune.VeraModel.from_pretrained"
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse an adapter for each row, which PEFT would pass over in silence."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("veratune's layers in PEFT cannot take adapter_names: choose one adapter with set_adapter")
        yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, and refuse an adapter for each row here as well."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return super().forward(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; whatever is wrong with it is found before the model is changed."""
        check_adapter_name(adapter_name)
        # What a file holds says which layers it is for, where PEFT is given it.
        state = kwargs.get("state_dict")
        self._named = None if state is None else {key.rsplit(f".{self.prefix}", 1)[0] for key in state}
        try:
            with undone_on_error(self), saved_states_noted(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                prepare(model)
        finally:
            self._plan = self._named = self._names = None
        config: Any = self.peft_config[adapter_name]
        if isinstance(config, VeratuneConfig):
            config._native = None  # what it is on has names in the configuration now

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters; those that were loaded or configured for inference only stay frozen."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        with undone_on_error(self), saved_states_noted(self):
            self._frozen = []
            super().set_adapter(adapter_name, inference_mode=inference_mode)
            for name in names:
                if name in self.peft_config and self.peft_config[name].inference_mode:
                    self.set_requires_grad(name, False)
            if not inference_mode:
                keep_differentiable(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, or leave all as it is if that fails."""
        with undone_on_error(self), saved_states_noted(self, removed=adapter_name):
            super().delete_adapter(adapter_name)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        # PEFT makes copies of modules trainable again that were frozen before.
        copies = [
            parameter
            for wrapper in self.model.modules()
            if isinstance(wrapper, AuxiliaryTrainingWrapper)
            for parameter in wrapper.parameters()
        ]
        trainable = [*self._frozen, *(parameter for parameter in copies if parameter.requires_grad)]
        with undone_on_error(self), saved_states_noted(self):
            super()._enable_adapter_layers(enabled)
            if enabled:
                for parameter in copies:
                    parameter.requires_grad_(any(parameter is other for other in trainable))
            self._frozen = [] if enabled else trainable

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT's says None, and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        check_nothing_pending(self.model, "merge_and_unload" if merge else "unload")
        if not merge:
            for layer in adapted_layers(self.model).values():
                if layer.merged_adapters:
                    layer.unmerge()
        # First the wrappers that hold tuned layers themselves, which PEFT would take off with what is in them.
        for wrapper in [module for module in self.model.modules() if isinstance(module, TunedModule)]:
            if merge:
                wrapper.merge(adapter_names)
            _put_in_place_of(self.model, wrapper, wrapper.base_layer)
        unload: Any = super()._unload_and_optionally_merge
        model: nn.Module = unload(merge, progressbar, safe_merge, adapter_names)
        prepare(model)
        guard_loading(model)
        leave_to_library(model)
        return model

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None and getattr(peft_config, "target_parameters", None):
            peft_config.target_modules = set()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # PEFT calls this for every adapter, after it has filled the configuration in and before it looks for layers.
        if getattr(peft_config, "_of_native_json", False):
            raise ValueError(
                "this configuration was read from the JSON beside a veratune adapter, without the adapter: give the"
                " directory to peft.PeftModel.from_pretrained or load_adapter of a PeftModel, without config="
            )
        native: LoadedAdapter | None = getattr(peft_config, "_native", None)
        if native is not None:
            peft_native.name_targets(peft_config, native, model)
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
        if native is not None:
            peft_native.check_named(peft_config, native, {target.name for target in targets})
        if not targets:
            return  # PEFT says so
        check_settings(config, targets)
        check_not_sharded(targets)
        scheme = make_scheme(config, targets)
        self._check_projections(peft_config, scheme)
        self._plan = _Plan(config, scheme, layers, parameters, input_groups(targets, scheme))

    def _matched_layers(self, peft_config: Any, config: VeraConfig, model: nn.Module) -> dict[int, Target]:
        """Return the layers that PEFT is about to hand over, having checked that they can be adapted."""
        found: dict[int, Target] = {}
        names = self._names = module_names(model)
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            public = names[name].public
            if not name or names[name].wrapper or (inside and name.startswith(inside)):
                continue
            if isinstance(module, TunedLayer):
                inside = (*inside, f"{name}.")
            wanted = _means(peft_config, public) if self._named is None else public in self._named
            if not wanted:
                continue
            if self._named is not None and name.removeprefix("_orig_mod.") != public:
                raise ValueError(
                    f"{public} is in a wrapper ({name}), where PEFT does not find it by the names of a state dict: put"
                    " the adapter on the model before it is wrapped"
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
        """Go by names without torch's wrappers, which are no targets themselves."""
        name = None if self._names is None else self._names.get(key)
        if name is None:
            return _means(peft_config, key)
        return False if name.wrapper else _means(peft_config, name.public)

    def _matched_parameters(self, config: VeraConfig, model: nn.Module) -> list[Target]:
        """Return the parameters that target_parameters names."""
        wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        trained = {id(module) for wrapper in wrappers for module in wrapper.modules()}
        found = parameter_targets(model, config) if config.target_parameters else []
        if any(target.module is model for target in found):
            raise ValueError(
                f"target_parameters={config.target_parameters!r}: parameters of the outermost module cannot be adapted"
                " in PEFT, which replaces modules: put the model into another module, or use veratune.get_peft_model"
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
        plan = self._plan
        assert plan is not None and id(target) in plan.layers
        layer: Any = target
        if not isinstance(target, TunedLayer):
            layer = tuned_layer(target)
            self._replace_module(parent, target_name, layer, target)
            follow_replacement(parent)
        self._add(plan, adapter_name, layer, plan.layers[id(target)])

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        plan = self._plan
        if plan is None:  # nothing to adapt, which PEFT will say
            return []
        made: dict[int, TunedModule] = {}
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for target in plan.parameters:
                assert target.parameter is not None
                holder: Any = made.get(id(target.module), target.module)
                if not isinstance(holder, TunedModule):
                    holder = made[id(target.module)] = TunedModule(target.module)
                    _put_in_place_of(model, target.module, holder)
                if target.parameter not in holder.adapted:
                    holder.adapted[target.parameter] = tuned_parameter(holder.base_layer, target.parameter)
                self._add(plan, adapter_name, holder.adapted[target.parameter], target)
        return [target.name for target in plan.parameters]

    def _add(self, plan: _Plan, adapter_name: str, layer: Any, target: Target) -> None:
        config, weight = plan.config, layer.base_weight
        layer.add_adapter(
            adapter_name,
            target.name,
            plan.scheme,
            # PEFT widens half-precision vectors itself, after this.
            VectorInit(target.r, config.d_initial, config.init_weights, vector_dtype(weight.dtype, autocast=False)),
            ComputeSettings(config.vera_dropout, config.route, config.memory),
            plan.groups[target.name],
            target.parts,
        )
        load_calibration(weight.device)
        layer.activate(self.active_adapters)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge, after all layers have been checked."""
        self._check_mergeable(adapter_names, safe_merge)
        with undone_on_error(self):
            super().merge_adapter(adapter_names, safe_merge=False)
            guard_loading(self)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`, to the exact bits."""
        with undone_on_error(self):
            super().unmerge_adapter()  # type: ignore[no-untyped-call]
            guard_loading(self)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge for good, after all layers have been checked."""
        self._check_mergeable(adapter_names, safe_merge, for_good=True)
        merged: nn.Module = super().merge_and_unload(progressbar, safe_merge=False, adapter_names=adapter_names)
        return merged

    def _check_mergeable(self, adapter_names: list[str] | None, safe: bool, *, for_good: bool = False) -> None:
        """Raise ValueError if adapters cannot be merged into some layer; nothing has been changed then."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for called, wrapper in self.model.named_modules():
            if isinstance(wrapper, AuxiliaryTrainingWrapper):
                self._check_saved(called, wrapper, names, for_good)
        for called, layer in adapted_layers(self.model).items():
            new = [name for name in names if name not in layer.merged_adapters]
            layer.check_mergeable(new, safe=safe, called=called)

    def _check_saved(self, called: str, wrapper: Any, names: list[str], for_good: bool) -> None:
        """Raise ValueError where merging would leave an adapter's vectors with another's copy of a module."""
        active = wrapper.active_adapters
        for name in names:
            if name in wrapper._get_available_adapters() and name not in active:
                raise ValueError(
                    f"cannot merge {name!r} while it is inactive, because it trains {called} in full, and merging"
                    f" would leave that out: call set_adapter({name!r}) first"
                )
        for name in active if for_good else []:
            if name not in names:
                raise ValueError(
                    f"cannot merge {names} for good while {name!r} is active, because its copy of {called} would stay"
                    f" in the model: call set_adapter({names!r}) first"
                )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        peft_method.let_trainer_find_best(VeratuneTuner)  # whose checkpoints are written by this
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
        """Return a configuration's settings as veratune has them."""
        settings: VeraConfig = peft_config.checked()
        return settings

    def _check_projections(self, peft_config: Any, scheme: Scheme) -> None:
        """Note the projections' fingerprint, after making sure that they are those it was trained with."""
        peft_config.fingerprint = scheme.fingerprint()
        if peft_config._expected not in (None, peft_config.fingerprint):
            found = peft_config.fingerprint
            raise other_projections("this adapter", peft_config.checked(), peft_config._expected, found)


class PeftVeraTuner(VeratuneTuner):
    """What PEFT makes of a model for its own `VeraConfig` after `install(replace_vera=True)`."""

    # As PEFT says of its own: transformers' load_adapter and inject_adapter_in_model would pass over stored A and B.
    uses_shared_state = True

    def _settings(self, peft_config: Any) -> VeraConfig:
        same = VeraConfig.names_with(peft="vera", selects=False)
        return VeraConfig(projection="peft", **{name: getattr(peft_config, name) for name in same})

    def _matched_layers(self, peft_config: Any, config: VeraConfig, model: nn.Module) -> dict[int, Target]:
        found = super()._matched_layers(peft_config, config, model)
        for target in found.values():
            if not issubclass(layer_class(unwrapped(target.module)), VeraLinear):
                raise ValueError(
                    f"{target.name} cannot be adapted with PEFT's own VeraConfig, whose files are for linear layers"
                    " alone: exclude it, or use VeratuneConfig"
                )
        return found

    def _check_projections(self, peft_config: Any, scheme: Scheme) -> None:
        pass  # PEFT's files have no fingerprint, but may have the projections

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if config.save_projection:
            scheme = _entries(model, adapter_name)[0].a.projection.scheme
            a, b = (scheme.draw(s, range(config.r), _width(scheme, s), torch.device("cpu")) for s in _SIDES)
            found[f"base_model.vera_A.{adapter_name}"] = a
            found[f"base_model.vera_B.{adapter_name}"] = b.t().contiguous()
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        vectors = {name: tensor for name, tensor in state_dict.items() if name not in _PROJECTION_KEYS}
        stored = [state_dict[name] for name in _PROJECTION_KEYS if name in state_dict]
        if config.save_projection and len(stored) != len(_PROJECTION_KEYS):
            raise ValueError("save_projection is true, but the file has no projections")
        if stored:
            _use_projections(model, adapter_name, *stored)
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, vectors)
        return remapped


_SIDES: tuple[Side, Side] = ("A", "B")
_PROJECTION_KEYS = ("base_model.vera_A", "base_model.vera_B")


def _entries(model: nn.Module, adapter_name: str) -> list[AdapterEntry]:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, TunedLayer)]
    return [layer.entries[adapter_name] for layer in layers if adapter_name in layer.entries]


def _width(scheme: Any, side: Side) -> int:
    """Return the width of one side of PEFT's projections, drawn or read from a file."""
    if isinstance(scheme, Stored):
        return int((scheme.a if side == "A" else scheme.b).shape[1])
    return int(scheme.max_in if side == "A" else scheme.max_out)


def _use_projections(model: nn.Module, adapter_name: str, a: Tensor, b: Tensor) -> None:
    """Let an adapter use projections from a file where they are not those that its key gives here."""
    entries = _entries(model, adapter_name)
    scheme = entries[0].a.projection.scheme
    stored = Stored.from_tensors(a, b)
    cpu = torch.device("cpu")
    drawn = [scheme.draw(side, range(a.shape[0]), _width(scheme, side), cpu) for side in _SIDES]
    if torch.equal(drawn[0], stored.a) and torch.equal(drawn[1], stored.b):
        return
    groups: dict[int, InputGroup] = {}
    layers: list[Any] = [module for module in model.modules() if isinstance(module, TunedLayer)]
    for layer in layers:
        entry = layer.entries.get(adapter_name)
        if entry is not None:
            view = projection_pool.view(stored, "A", entry.rank, layer.in_features)
            group = groups.setdefault(id(entry.group), InputGroup(view, InputCache(), entry.group.size))
            own = projection_pool.view(stored, "B", entry.rank, layer.out_features)
            layer.entries[adapter_name] = replace(entry, group=group, b=(own,), scale=stored.scale(entry.rank))


@contextmanager
def _undone_if_adapted(model: nn.Module) -> Iterator[None]:
    """Undo all changes to a model with veratune's layers, or that has got them, if anything is raised."""
    before = StructureBefore(model)
    adapted = _is_adapted(model)
    try:
        yield
    except BaseException:
        if adapted or _is_adapted(model):
            before.put_back()
        raise


def _is_adapted(model: nn.Module) -> bool:
    return any(isinstance(module, TunedLayer | TunedModule) for module in model.modules())


def _put_in_place_of(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Put another module wherever a module stands, but into the other one itself."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module and parent is not other:
                parent._modules[name] = other
                follow_replacement(parent)


def _means(peft_config: Any, name: str) -> Any:
    """Return whether PEFT's rules mean a module, as PEFT says it; its own way gives patterns from files to `re`."""
    meant = is_meant(peft_config, name)
    return _ExcludedModule() if meant is None else meant
