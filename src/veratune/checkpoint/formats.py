"""The registry of checkpoint formats, and functions that read an adapter in any of them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from veratune.checkpoint.base import AdapterContents, AdapterFiles, Format, open_adapter
from veratune.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, CheckpointError
from veratune.checkpoint.lora import LoraFormat
from veratune.checkpoint.native import NativeFormat
from veratune.checkpoint.peft import PeftFormat
from veratune.checkpoint.peft_rules import PEFT_VERA
from veratune.checkpoint.validate import ReadyAdapter
from veratune.config import PEFT_TYPE

ADAPTER_FOLDER = "adapter"
"""The folder with the adapter in the output directory of a training run."""

# Formats are tried in this order.
FORMATS: dict[str, Format] = {format.name: format for format in (NativeFormat(), PeftFormat(), LoraFormat())}


def has_adapter(directory: Path) -> bool:
    """Return whether a directory contains the files of an adapter."""
    return any((directory / name).is_file() for name in file_names())


def adapter_directory(directory: Path) -> Path:
    """Return the directory with the adapter's files: for the output of a training run, its folder with the adapter.

    A model's directory, and one without an adapter, is returned as it is; readers then say what is missing.
    """
    inside = directory / ADAPTER_FOLDER
    is_run = not has_adapter(directory) and not (directory / "config.json").is_file() and has_adapter(inside)
    return inside if is_run else directory


def format_of(directory: Path) -> Format:
    """Return the format of the adapter in a directory.

    Raises:
        CheckpointError: there is no adapter, or its format is unknown.
    """
    with _opened(directory) as (format, _):
        return format


def read_adapter(modules: Mapping[str, nn.Module], directory: Path) -> ReadyAdapter:
    """Read an adapter in any of the formats and check it against a model, which is not modified.

    Args:
        modules: the result of `base_modules` for the model.
        directory: the adapter's directory.

    Raises:
        CheckpointError: there is no adapter, or it is damaged, of another type, or for another model.
    """
    with _opened(directory) as (format, files):
        return format.read(modules, files)


def read_contents(directory: Path) -> AdapterContents:
    """Read an adapter's files in any of the formats, without a model.

    Raises:
        CheckpointError: the files are missing, damaged, or of another type.
    """
    with _opened(directory) as (format, files):
        return format.contents(files)


def read_base(directory: Path) -> dict[str, Any]:
    """Return the information in an adapter's files about its base model's class and labels.

    Raises:
        CheckpointError: the files are missing, damaged, or of another type.
    """
    with _opened(directory) as (format, files):
        return format.base(files)


def file_names() -> list[str]:
    """Return the names of the files that adapters are read from, in any format."""
    return [CONFIG_NAME, *dict.fromkeys(format.weights_name for format in FORMATS.values())]


@contextmanager
def _opened(directory: Path) -> Iterator[tuple[Format, AdapterFiles]]:
    with open_adapter(directory) as files:
        there = [format for format in FORMATS.values() if os.path.lexists(directory / format.weights_name)]
        if not there:
            raise no_adapter(directory)
        format = next((format for format in there if format.detect(files)), None)
        if format is None and files.config is None:
            names = sorted({format.weights_name for format in there})
            raise CheckpointError(
                f"{directory} has {', '.join(names)}, but not in one of the formats {sorted(FORMATS)}: the file is"
                " damaged, or was written by another program"
            )
        if format is None:
            raise CheckpointError(
                f"{directory / CONFIG_NAME} belongs to an adapter of type {files.peft_type!r}; veratune loads"
                f" {PEFT_TYPE!r} and PEFT's {PEFT_VERA!r}"
            )
        yield format, files


def no_adapter(directory: Path) -> CheckpointError:
    """Return the error for a directory without an adapter, with a hint if it contains a full model or subfolders."""
    missing = f"{WEIGHTS_NAME} does not exist there{_hint(directory)}"
    if not directory.is_dir():
        missing = "it is a file, not a directory" if directory.exists() else "there is no such directory"
    return CheckpointError(f"{directory} has no adapter: {missing}")


def _hint(directory: Path) -> str:
    model = next((name for name in ("model.safetensors", "pytorch_model.bin") if (directory / name).exists()), None)
    if model is not None:
        return f". It has a full model ({model}); adapters are written by VeraModel.save_pretrained"
    folders = sorted(path.parent.name for path in directory.glob(f"*/{WEIGHTS_NAME}"))
    return f", but it exists in the subfolders {folders}: pass one of them as subfolder=" if folders else ""
