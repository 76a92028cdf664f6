"""Export as a LoRA adapter, which everything that serves LoRA can load.

VeRA's delta diag(b) B diag(d) A is LoRA's B A with lora_A = d * A and lora_B = b * B (rows scaled), of the same rank,
with lora_alpha = r so that LoRA's own scale is one. Nothing is approximated.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from veratune.adapters import AdaptedModel
from veratune.checkpoint.files import write_pair
from veratune.checkpoint.peft_format import PREFIX, common_values, other_tensors
from veratune.layers import VeraLayer

_BIASES = {"none": "none", "all": "all", "vera_only": "lora_only"}


def export_lora(host: AdaptedModel, adapter_name: str, directory: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write an adapter as a LoRA adapter in PEFT's format.

    Args:
        host: the model.
        adapter_name: which adapter.
        directory: where to; files there are replaced.
        dtype: dtype of the two matrices of each layer.

    Raises:
        ValueError: dtype is not a floating-point one.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not allowed: it must be a floating-point dtype")
    config = host.peft_config[adapter_name]
    layers = {name: layer for name, layer in host.vera_layers().items() if adapter_name in layer.slots}
    ranks = {name: layer.slots[adapter_name].rank for name, layer in layers.items()}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_a, lora_b = lora_matrices(layer, adapter_name)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_a.to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_b.to(dtype)
    tensors |= other_tensors(host, adapter_name)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT compares a pattern with the end of a name; the anchor makes it the whole name.
    other_ranks = {f"^{re.escape(name)}": other for name, other in ranks.items() if other != rank}
    values = common_values(host, adapter_name) | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "lora_dropout": config.vera_dropout,
        "bias": _BIASES[config.bias],
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    write_pair(directory, tensors, values)


def lora_matrices(layer: VeraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return (lora_A (r, in), lora_B (out, r)) of one layer, float32, on the CPU; their product is the delta."""
    slot = layer.slots[adapter_name]
    b, d = (vector.detach().double().cpu() for vector in layer.vectors(adapter_name))
    cpu = torch.device("cpu")
    source = slot.a.projection.source
    a_projection = source.draw("A", range(slot.rank), slot.a.projection.width, cpu)[:, : slot.a.features]
    b_projection = source.draw("B", range(slot.rank), slot.b.projection.width, cpu)[:, : slot.b.features]
    lora_a = d[:, None] * a_projection
    lora_b = b[:, None] * (b_projection.double().t() * slot.gain)
    return lora_a.float(), lora_b.float()
