"""Load base models for the command line from a directory or a hub name, with or without weights."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from veratune.checkpoint.files import CONFIG_NAME, CheckpointError, read_json
from veratune.checkpoint.formats import file_names, no_adapter, read_base, read_contents

ADAPTER_NAME = "adapter"
"""The folder with the adapter in a training run's output."""


def is_adapter(path: str) -> bool:
    """Return whether a directory contains an adapter."""
    return any((Path(path) / name).is_file() for name in file_names())


def adapter_in(path_or_repo: Path) -> Path:
    """Return the directory of an adapter: the given one, or the folder in which a training run saves its adapter.

    Raises:
        CheckpointError: neither holds one.
    """
    for directory in (path_or_repo, path_or_repo / ADAPTER_NAME):
        if is_adapter(str(directory)):
            return directory
    raise no_adapter(path_or_repo)


def base_of(adapter: Path, given: str | None) -> str:
    """Return the base model's path or name: the user's, or the one in the adapter's configuration."""
    if given is not None:
        return given
    path = adapter / CONFIG_NAME
    config = read_json(path) if path.exists() else read_contents(adapter).config
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{adapter} does not say what its base model is: name it with --base")
    return named


def _is_here(path_or_repo: str) -> bool:
    """Return whether a model's configuration is in a directory of this name, or in the hub's cache."""
    if (Path(path_or_repo).expanduser() / "config.json").is_file():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(path_or_repo, "config.json"), str)
    except (HFValidationError, OSError):
        return False


def _joined(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _unreadable(path_or_repo: str, error: Exception, remedy: str) -> str:
    """Return the message for a model that could not be loaded."""
    if _is_here(path_or_repo):
        return f"{path_or_repo} is not a model that can be read: {_joined(error)}"
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    offline = "connect" in first or os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    reason = "the hub cannot be reached" if offline else f"the hub responded: {first}"
    return f"{path_or_repo}: there is no such directory, it is not in the hub's cache, and {reason}: {remedy}"


def quieten_transformers() -> None:
    """Silence redundant reports, and progress bars if the output is not a terminal."""
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load_tokenizer(path_or_repo: str) -> Any:
    """Return a model's tokenizer.

    Raises:
        ValueError: the model has none.
    """
    from transformers import AutoTokenizer

    quieten_transformers()
    _check_place(path_or_repo)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path_or_repo)
    except _FROM_ANYWHERE as error:
        if isinstance(error, OSError) and not _is_here(path_or_repo):
            raise ValueError(_unreadable(path_or_repo, error, _CHECK_NAME)) from None
        raise ValueError(f"{path_or_repo} has no tokenizer that can be read: {error}") from None
    # Without files, transformers may create an empty tokenizer of the model's type.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"{path_or_repo} has no tokenizer that can be read: save one there, with AutoTokenizer.from_pretrained and"
            " save_pretrained"
        )
    return tokenizer


_FROM_ANYWHERE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, StrictDataclassError)
_CHECK_NAME = "check the name, or give a directory"


def load_model(
    path_or_repo: str, *, weights: bool, adapter: Path | None = None, remedy: str = _CHECK_NAME
) -> nn.Module:
    """Return a transformers model of the class that an adapter was trained on, or that its configuration names.

    Args:
        path_or_repo: a directory or a name on the hub.
        weights: whether to load them; without them the model is on the meta device.
        adapter: an adapter that is for this model.
        remedy: what to do if there is no such model.

    Raises:
        ImportError: transformers is missing.
        ValueError: there is no such model, or none that transformers has a class for.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"reading a model needs transformers: pip install 'veratune[hf]' ({error})") from None
    quieten_transformers()
    _check_place(path_or_repo, remedy)
    wanted = {} if adapter is None else read_base(adapter)
    settings: dict[str, Any] = {}
    if wanted.get("id2label"):
        labels = {int(number): name for number, name in wanted["id2label"].items()}
        settings = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    if wanted.get("problem_type"):
        settings["problem_type"] = wanted["problem_type"]
    try:
        config: Any = transformers.AutoConfig.from_pretrained(path_or_repo, **settings)
    except _FROM_ANYWHERE as error:
        raise ValueError(_unreadable(path_or_repo, error, remedy)) from None
    names = [wanted["class"]] if wanted.get("class") else config.architectures or []
    model_class: Any = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if model_class is None:
        raise ValueError(
            f"{path_or_repo}: there is no class {' or '.join(names) or 'named'} in transformers to create it with"
        )
    if weights:
        return loaded(
            path_or_repo, lambda: model_class.from_pretrained(path_or_repo, config=config, dtype="auto")
        ).eval()

    def empty() -> Any:
        with torch.device("meta"):
            return model_class(config)

    return loaded(path_or_repo, empty).eval()


def loaded(path_or_repo: str, make: Callable[[], nn.Module]) -> nn.Module:
    """Return the model that a transformers function loads.

    Raises:
        ValueError: it could not be loaded.
    """
    try:
        return make()
    except (MemoryError, torch.OutOfMemoryError, ImportError):
        raise
    except Exception as error:  # from transformers, safetensors, huggingface_hub or torch
        raise ValueError(f"{path_or_repo} is not a model that can be read: {_joined(error)}") from error


def _check_place(path_or_repo: str, remedy: str = _CHECK_NAME) -> None:
    """Raise FileNotFoundError unless this is a local model directory or a name on the hub."""
    local = Path(path_or_repo).expanduser()
    if (
        not local.is_dir()
        and (path_or_repo.count("/") != 1 or path_or_repo.startswith((".", "/", "~")))
        and "/" in path_or_repo
    ):
        what = (
            "is a file" if local.is_file() else "is not a directory on this machine, nor the name of a hub repository"
        )
        raise FileNotFoundError(f"{path_or_repo} {what}: {remedy}")
    if local.is_dir() and not (local / "config.json").is_file():
        adapter = next((x for x in (local, local / ADAPTER_NAME) if is_adapter(str(x))), None)
        if adapter is not None:
            raise FileNotFoundError(f"{adapter} is an adapter, not a model; {_its_base(adapter)}")
        raise FileNotFoundError(f"{path_or_repo} does not contain a model: it has no config.json")


def _its_base(adapter: Path) -> str:
    try:
        return f"its base model is {base_of(adapter, None)}: pass that"
    except CheckpointError:
        return "it does not say what its base model is: pass that"
