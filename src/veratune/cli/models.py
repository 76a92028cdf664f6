"""Base models for the command line: from a directory or a hub name, with or without their weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from veratune.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, CheckpointError, read_json


def is_adapter(path: str) -> bool:
    """Return whether a directory holds an adapter."""
    return (Path(path) / WEIGHTS_NAME).is_file() or (Path(path) / CONFIG_NAME).is_file()


def base_of(adapter: Path, given: str | None) -> str:
    """Return the base model's place: what the user gave, or what the adapter's configuration names."""
    if given is not None:
        return given
    named = read_json(adapter / CONFIG_NAME).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{adapter} does not say what its base model is: name it with --base")
    return named


def load_tokenizer(place: str) -> Any:
    """Return a model's tokenizer.

    Raises:
        ValueError: the model has none.
    """
    from transformers import AutoTokenizer

    _check_place(place)
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} has no tokenizer that can be read: {error}") from None


def load_model(place: str, *, weights: bool) -> nn.Module:
    """Return a transformers model of the class that its configuration names.

    Args:
        place: a directory or a name on the hub.
        weights: whether to load them; without them the model is on the meta device.

    Raises:
        ImportError: transformers is missing.
        ValueError: the configuration names no class that transformers has.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"reading a model needs transformers: pip install 'veratune[hf]' ({error})") from None
    _check_place(place)
    config: Any = transformers.AutoConfig.from_pretrained(place)
    names = config.architectures or []
    model_class: Any = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if model_class is None:
        raise ValueError(f"{place}: its configuration names no class that transformers has (architectures={names})")
    if weights:
        model: nn.Module = model_class.from_pretrained(place, dtype="auto")
        return model.eval()
    with torch.device("meta"):
        shape: nn.Module = model_class(config)
    return shape.eval()


def _check_place(place: str) -> None:
    """Raise FileNotFoundError for what is neither a model's directory here nor a hub's name."""
    local = Path(place).expanduser()
    if not local.is_dir() and (place.count("/") != 1 or place.startswith((".", "/", "~"))) and "/" in place:
        raise FileNotFoundError(f"{place} is not a directory on this machine, nor the name of a hub repository")
    if local.is_dir() and not (local / "config.json").is_file():
        raise FileNotFoundError(f"{place} holds neither a model (config.json) nor an adapter ({WEIGHTS_NAME})")
