"""Export as a LoRA adapter, for any engine that serves LoRA.

VeRA's delta diag(b) B diag(d) A equals LoRA's delta of the same rank with lora_A = d * A and lora_B = b * B (rows
scaled), and lora_alpha = r, so that LoRA's scale is one. Nothing is approximated.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from veratune.adapters.adapted_model import AdaptedModel
from veratune.adapters.names import joined
from veratune.checkpoint.files import write_pair
from veratune.checkpoint.peft_rules import (
    PREFIX,
    check_called,
    check_places,
    check_read_back,
    taken_for_experts,
    why_not_as_parameter,
)
from veratune.checkpoint.peft_writing import common_values, other_tensors
from veratune.export.lora_rank import with_rank
from veratune.layers import VeraLayer

_BIASES = {"none": "none", "all": "all", "vera_only": "lora_only"}


def export_lora(
    host: AdaptedModel,
    adapter_name: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    rank: int | None = None,
) -> None:
    """Write an adapter as a LoRA adapter in PEFT's format.

    Args:
        host: the model.
        adapter_name: the adapter's name.
        directory: the destination; existing files are replaced.
        dtype: the dtype of the two matrices of each layer.
        rank: the LoRA's rank on all layers; None keeps the adapter's ranks.

    Raises:
        ValueError: dtype is not a floating-point dtype, PEFT's LoRA does not support one of the layers, or the rank
            cannot represent a delta exactly.
    """
    check_dtype(dtype)
    config = host.peft_config[adapter_name]
    layers = {name: layer for name, layer in host.vera_layers().items() if adapter_name in layer.entries}
    for name, layer in layers.items():
        reason = layer.why_not_lora()
        if reason is not None:
            raise ValueError(f"PEFT's LoRA cannot hold the adapter on {name}: {reason}. Merge the adapter instead")
    check_called(host.base_model, layers, "PEFT's LoRA")
    check_places(host.base_model, layers, "PEFT's LoRA")
    as_parameters = _as_parameters(host, layers)
    ranks = {name: rank or layer.entries[adapter_name].r for name, layer in layers.items()}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        pair = layer.lora_factors(adapter_name)
        if rank is not None:
            pair = with_rank(name, *pair, layer.geometry.count or 1, rank)
        beside = {other.weight_name for other in layers.values() if other.base_layer is layer.base_layer}
        for key, matrix in zip(layer.lora_keys(name, beside), pair, strict=True):
            tensors[PREFIX + key] = matrix.to(dtype)
    tensors |= other_tensors(host, adapter_name)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT matches a pattern with the end of a name; the anchor makes it match the full name.
    other_ranks = {
        f"^{re.escape(as_parameters.get(name, name))}": other for name, other in ranks.items() if other != usual
    }
    values = common_values(host, adapter_name, leave_out=as_parameters) | {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "lora_dropout": 0.0 if as_parameters else config.vera_dropout,  # PEFT does not support dropout for parameters
        "bias": _BIASES[config.bias],
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    parameters = sorted(name for name, layer in layers.items() if layer.of_parameter)
    if parameters or as_parameters:
        values["target_parameters"] = sorted([*parameters, *as_parameters.values()])
    check_read_back(host.base_model, values, tensors)
    write_pair(directory, tensors, values)


def _as_parameters(host: AdaptedModel, layers: dict[str, VeraLayer]) -> dict[str, str]:
    """Return the linear layers that PEFT would not find by name, mapped to the names of their weights."""
    found: dict[str, str] = {}
    for name, layer in layers.items():
        if layer.of_parameter or not taken_for_experts(host.base_model, name):
            continue
        reason = why_not_as_parameter(layer)
        if reason is not None:
            raise ValueError(
                f"PEFT's LoRA cannot hold the adapter on {name}: in this type of model, PEFT treats layers of this"
                f" name as experts, and cannot adapt the weight as a parameter, because {reason}. Merge the adapter"
                " (merge_and_unload) instead"
            )
        found[name] = joined(name, layer.weight_name)
    return found


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError if matrices cannot be written in this dtype."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not allowed: it must be a floating-point dtype")


def check_vectors_only(host: AdaptedModel, adapter_name: str, whose: str, instead: str) -> None:
    """Raise ValueError if an adapter trains modules_to_save or biases, which an engine's LoRA does not support.

    Args:
        host: the model.
        adapter_name: the adapter's name.
        whose: the engine's LoRA, for the message.
        instead: the next step for the merged model, for the message.
    """
    state = host.adapter_state(adapter_name)
    in_full = [*state.saved, *state.biases]
    if in_full:
        raise ValueError(
            f"{whose} cannot hold the modules and biases that adapter {adapter_name!r} trains in full:"
            f" {', '.join(in_full)}. Merge the adapter (merge_and_unload) and {instead}, or train with bias='none' and"
            " modules_to_save=[]"
        )
