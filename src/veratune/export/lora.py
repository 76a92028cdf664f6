"""Export as a LoRA adapter, for any engine that serves LoRA.

VeRA's delta diag(b) B diag(d) A is LoRA's B A with lora_A = d * A and lora_B = b * B (rows scaled), of the same rank,
with lora_alpha = r so that LoRA's own scale is one. Nothing is approximated.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from veratune.adapters.adapted_model import AdaptedModel
from veratune.adapters.names import joined
from veratune.checkpoint.files import write_pair
from veratune.checkpoint.peft_rules import (
    PREFIX,
    check_called,
    check_read_back,
    taken_for_experts,
    why_not_as_parameter,
)
from veratune.checkpoint.peft_writing import common_values, other_tensors
from veratune.export.lora_rank import with_rank
from veratune.layers import VeraConv, VeraEmbedding, VeraLayer, VeraParameter

# Rows of an embedding beyond which its lora_A is not written out.
_LARGEST_TABLE = 1 << 20
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
        adapter_name: which adapter.
        directory: the destination; existing files are replaced.
        dtype: dtype of the two matrices of each layer.
        rank: the LoRA's rank on all layers; None keeps the adapter's ranks.

    Raises:
        ValueError: dtype is not a floating-point dtype, PEFT's LoRA does not support one of the layers, or the rank
            cannot represent a delta exactly.
    """
    check_dtype(dtype)
    config = host.peft_config[adapter_name]
    layers = {name: layer for name, layer in host.vera_layers().items() if adapter_name in layer.entries}
    for name, layer in layers.items():
        reason = why_not_lora(layer)
        if reason is not None:
            raise ValueError(f"PEFT's LoRA cannot hold the adapter on {name}: {reason}. Merge it instead")
    check_called(host.base_model, layers, "PEFT's LoRA")
    as_parameters = _as_parameters(host, layers)
    ranks = {name: rank or layer.entries[adapter_name].rank for name, layer in layers.items()}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        pair = lora_matrices(layer, adapter_name)
        if rank is not None:
            pair = with_rank(name, *pair, layer.geometry.count or 1, rank)
        for key, matrix in zip(_keys(name, layer, layers), pair, strict=True):
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
        "lora_dropout": 0.0 if as_parameters else config.vera_dropout,  # PEFT does not support it for parameters
        "bias": _BIASES[config.bias],
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    parameters = sorted(name for name, layer in layers.items() if isinstance(layer, VeraParameter))
    if parameters or as_parameters:
        values["target_parameters"] = sorted([*parameters, *as_parameters.values()])
    check_read_back(host.base_model, values, tensors)
    write_pair(directory, tensors, values)


def _as_parameters(host: AdaptedModel, layers: dict[str, VeraLayer]) -> dict[str, str]:
    """Return the linear layers that PEFT would not find by their names, and the names of their weights."""
    found: dict[str, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, VeraParameter) or not taken_for_experts(host.base_model, name):
            continue
        reason = why_not_as_parameter(layer)
        if reason is not None:
            raise ValueError(
                f"PEFT's LoRA cannot hold the adapter on {name}: PEFT takes layers of this name in this type of model"
                f" for experts, and cannot adapt its weight as a parameter, because {reason}. Merge the adapter"
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
        adapter_name: which adapter.
        whose: name of that LoRA in the message.
        instead: what to do with the merged model, for the message.
    """
    state = host.adapter_state(adapter_name)
    whole = [*state.saved, *state.biases]
    if whole:
        raise ValueError(
            f"{whose} has no place for what adapter {adapter_name!r} trains in full: {', '.join(whole)}. Merge the"
            f" adapter (merge_and_unload) and {instead}, or train with bias='none' and modules_to_save=[]"
        )


def why_not_lora(layer: VeraLayer) -> str | None:
    """Return None if PEFT's LoRA supports an adapter on this layer, otherwise the reason."""
    if isinstance(layer, VeraConv) and getattr(layer.base_layer, "groups", 1) != 1:
        return "its LoRA of a grouped convolution has no entries between groups, and A is shared by all groups"
    if isinstance(layer, VeraParameter) and isinstance(layer.base_layer, nn.MultiheadAttention):
        return "its LoRA of torch.nn.MultiheadAttention takes the projections of query, key and value as one"
    if isinstance(layer, VeraEmbedding) and layer.in_features > _LARGEST_TABLE:
        return f"its A would have a column for each of {layer.in_features} rows of the table"
    return None


def _keys(name: str, layer: VeraLayer, layers: dict[str, VeraLayer]) -> tuple[str, str]:
    """Return the names of lora_A and lora_B in the file, without the prefix."""
    if isinstance(layer, VeraEmbedding):
        return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    if not isinstance(layer, VeraParameter):
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    # PEFT wraps a module once for each parameter, in the module's order: the last wrapper is the outermost.
    module = name.rpartition(".")[0]
    adapted = {its.weight_name for its in layers.values() if its.base_layer is layer.base_layer}
    beside = [own for own in layer.base_layer._parameters if own in adapted]
    depth = len(beside) - 1 - beside.index(layer.weight_name)
    place = module + ".base_layer" * depth
    return f"{place}.lora_A.weight", f"{place}.lora_B.weight"


def lora_matrices(layer: VeraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return (lora_A, lora_B) of one layer, float32, on the CPU, whose product is the delta, in PEFT's layouts.

    A linear layer's are (r, in) and (out, r); a convolution's (r, in / groups, *kernel) and (out, r, 1, ...); an
    embedding's (r, rows) and (out, r); those of a stack of n matrices (n r, in) and (out, r n), where the
    stack's index is the slowest in the first and the fastest in the second.
    """
    entry = layer.entries[adapter_name]
    b, d = (vector.detach().double().cpu() for vector in layer.vectors(adapter_name))
    rank = entry.rank
    if isinstance(layer, VeraEmbedding):
        a_projection = entry.a.projection.scheme.one_hot_columns(rank, torch.arange(layer.in_features))
    else:
        a_projection = entry.a.drawn()
    b_parts = [view.drawn().double().t() * entry.scale for view in entry.b]
    if entry.parts:
        # All parts share A, so each part's d scales its rows of B.
        scaled = [b_part * own for b_part, own in zip(b_parts, d, strict=True)]
        return a_projection.clone(), (b[:, None] * torch.cat(scaled)).float()
    (b_projection,) = b_parts
    if layer.geometry.count is not None:
        inner, outer = d[:, :, None] * a_projection, b[:, :, None] * b_projection
        if layer.out_axis == 1 and not getattr(layer.base_layer, "is_transposed", False):
            # PEFT relies on that flag alone, and swaps inputs and outputs if a module lacks it.
            inner, outer = outer.mT, inner.mT
        return inner.flatten(0, 1).float(), outer.permute(1, 2, 0).flatten(1).float()
    lora_a, lora_b = (d[:, None] * a_projection).float(), (b[:, None] * b_projection).float()
    if isinstance(layer, VeraConv):
        weight = layer.base_weight
        return lora_a.view(rank, *weight.shape[1:]), lora_b.view(*lora_b.shape, *(1,) * (weight.ndim - 2))
    return lora_a, lora_b
