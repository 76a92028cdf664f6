"""What an adapter's files hold, read without the model that it is for."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from veratune.checkpoint.files import (
    CONFIG_NAME,
    LARGEST_CONFIG,
    WEIGHTS_NAME,
    CheckpointError,
    read_json,
    read_tensors,
)
from veratune.checkpoint.native import is_native, read_native
from veratune.checkpoint.peft import A_KEY, B_KEY, PEFT_VERA, PREFIX
from veratune.checkpoint.peft_plugin import PLUGIN_TYPE
from veratune.config import PEFT_TYPE

PEFT_LORA = "LORA"
# The tensors of a LoRA's two matrices of one layer: lora_A and lora_B, or those of an embedding.
_LORA_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True)
class AdapterContents:
    """An adapter as it is in its files. Names of layers in PEFT's files are those without what all begin with.

    Attributes:
        kind: whose files they are: veratune's, PEFT's VeRA, or those of veratune's layers in PEFT.
        config: the settings, as the files have them.
        vectors: layer name to (b, d).
        others: tensors of what is trained in full, by their names in the file.
        projections: tensors of A and B, where the file has them.
        fingerprint: of the projections, where a file says it.
        base: what is known of the base model's class.
        format_version: of veratune's own format.
    """

    kind: Literal["veratune", "peft", "veratune in peft"]
    config: dict[str, Any]
    vectors: dict[str, tuple[Tensor, Tensor]]
    others: dict[str, Tensor]
    projections: dict[str, Tensor]
    fingerprint: str | None = None
    base: dict[str, Any] = field(default_factory=dict)
    format_version: int | None = None


@dataclass(frozen=True)
class LoraContents:
    """A LoRA adapter as it is in its files.

    Attributes:
        config: the settings.
        matrices: layer name to its matrices by their names in the file.
        others: all other tensors, by name.
    """

    config: dict[str, Any]
    matrices: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]


def read_contents(directory: Path) -> AdapterContents | LoraContents:
    """Read the files of a VeRA adapter of any of the formats that veratune loads, or of a LoRA adapter.

    Raises:
        CheckpointError: they are missing, damaged, or of another kind.
    """
    path = directory / WEIGHTS_NAME
    if is_native(path) or not os.path.lexists(directory / CONFIG_NAME):
        return _native(directory)
    config = read_json(directory / CONFIG_NAME, largest=LARGEST_CONFIG)
    kind = config.get("peft_type")
    if kind == PEFT_TYPE:
        return _native(directory)
    tensors, _ = read_tensors(path)
    if kind == PEFT_LORA:
        return _lora(config, tensors)
    if kind in (PEFT_VERA, PLUGIN_TYPE):
        return _peft(path, config, tensors)
    raise CheckpointError(
        f"{directory} holds a PEFT adapter of the type {kind!r}, neither VeRA ({PEFT_VERA!r}) nor LoRA ({PEFT_LORA!r})"
    )


def _native(directory: Path) -> AdapterContents:
    loaded, header, projections = read_native(directory)
    saved = {f"{module}.{key}": t for module, tensors in loaded.saved.items() for key, t in tensors.items()}
    return AdapterContents(
        kind="veratune",
        config=loaded.config.to_dict(),
        vectors=loaded.vectors,
        others=saved | loaded.biases,
        projections=projections,
        fingerprint=header["fingerprint"],
        base=header.get("base", {}),
        format_version=header["format_version"],
    )


def _peft(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterContents:
    projections = {key.rpartition("_")[2]: tensors.pop(key) for key in (A_KEY, B_KEY) if key in tensors}
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, last = key.removeprefix(PREFIX).rpartition(".")
        if last in ("vera_lambda_b", "vera_lambda_d"):
            pairs.setdefault(layer, {})[last] = tensor
        else:
            others[key.removeprefix(PREFIX)] = tensor
    odd = next((layer for layer, pair in pairs.items() if len(pair) != 2), None)
    if odd is not None:
        raise CheckpointError(f"{path}: {odd} has one of its two vectors only")
    if not pairs:
        raise CheckpointError(f"{path} adapts no layer")
    mapping = config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    plugin = config["peft_type"] == PLUGIN_TYPE
    fingerprint = config.get("fingerprint") if plugin else None
    if not isinstance(fingerprint, str | None):
        raise CheckpointError(f"{path.parent / CONFIG_NAME}: fingerprint={fingerprint!r} is not a string or null")
    return AdapterContents(
        kind="veratune in peft" if plugin else "peft",
        config=config,
        vectors={layer: (pair["vera_lambda_b"], pair["vera_lambda_d"]) for layer, pair in pairs.items()},
        others=others,
        projections=projections,
        fingerprint=fingerprint,
        base={"class": named} if isinstance(named, str) and named else {},
    )


def _lora(config: dict[str, Any], tensors: dict[str, Tensor]) -> LoraContents:
    matrices: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in _LORA_ENDS if name.endswith(end)), None)
        if end is None:
            others[name] = tensor
        else:
            matrices.setdefault(name.removesuffix(end), {})[end[1:].removesuffix(".weight")] = tensor
    return LoraContents(config, matrices, others)
