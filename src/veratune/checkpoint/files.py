"""Reading and writing files safely: writes are atomic, and what is read is checked before it is believed."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from veratune.atomic import write_atomically
from veratune.checkpoint.exchange import replace_together
from veratune.layers.spread import is_emptied, whole

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"


class CheckpointError(ValueError):
    """A file that cannot be used, with what is wrong in it. Whatever it was to be loaded into is unchanged."""


def write_pair(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write PEFT's two files, neither of which says which other one it belongs to.

    Whoever is killed leaves the old pair or the new one; where a system cannot exchange both at once, perhaps no
    configuration, which every reader refuses, and never one adapter's configuration with another's weights.
    """
    replace_together(
        directory, {WEIGHTS_NAME: _tensor_bytes(tensors, {"format": "pt"}), CONFIG_NAME: _json_bytes(config)}
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    write_atomically(path, text.encode())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically, indented."""
    write_atomically(path, _json_bytes(value))


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    write_atomically(path, _tensor_bytes(tensors, metadata))


def _tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    # Copies, since the format refuses tensors that share memory.
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return save(own, metadata)


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor whole, detached, that is spread over processes (FSDP2, ZeRO-3); all of them have to ask."""
    if is_emptied(tensor):
        with whole([tensor]):
            return tensor.detach().clone()
    here = tensor.detach()
    gather = getattr(here, "full_tensor", None)
    return here if gather is None else gather()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def read_metadata(path: Path) -> dict[str, str]:
    """Return a safetensors file's metadata; empty if there is no such file, or it is none."""
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            return dict(handle.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return {}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, on the CPU, and its metadata.

    Raises:
        CheckpointError: the file is missing, truncated, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        data = path.read_bytes()
        tensors = dict(sorted(load(data).items()))  # in an order of its own otherwise
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    return tensors, dict(header.get("__metadata__", {}))
