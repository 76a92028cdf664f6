"""PEFT's own `VeraConfig` on veratune's layers, with PEFT's files."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from veratune.adapters.names import unwrapped
from veratune.adapters.target import Target
from veratune.config import VeraConfig
from veratune.integrations.peft.layers import shared_projection
from veratune.integrations.peft.state import adapter_layers
from veratune.integrations.peft.tuner import VeratuneTuner
from veratune.layers import AdapterEntry, InputGroup
from veratune.layers.input_cache import InputCache
from veratune.layers.registry import layer_class
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import Scheme, Side, Stored

_SIDES: tuple[Side, Side] = ("A", "B")
_PROJECTION_KEYS = ("base_model.vera_A", "base_model.vera_B")


class PeftVeraTuner(VeratuneTuner):
    """PEFT's tuner for its own `VeraConfig`, after `install(replace_vera=True)`."""

    # As in PEFT: transformers' load_adapter and inject_adapter_in_model would ignore stored A and B.
    uses_shared_state = True

    def _settings(self, peft_config: Any) -> VeraConfig:
        same = VeraConfig.names_with(peft="vera", selects=False)
        return VeraConfig(projection="peft", **{name: getattr(peft_config, name) for name in same})

    def _matched_layers(self, peft_config: Any, config: VeraConfig, model: nn.Module) -> dict[int, Target]:
        found = super()._matched_layers(peft_config, config, model)
        for target in found.values():
            if "peft" not in layer_class(unwrapped(target.module)).exports:
                raise ValueError(
                    f"{target.name} cannot be adapted with PEFT's own VeraConfig, whose files support only linear"
                    " layers: exclude it, or use VeratuneConfig"
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
            entry = _entries(model, adapter_name)[0]
            for side in _SIDES:
                found[f"base_model.vera_{side}.{adapter_name}"] = shared_projection(side, entry).clone()
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


def _entries(model: nn.Module, adapter_name: str) -> list[AdapterEntry]:
    return [layer.entries[adapter_name] for _, layer in adapter_layers(model, adapter_name)]


def _use_projections(model: nn.Module, adapter_name: str, a: Tensor, b: Tensor) -> None:
    """Make an adapter use projections from a file if they differ from those drawn from its key here."""
    entries = _entries(model, adapter_name)
    stored = Stored.from_tensors(a, b)
    own = Stored.from_tensors(*(shared_projection(side, entries[0]) for side in _SIDES))
    if own == stored:
        return
    groups: dict[int, InputGroup] = {}
    for _, layer in adapter_layers(model, adapter_name):
        entry = layer.entries[adapter_name]
        view = projection_pool.view(stored, "A", entry.r, layer.in_features)
        group = groups.setdefault(id(entry.group), InputGroup(view, InputCache(), entry.group.size))
        b_view = projection_pool.view(stored, "B", entry.r, layer.out_features)
        layer.entries[adapter_name] = replace(entry, group=group, b=(b_view,), scale=stored.scale(entry.r))
