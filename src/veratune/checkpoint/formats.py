"""Reading an adapter in whichever format it is."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from veratune.checkpoint.files import (
    CONFIG_NAME,
    LARGEST_CONFIG,
    WEIGHTS_NAME,
    CheckpointError,
    read_json,
    read_tensors,
)
from veratune.checkpoint.native import METADATA_KEY, ready_native
from veratune.checkpoint.peft import PEFT_VERA, ready_peft
from veratune.checkpoint.peft_plugin import PLUGIN_TYPE, ready_plugin
from veratune.checkpoint.validate import ReadyAdapter
from veratune.config import PEFT_TYPE


def read_adapter(modules: Mapping[str, nn.Module], directory: Path) -> ReadyAdapter:
    """Read an adapter of any of the formats and check it against a model, which is not changed.

    Args:
        modules: what `base_modules` returns for the model.
        directory: where the adapter's files are.

    Raises:
        CheckpointError: there is no adapter, it is damaged or of another kind, or for another model.
    """
    path = directory / WEIGHTS_NAME
    if not os.path.lexists(path):
        raise no_adapter(directory)
    tensors, metadata = read_tensors(path, lambda described, said: _ready(modules, directory, described, said, True))
    return _ready(modules, directory, tensors, metadata, False)


def _ready(
    modules: Mapping[str, nn.Module],
    directory: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    sizes_only: bool,
) -> ReadyAdapter:
    config_path = directory / CONFIG_NAME
    # veratune's own tensors file is whole without its JSON copy, PEFT's is not.
    if METADATA_KEY in metadata or not os.path.lexists(config_path):
        return ready_native(modules, directory, tensors, metadata, sizes_only=sizes_only)
    peft_type = read_json(config_path, largest=LARGEST_CONFIG).get("peft_type")
    if peft_type == PEFT_TYPE:
        return ready_native(modules, directory, tensors, metadata, sizes_only=sizes_only)
    if peft_type == PEFT_VERA:
        return ready_peft(modules, directory, tensors, sizes_only=sizes_only)
    if peft_type == PLUGIN_TYPE:
        return ready_plugin(modules, directory, tensors, sizes_only=sizes_only)
    raise CheckpointError(
        f"{config_path} is of an adapter of the type {peft_type!r}; veratune loads {PEFT_TYPE!r} and PEFT's"
        f" {PEFT_VERA!r}"
    )


def no_adapter(directory: Path) -> CheckpointError:
    """Return the error about a directory without an adapter, with what it has that explains the mistake."""
    return CheckpointError(f"{directory} holds no adapter: {WEIGHTS_NAME} does not exist there{_instead(directory)}")


def _instead(directory: Path) -> str:
    whole = next((name for name in ("model.safetensors", "pytorch_model.bin") if (directory / name).exists()), None)
    if whole is not None:
        return f". It holds a whole model ({whole}); an adapter is what save_pretrained of a VeraModel writes"
    folders = sorted(path.parent.name for path in directory.glob(f"*/{WEIGHTS_NAME}"))
    return f", but in its folders {folders}: name one of them with subfolder=" if folders else ""
