"""veratune's layers inside the `peft` package, for everything that asks for a `peft.PeftModel`.

    from veratune.integrations.peft import VeratuneConfig, install

    install()
    model = peft.get_peft_model(model, VeratuneConfig(target_modules="all-linear"))

`PeftModel.from_pretrained`, transformers' `Trainer`, and whatever else knows PEFT's models then work with it. PEFT
writes the files: the vectors, and modules trained in full; no projections.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

try:
    import peft
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING, PeftType, register_peft_method
except ImportError as error:
    raise ImportError(f"veratune.integrations.peft needs peft 0.18 or newer: pip install peft ({error})") from error

import torch
from torch import Tensor, nn

from veratune.config import VeraConfig
from veratune.layers import (
    ComputeSettings,
    InputGroup,
    Slot,
    VectorInit,
    VeraConv,
    VeraConv1D,
    VeraEmbedding,
    VeraLayer,
    VeraLinear,
)
from veratune.layers.kinds import adapt, geometry, is_out_proj, why_not_adaptable
from veratune.layers.shared import SharedDown
from veratune.profiles import load_calibration
from veratune.projection import projection_pool
from veratune.routing import MemoryName, RouteName
from veratune.sources import PeftShared, PerDimension, Side, Source, Stored

# Not that of veratune's own files, which PEFT cannot read.
PEFT_TYPE = "VERATUNE_PEFT"
_METHOD = PEFT_TYPE.lower()


def install(*, replace_vera: bool = False) -> None:
    """Make `VeratuneConfig` known to PEFT. A second call does nothing more.

    Args:
        replace_vera: let PEFT's own `VeraConfig` use veratune's layers as well, so that a script that knows nothing of
            veratune runs on them. Files stay PEFT's, with the same outputs.
    """
    if getattr(PeftType, PEFT_TYPE, None) is None:
        _add_member()
        register_peft_method(
            name=_METHOD, config_cls=VeratuneConfig, model_cls=VeratuneTuner, prefix=VeratuneTuner.prefix
        )
    if replace_vera:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] = PeftVeraTuner


def _add_member() -> None:
    """Add our name to PEFT's enumeration of methods, which `register_peft_method` insists on and does not do itself."""
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._value2member_map_[PEFT_TYPE] = member
    type.__setattr__(PeftType, PEFT_TYPE, member)


@dataclass
class VeratuneConfig(peft.PeftConfig):
    """A configuration for PEFT, with the fields of `veratune.VeraConfig` that PEFT does not handle itself.

    `fingerprint` is of the projections; it is filled in, and compared when an adapter is loaded.
    """

    r: int = 256
    target_modules: list[str] | str | None = None
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

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        install()
        self.peft_type = PeftType[PEFT_TYPE]
        self._expected = self.fingerprint  # what a file says, where this comes from one
        self.checked()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)

    def checked(self) -> VeraConfig:
        """Return the same as a `veratune.VeraConfig`, which refuses what cannot be."""
        own = (
            "r d_initial vera_dropout bias init_weights projection_prng_key projection rank_pattern route memory"
            " target_modules exclude_modules layers_to_transform layers_pattern modules_to_save"
        )
        return VeraConfig(**{name: getattr(self, name) for name in own.split()})


class TunedLayer(BaseTunerLayer):
    """What PEFT wants of a layer, on top of a `VeraLayer`."""

    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    other_param_names = ("vera_dropout", "slots")

    # PEFT's own do not know adapted weights.
    weight = VeraLayer.weight
    bias = VeraLayer.bias  # type: ignore[assignment]

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, whether this layer has them or not."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

    @active_adapters.setter
    def active_adapters(self, names: Sequence[str]) -> None:
        self._active_adapter = list(names)

    def activate(self, names: Sequence[str]) -> None:
        self.active_adapters = list(names)
        self._choose_added()

    def _choose_added(self) -> None:
        layer: Any = self
        active = [] if self.disable_adapters else self.active_adapters
        layer.added_adapters = [n for n in active if n in layer.slots and n not in layer.merged_adapters]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters, trainable unless for inference."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._choose_added()

    def enable_adapters(self, enabled: bool) -> None:
        """Turn all adapters on or off."""
        super().enable_adapters(enabled)
        self._choose_added()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; PEFT chooses another one if it was active."""
        super().delete_adapter(adapter_name)
        self._choose_added()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let a weight with these adapters' deltas stand in for the layer's."""
        layer: Any = self
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in layer.slots]
        if not names:
            return
        reason = layer.why_not_mergeable()
        if reason is not None:
            raise ValueError(f"cannot merge into {layer.base_layer}: {reason}")
        before = list(layer.merged_adapters)
        if before:
            self._vera_class().unmerge(layer)
        if safe_merge and not torch.isfinite(layer.merged_weight([*before, *names])).all():
            if before:
                self._vera_class().merge(layer, before)
            raise ValueError(f"merging {names} gives weights that are not finite; nothing was merged here")
        self._vera_class().merge(layer, [*before, *names])

    def unmerge(self) -> None:
        """Put the layer's own weight back, to the bit."""
        layer: Any = self
        if not layer.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._vera_class().unmerge(layer)

    def _vera_class(self) -> type[VeraLayer]:
        kinds = (kind for kind in type(self).__mro__ if not issubclass(kind, TunedLayer))
        return next(kind for kind in kinds if issubclass(kind, VeraLayer))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if self.disable_adapters and layer.merged_adapters:
            self.unmerge()
        output: Tensor = self._vera_class().forward(layer, input, *args, **kwargs)
        return output

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can turn an adapter here into a LoRA: yes, its delta is added to the weight."""
        return True


class TunedLinear(TunedLayer, VeraLinear):  # type: ignore[misc]
    """VeRA on a linear layer, for PEFT."""


class TunedConv1D(TunedLayer, VeraConv1D):  # type: ignore[misc]
    """VeRA on transformers' Conv1D, for PEFT."""


class TunedConv(TunedLayer, VeraConv):  # type: ignore[misc]
    """VeRA on a convolution, for PEFT."""


class TunedEmbedding(TunedLayer, VeraEmbedding):  # type: ignore[misc]
    """VeRA on an embedding, for PEFT."""


_TUNED: dict[type[VeraLayer], type[nn.Module]] = {
    VeraLinear: TunedLinear,
    VeraConv1D: TunedConv1D,
    VeraConv: TunedConv,
    VeraEmbedding: TunedEmbedding,
}


class VeratuneTuner(BaseTuner):
    """What PEFT makes of a model for a `VeratuneConfig`."""

    prefix = "vera_lambda_"
    tuner_layer_cls = TunedLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse an adapter for each row, which PEFT would pass over in silence."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("veratune's layers in PEFT cannot take adapter_names: choose one adapter with set_adapter")
        yield

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
        base = _base(target)
        config = self._own_config(peft_config)
        reason = why_not_adaptable(base)
        if reason is not None:
            raise ValueError(f"{current_key} cannot be adapted by VeRA, because {reason}: exclude it")
        if config.vera_dropout > 0.0 and (isinstance(base, nn.Embedding) or is_out_proj(base)):
            raise ValueError(f"vera_dropout={config.vera_dropout} cannot be had for {current_key}: exclude it")
        if config.projection == "peft" and isinstance(base, nn.Embedding):
            raise ValueError(f"projection='peft' cannot be had for {current_key}, an embedding: exclude it")
        layer: Any = target
        if not isinstance(target, TunedLayer):
            layer = _TUNED[type(adapt(base))](base, geometry(base))
            self._replace_module(parent, target_name, layer, target)
        rank = next(
            (r for pattern, r in config.rank_pattern.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", current_key)),
            config.r,
        )
        source = self._source(config)
        weight = layer.base_weight
        dtype = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else torch.float32
        layer.add_adapter(
            adapter_name,
            current_key,
            source,
            VectorInit(rank, config.d_initial, config.init_weights, dtype),
            ComputeSettings(config.vera_dropout, config.route, config.memory),
            self._input_group(config, adapter_name, source, rank, layer.in_features, parent, current_key),
        )
        load_calibration(weight.device)
        layer.activate(self.active_adapters)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge, after all layers have been checked where that is asked for."""
        if safe_merge:
            self._check_finite(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge for good, after all layers have been checked where that is asked for."""
        if safe_merge:
            self._check_finite(adapter_names)
        merged: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        return merged

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        """Raise ValueError if merging would give a weight that is not finite; nothing has been changed then."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        layers: list[Any] = [module for module in self.model.modules() if isinstance(module, TunedLayer)]
        for layer in layers:
            names = [name for name in wanted if name in layer.slots and name not in layer.merged_adapters]
            if names and not torch.isfinite(layer.merged_weight(names)).all():
                raise ValueError(f"merging {names} into {layer.base_layer} gives weights that are not finite")

    def _own_config(self, config: Any) -> Any:
        """Return a configuration with veratune's fields."""
        return config

    def _input_group(
        self,
        config: VeratuneConfig,
        adapter_name: str,
        source: Source,
        rank: int,
        in_features: int,
        parent: nn.Module,
        current_key: str,
    ) -> InputGroup:
        """Return what an adapter has in common on the layers beside this one that may read the same input."""
        groups: dict[Any, InputGroup] = self.__dict__.setdefault("_input_groups", {})
        above = current_key.rpartition(".")[0]
        key = (adapter_name, above, in_features, rank)
        if key not in groups:
            beside = [
                _base(module)
                for name, module in parent.named_children()
                if self._check_target_module_exists(config, f"{above}.{name}" if above else name)
            ]
            same = [m for m in beside if why_not_adaptable(m) is None and geometry(m).in_features == in_features]
            corner = projection_pool.corner(source, "A", rank, in_features)
            groups[key] = InputGroup(corner, SharedDown(), max(1, len(same)))
        return groups[key]

    def _source(self, config: VeratuneConfig) -> Source:
        """Return a configuration's projections, after making sure that they are the ones it was trained with."""
        key = config.projection_prng_key
        source: Source
        if config.projection == "peft":
            targets = [
                _base(module)
                for name, module in self.model.named_modules()
                if self._check_target_module_exists(config, name)
            ]
            sizes = [geometry(module) for module in targets if why_not_adaptable(module) is None]
            widest = max(size.in_features for size in sizes), max(size.out_features for size in sizes)
            source = PeftShared(key, config.r, *widest)
        else:
            source = PerDimension(key % (1 << 64))
        config.fingerprint = source.fingerprint()
        if config._expected not in (None, config.fingerprint):
            raise ValueError(
                f"this adapter was trained with other projections: its fingerprint is {config._expected}, and"
                f" projection={config.projection!r} with projection_prng_key={key} gives {source.fingerprint()} here"
            )
        return source


class PeftVeraTuner(VeratuneTuner):
    """What PEFT makes of a model for its own `VeraConfig` after `install(replace_vera=True)`."""

    def _own_config(self, config: Any) -> Any:
        settings = ("r", "d_initial", "vera_dropout", "init_weights", "projection_prng_key", "target_modules")
        return VeratuneConfig(projection="peft", **{name: getattr(config, name) for name in settings})

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


def _base(module: nn.Module) -> nn.Module:
    """Return the module that a tuned layer stands for, or the module itself."""
    base: nn.Module = getattr(module, "base_layer", module) if isinstance(module, TunedLayer) else module
    return base
