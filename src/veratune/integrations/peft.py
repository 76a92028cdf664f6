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
from dataclasses import dataclass, field
from typing import Any

try:
    import peft
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING, PeftType, register_peft_method
except ImportError as error:
    raise ImportError(f"veratune.integrations.peft needs peft 0.18 or newer: pip install peft ({error})") from error

import torch
from torch import Tensor, nn

from veratune.config import PEFT_TYPE, VeraConfig
from veratune.layers import (
    ComputeSettings,
    InputGroup,
    VectorInit,
    VeraConv,
    VeraConv1D,
    VeraEmbedding,
    VeraLayer,
    VeraLinear,
)
from veratune.layers.kinds import adapt, geometry, why_not_adaptable
from veratune.layers.shared import SharedDown
from veratune.profiles import load_calibration
from veratune.projection import projection_pool
from veratune.routing import MemoryName, RouteName
from veratune.sources import PeftShared, PerDimension, Source

_METHOD = PEFT_TYPE.lower()


def install() -> None:
    """Make `VeratuneConfig` known to PEFT. A second call does nothing."""
    if getattr(PeftType, PEFT_TYPE, None) is None:
        _add_member()
        register_peft_method(
            name=_METHOD, config_cls=VeratuneConfig, model_cls=VeratuneTuner, prefix=VeratuneTuner.prefix
        )


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
        VeraLayer.unmerge(layer)
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
        config: VeratuneConfig = peft_config
        reason = why_not_adaptable(base)
        if reason is not None:
            raise ValueError(f"{current_key} cannot be adapted by VeRA, because {reason}: exclude it")
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
        if config.fingerprint is None:
            config.fingerprint = source.fingerprint()
        elif config.fingerprint != source.fingerprint():
            raise ValueError(
                f"this adapter was trained with other projections: its fingerprint is {config.fingerprint}, and"
                f" projection={config.projection!r} with projection_prng_key={key} gives {source.fingerprint()} here"
            )
        return source


def _base(module: nn.Module) -> nn.Module:
    """Return the module that a tuned layer stands for, or the module itself."""
    base: nn.Module = getattr(module, "base_layer", module) if isinstance(module, TunedLayer) else module
    return base
