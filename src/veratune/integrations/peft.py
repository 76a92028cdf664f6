"""veratune's layers inside the `peft` package, for everything that asks for a `peft.PeftModel`.

    from veratune.integrations.peft import VeratuneConfig, install

    install()
    model = peft.get_peft_model(model, VeratuneConfig(target_modules="all-linear"))

`PeftModel.from_pretrained`, transformers' `Trainer`, and whatever else knows PEFT's models then work with it. PEFT
writes the files: the vectors, and modules trained in full; no projections. `veratune.VeraModel` reads them, and PEFT
what a `VeraModel` has written.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, Self

try:
    import peft
    from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
    from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper, PeftType
    from peft.utils.integrations import init_empty_weights
except ImportError:
    from veratune.integrations.peft_method import check_version

    check_version()  # says which versions there may be, which is the likely reason
    raise

import torch
from torch import Tensor, nn

from veratune.adapters import input_groups, make_source, vector_dtype
from veratune.checkpoint.plugin_format import PLUGIN_TYPE
from veratune.checkpoint.transfer import LoadedAdapter, other_projections
from veratune.config import PEFT_TYPE, VeraConfig
from veratune.integrations import peft_method, peft_native
from veratune.integrations.peft_layers import TunedLayer, TunedModule, tuned_layer, tuned_parameter
from veratune.layers import ComputeSettings, InputGroup, Slot, VectorInit, VeraLinear
from veratune.layers.fastpath import choose_paths
from veratune.layers.kinds import adaptable_parameters, geometry, layer_class, why_not_adaptable
from veratune.layers.quantised import keep_differentiable, leave_to_library
from veratune.layers.shared import SharedDown
from veratune.profiles import load_calibration
from veratune.projection import projection_pool
from veratune.routing import MemoryName, RouteName
from veratune.sources import Side, Source, Stored
from veratune.targets import Target, adapted_layers, check_settings, check_whole, parameter_targets, parts_of, unwrapped


def install(*, replace_vera: bool = False) -> None:
    """Make `VeratuneConfig` and veratune's own files known to PEFT. A second call does nothing more.

    Args:
        replace_vera: let PEFT's own `VeraConfig` use veratune's layers as well, so that a script that knows nothing of
            veratune runs on them. Files stay PEFT's, with the same outputs.

    Raises:
        ImportError: PEFT is of a version in which this does not work.
    """
    peft_method.check_version()
    if not peft_method.has_method(PLUGIN_TYPE):
        peft_method.add_method(PLUGIN_TYPE, VeratuneConfig, VeratuneTuner)
        peft_method.add_reader(PEFT_TYPE, VeratuneConfig, peft_native.reading, peft_native.placing)
    if replace_vera:
        peft_method.replace_vera(PeftVeraTuner)


@dataclass
class VeratuneConfig(peft.PeftConfig):
    """A configuration for PEFT, with the fields of `veratune.VeraConfig` that PEFT does not handle itself.

    `fingerprint` is of the projections; it is filled in, and compared when an adapter is loaded.
    """

    r: int = 256
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    fused_parts: dict[str, int | list[int]] = field(default_factory=dict)
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    d_initial: float = 0.1
    vera_dropout: float = 0.0
    bias: str = "none"
    init_weights: bool = True
    projection_prng_key: int = 0
    projection: str = "per_dimension"
    route: RouteName = "auto"
    memory: MemoryName = "balanced"
    fingerprint: str | None = None
    # What the JSON beside a native file has besides, and is of no use here.
    save_projection: InitVar[bool] = False
    base: InitVar[dict[str, Any] | None] = None

    def __post_init__(self, save_projection: bool, base: dict[str, Any] | None) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        install()
        self._native: LoadedAdapter | None = None
        self._of_native_json = self.peft_type == PEFT_TYPE
        self.peft_type = PeftType[PLUGIN_TYPE]
        self._expected = self.fingerprint  # what a file says, where this comes from one
        self.checked()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the configuration of an adapter that PEFT wrote, or of veratune's own."""
        read: Any = super().from_pretrained
        config: Any = read(pretrained_model_name_or_path, subfolder, **kwargs)
        if not getattr(config, "_of_native_json", False):
            return config
        return cls._of_native(*peft_native.read_for_peft(pretrained_model_name_or_path, subfolder=subfolder, **kwargs))

    @classmethod
    def _of_native(cls, loaded: LoadedAdapter, fingerprint: str) -> Self:
        own = loaded.config
        same = (
            "r target_modules target_parameters fused_parts exclude_modules layers_to_transform layers_pattern"
            " rank_pattern d_initial vera_dropout bias init_weights projection_prng_key projection route memory"
            " base_model_name_or_path revision inference_mode"
        )
        config = cls(
            **{name: getattr(own, name) for name in same.split()},
            task_type=peft_native.task_type_for_peft(loaded),
            modules_to_save=own.modules_to_save or None,
            fingerprint=fingerprint,
        )
        config._native = loaded
        return config

    def checked(self) -> VeraConfig:
        """Return the same as a `veratune.VeraConfig`, which refuses what cannot be."""
        own = (
            "r d_initial vera_dropout bias init_weights projection_prng_key projection rank_pattern route memory"
            " target_parameters fused_parts exclude_modules layers_to_transform layers_pattern modules_to_save"
        )
        # An empty list says beside target_parameters that there is no layer to adapt.
        wanted = None if self.target_parameters and not self.target_modules else self.target_modules
        return VeraConfig(target_modules=wanted, **{name: getattr(self, name) for name in own.split()})


@dataclass(frozen=True)
class _Plan:
    """All that is needed to add one adapter, found before the model is changed.

    Attributes:
        config: its settings.
        source: its projections.
        layers: the layers to adapt, by the id of the module or of the tuned layer that another adapter made of it.
        parameters: the parameters to adapt that their modules read themselves.
        groups: what layers of one input have in common, by the target's name.
    """

    config: VeraConfig
    source: Source
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

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse an adapter for each row, which PEFT would pass over in silence."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("veratune's layers in PEFT cannot take adapter_names: choose one adapter with set_adapter")
        yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; whatever is wrong with it is found before the model is changed."""
        # What a file holds says which layers it is for, where PEFT is given it.
        state = kwargs.get("state_dict")
        self._named = None if state is None else {key.rsplit(f".{self.prefix}", 1)[0] for key in state}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._plan = self._named = None
        config: Any = self.peft_config[adapter_name]
        if isinstance(config, VeratuneConfig):
            config._native = None  # what it is on has names in the configuration now
        choose_paths(model)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT's says None, and returns the model
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # First the wrappers that hold tuned layers themselves, which PEFT would take off with what is in them.
        for wrapper in [module for module in self.model.modules() if isinstance(module, TunedModule)]:
            if merge:
                wrapper.merge(adapter_names)
            _put_in_place_of(self.model, wrapper, wrapper.base_layer)
        unload: Any = super()._unload_and_optionally_merge
        model: nn.Module = unload(merge, progressbar, safe_merge, adapter_names)
        choose_paths(model)
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
        _maybe_include_all_linear_layers(peft_config, model)
        config = self._settings(peft_config)
        layers = self._matched_layers(peft_config, config, model)
        parameters = self._matched_parameters(config, model)
        targets = [*layers.values(), *parameters]
        if native is not None:
            peft_native.check_named(peft_config, native, {target.name for target in targets})
        if not targets:
            return  # PEFT says so
        check_settings(config, targets)
        check_whole(targets)
        source = make_source(config, targets)
        self._check_projections(peft_config, source)
        self._plan = _Plan(config, source, layers, parameters, input_groups(targets, source))

    def _matched_layers(self, peft_config: Any, config: VeraConfig, model: nn.Module) -> dict[int, Target]:
        """Return the layers that PEFT is about to hand over, having checked that they can be adapted."""
        found: dict[int, Target] = {}
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if not name or (inside and name.startswith(inside)):
                continue
            if isinstance(module, TunedLayer):
                inside = (*inside, f"{name}.")
            if self._named is None:
                wanted = self._check_target_module_exists(peft_config, name)
            else:
                wanted = name.removeprefix("_orig_mod.") in self._named
            if not wanted:
                continue
            base = unwrapped(module)
            reason = why_not_adaptable(base)
            if reason is not None:
                instead = ", and name its weights in target_parameters" if adaptable_parameters(base) else ""
                raise ValueError(f"{name} cannot be adapted by VeRA, because {reason}: exclude it{instead}")
            size = geometry(base)
            found[id(module)] = Target(name, module, None, config.rank_of(name), size, parts_of(name, size, config))
        return found

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
            plan.source,
            # PEFT widens half-precision vectors itself, after this.
            VectorInit(target.rank, config.d_initial, config.init_weights, vector_dtype(weight.dtype, autocast=False)),
            ComputeSettings(config.vera_dropout, config.route, config.memory),
            plan.groups[target.name],
            target.parts,
        )
        load_calibration(weight.device)
        layer.activate(self.active_adapters)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters, trainable unless for inference."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if not inference_mode:
            keep_differentiable(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge, after all layers have been checked."""
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge=False)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge for good, after all layers have been checked."""
        self._check_mergeable(adapter_names, safe_merge)
        merged: nn.Module = super().merge_and_unload(progressbar, safe_merge=False, adapter_names=adapter_names)
        return merged

    def _check_mergeable(self, adapter_names: list[str] | None, safe: bool) -> None:
        """Raise ValueError if adapters cannot be merged into some layer; nothing has been changed then."""
        names = self.active_adapters if adapter_names is None else adapter_names
        for called, layer in adapted_layers(self.model).items():
            new = [name for name in names if name not in layer.merged_adapters]
            layer.check_mergeable(new, safe=safe, called=called)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT has taken away every key with another adapter's name in it, which may be that of a layer.
        dropped = {
            key: vector.detach()
            for name, module in model.named_modules()
            if isinstance(module, TunedLayer) and any(f".{other}." in f".{name}." for other in unwanted_adapter_names)
            for key, vector in _vectors(module, name, adapter_name).items()
        }
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, {**dropped, **state_dict}, unwanted_adapter_names
        )
        return found

    def _settings(self, peft_config: Any) -> VeraConfig:
        """Return a configuration's settings as veratune has them."""
        settings: VeraConfig = peft_config.checked()
        return settings

    def _check_projections(self, peft_config: Any, source: Source) -> None:
        """Note the projections' fingerprint, after making sure that they are those it was trained with."""
        peft_config.fingerprint = source.fingerprint()
        if peft_config._expected not in (None, peft_config.fingerprint):
            found = peft_config.fingerprint
            raise other_projections("this adapter", peft_config.checked(), peft_config._expected, found)


class PeftVeraTuner(VeratuneTuner):
    """What PEFT makes of a model for its own `VeraConfig` after `install(replace_vera=True)`."""

    def _settings(self, peft_config: Any) -> VeraConfig:
        same = ("r", "d_initial", "vera_dropout", "init_weights", "projection_prng_key")
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

    def _check_projections(self, peft_config: Any, source: Source) -> None:
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
            source = _slots(model, adapter_name)[0].a.projection.source
            a, b = (source.draw(s, range(config.r), _width(source, s), torch.device("cpu")) for s in _SIDES)
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


def _slots(model: nn.Module, adapter_name: str) -> list[Slot]:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, TunedLayer)]
    return [layer.slots[adapter_name] for layer in layers if adapter_name in layer.slots]


def _width(source: Any, side: Side) -> int:
    """Return the width of one side of PEFT's projections, drawn or read from a file."""
    if isinstance(source, Stored):
        return int((source.a if side == "A" else source.b).shape[1])
    return int(source.max_in if side == "A" else source.max_out)


def _use_projections(model: nn.Module, adapter_name: str, a: Tensor, b: Tensor) -> None:
    """Let an adapter use projections from a file where they are not those that its key gives here."""
    slots = _slots(model, adapter_name)
    source = slots[0].a.projection.source
    stored = Stored.from_tensors(a, b)
    cpu = torch.device("cpu")
    drawn = [source.draw(side, range(a.shape[0]), _width(source, side), cpu) for side in _SIDES]
    if torch.equal(drawn[0], stored.a) and torch.equal(drawn[1], stored.b):
        return
    groups: dict[int, InputGroup] = {}
    layers: list[Any] = [module for module in model.modules() if isinstance(module, TunedLayer)]
    for layer in layers:
        slot = layer.slots.get(adapter_name)
        if slot is not None:
            corner = projection_pool.corner(stored, "A", slot.rank, layer.in_features)
            group = groups.setdefault(id(slot.group), InputGroup(corner, SharedDown(), slot.group.size))
            own = projection_pool.corner(stored, "B", slot.rank, layer.out_features)
            layer.slots[adapter_name] = replace(slot, group=group, b=(own,), gain=stored.gain(slot.rank))


def _vectors(layer: Any, name: str, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's vectors on one layer by their keys in the model's state."""
    if adapter_name not in layer.slots:
        return {}
    b, d = layer.vectors(adapter_name)
    return {f"{name}.vera_lambda_b.{adapter_name}": b, f"{name}.vera_lambda_d.{adapter_name}": d}


def _put_in_place_of(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Put another module wherever a module stands, but into the other one itself."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module and parent is not other:
                parent._modules[name] = other
