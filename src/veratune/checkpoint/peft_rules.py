"""PEFT's rules for names, tasks and layers, which reading and writing its files must follow."""

import importlib.util
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veratune.adapters.matching import matcher
from veratune.adapters.names import base_modules, joined, without_wrappers
from veratune.checkpoint.weight_reads import reader_of
from veratune.layers import VeraLayer
from veratune.layers.linear import is_out_proj
from veratune.layers.quantized import is_quantized
from veratune.utils.text import notify

PEFT_VERA = "VERA"
PREFIX = "base_model.model."
A_KEY, B_KEY = "base_model.vera_A", "base_model.vera_B"

# Since version 0.19, PEFT treats targets whose names end in one of these as experts of a transformers 4 checkpoint, and
# adapts the stacked experts instead, even if the targets are dense layers or shared experts.
_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
_MODEL_TYPES = {
    "mixtral": "minimax minimax_m2 mixtral",
    "qwen2_moe": (
        "Dots3NoteTextModel UnlimitedOcrTextModel afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1"
        " ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash"
        " mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open"
    ),
}


def peft_saved(modules: Mapping[str, nn.Module], suffixes: Collection[str]) -> list[str]:
    """Return the modules that PEFT trains in full for these names, which it compares with `str.endswith`."""
    names = [name for name in modules if name and name.endswith(tuple(suffixes))]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def exact_targets(model: nn.Module, names: list[str], configured: list[str] | str | None) -> list[str] | str:
    """Return target_modules that select exactly these layers under PEFT's rules: the user's, if possible.

    Args:
        model: the model without a wrapper.
        names: the layers' names.
        configured: the user's target_modules.
    """
    if not names:
        return []
    everything = [name for name in base_modules(model) if name]
    for listed in (configured, names):
        if isinstance(listed, list) and list(filter(matcher(listed), everything)) == names:
            return listed
    # A layer's name may also be the end of another's; a regular expression matches only full names.
    return "|".join(re.escape(name) for name in names)


def check_called(model: nn.Module, layers: Mapping[str, VeraLayer], whose: str) -> None:
    """Raise ValueError if the model computes with the weight of a layer without calling the layer.

    veratune's layers handle this, but PEFT's have an effect only when they are called. The check finds weights that
    were read while the model ran, that the source code of the model's classes reads, or that torch's attention or
    encoder reads. If only one branch of the source code reads a weight, such as a kernel for one device, a warning is
    given instead.

    Args:
        model: the model without a wrapper, with its adapters.
        layers: the adapter's layers by name.
        whose: the format that would lose the adapter, for the message.
    """
    modules = base_modules(model)
    sometimes: dict[str, str] = {}
    for name, layer in layers.items():
        own = name if layer.of_parameter else joined(name, layer.weight_name)
        found = reader_of(modules, own)
        reader = found.name if found is not None and found.always else None
        if layer.weight_was_read:
            reader = "the model"
        elif is_out_proj(layer.base_layer):
            reader = "torch.nn.MultiheadAttention"
        elif found is not None and isinstance(modules.get(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            reader = "torch.nn.TransformerEncoderLayer, in eval mode,"
        if reader is not None:
            raise ValueError(
                f"{whose} cannot hold the adapter on {name}: {reader} computes with its weight without calling the"
                " layer, so PEFT's layer would have no effect. Add it to exclude_modules, or merge the"
                " adapter (merge_and_unload)"
            )
        if found is not None:
            sometimes[name] = found.name
    if sometimes:
        name, reader = next(iter(sometimes.items()))
        more = f" (and {len(sometimes) - 1} more)" if len(sometimes) > 1 else ""
        notify(
            f"{reader} has a branch that computes with the weight of {name}{more} without calling the layer: there,"
            f" {whose} has no effect. Compare outputs on the device where the model will run, or merge the adapter"
            " (merge_and_unload)"
        )


def check_places(model: nn.Module, layers: Mapping[str, VeraLayer], whose: str) -> None:
    """Raise ValueError if a layer occurs in several places in a model: PEFT adapts only the first of them.

    Args:
        model: the model without a wrapper, with its adapters.
        layers: the adapter's layers by name.
        whose: the format that would lose the adapter, for the message.
    """
    modules = base_modules(model)
    names_by_module: dict[int, dict[tuple[int, str], str]] = {}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        names_by_module.setdefault(id(module), {})[id(modules.get(parent)), own] = name
    for name, layer in layers.items():
        module = modules[name.rpartition(".")[0] if layer.of_parameter else name]
        names = list(names_by_module[id(module)].values())
        if len(names) > 1:
            raise ValueError(
                f"{whose} cannot hold the adapter on {name}: the model uses this module under several names"
                f" ({', '.join(names)}), and PEFT adapts only the first. Add it to exclude_modules, or merge the"
                " adapter (merge_and_unload)"
            )


def taken_for_experts(model: nn.Module, name: str) -> bool:
    """Return whether PEFT would treat a linear layer as one of a stack of experts, and lose its adapter.

    Args:
        model: the model without a wrapper.
        name: the layer's name.
    """
    config: Any = getattr(without_wrappers(model), "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        return False
    ends = {end for kind, types in _MODEL_TYPES.items() if model_type in types.split() for end in _EXPERTS[kind]}
    return name.rpartition(".")[2] in ends | _installed_ends(model_type)


def _installed_ends(model_type: str) -> set[str]:
    """Return the name endings that the installed PEFT treats as experts; it may support more models."""
    if importlib.util.find_spec("peft") is None:
        return set()
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return set()
    kinds = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {})
    return set(getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(kinds.get(model_type), ()))


def why_not_as_parameter(layer: VeraLayer) -> str | None:
    """Return why PEFT's LoRA cannot adapt a layer's weight as a parameter, or None if it can."""
    base = layer.base_layer
    if not isinstance(base, nn.Linear) or is_quantized(base) or not layer.base_weight.is_floating_point():
        return f"it is a {type(base).__name__}"
    return None


def check_read_back(model: nn.Module, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the installed PEFT would look for a LoRA's layers or tensors under other names.

    Args:
        model: the model without a wrapper.
        values: the configuration to write.
        tensors: the tensors to write.
    """
    model = without_wrappers(model)
    if importlib.util.find_spec("peft") is None or not hasattr(getattr(model, "config", None), "model_type"):
        return
    try:
        import peft
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers,
            convert_peft_config_for_transformers,
        )
    except ImportError:
        return
    known = peft.LoraConfig.__dataclass_fields__
    config: Any = peft.LoraConfig(**{name: value for name, value in values.items() if name in known})
    before = [_as_set(config.target_modules), _as_set(config.target_parameters)]
    convert_peft_config_for_transformers(config, model, None)
    lost = [
        one ^ other
        for one, other in zip(before, [_as_set(config.target_modules), _as_set(config.target_parameters)], strict=True)
    ]
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    read = convert_peft_adapter_state_dict_for_transformers(model, config, dict(shapes))
    odd = sorted(lost[0] | lost[1] | (shapes.keys() ^ read.keys()))
    if odd:
        raise ValueError(
            f"PEFT {peft.__version__} would not read this LoRA correctly: for model_type="
            f"{getattr(model.config, 'model_type', None)!r} it renames {odd[0]}. Merge the adapter (merge_and_unload)"
            " instead"
        )


def _as_set(names: Any) -> set[str]:
    return {names} if isinstance(names, str) else set(names or ())
