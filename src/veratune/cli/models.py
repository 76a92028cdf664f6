"""Load base models, adapted models and tokenizers for the command line, from a directory or a hub name."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from veratune.checkpoint.files import CONFIG_NAME, CheckpointError, read_json
from veratune.checkpoint.formats import adapter_directory, has_adapter, no_adapter, read_base, read_contents
from veratune.cli.errors import SettingsError
from veratune.cli.options import SETTINGS_NAME
from veratune.cli.output import warning_line
from veratune.model import VeraModel
from veratune.utils.text import some

Loaded = TypeVar("Loaded")

GIVE_BASE = "give the base model with --model"


def adapter_in(path: Path) -> Path:
    """Return the directory of an adapter: the given one, or the folder in which a training run saves its adapter.

    Raises:
        CheckpointError: neither holds one.
    """
    directory = adapter_directory(path)
    if has_adapter(directory):
        return directory
    if (path / SETTINGS_NAME).is_file():
        raise CheckpointError(f"{path} is a training run that has not finished: veratune train --resume {path}")
    raise no_adapter(path)


def adapter_at(path_or_repo: str) -> Path | None:
    """Return the directory of the adapter that a path means, or None if it means something else, such as a model."""
    directory = adapter_directory(Path(path_or_repo).expanduser())
    return directory if has_adapter(directory) else None


def in_full(path_or_repo: str) -> str:
    """Return the absolute path of a local directory, which means the same model everywhere, or a name on the hub."""
    local = Path(path_or_repo).expanduser()
    return str(local.absolute()) if local.is_dir() else path_or_repo


def base_of(adapter: Path, given: str | None) -> str:
    """Return the base model's path or name: the user's, or the one in the adapter's configuration."""
    if given is not None:
        return given
    named = config_of(adapter).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{adapter} does not name its base model: {GIVE_BASE}")
    return named


def config_of(adapter: Path) -> dict[str, Any]:
    """Return an adapter's configuration."""
    path = adapter / CONFIG_NAME
    return read_json(path) if path.exists() else read_contents(adapter).config


def device_of(name: str | None) -> torch.device:
    """Return the device that --device names; the GPU by default if there is one.

    Raises:
        SettingsError: torch does not know it, or cannot compute there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise SettingsError(f"--device {name} is not a device that torch knows: try cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"--device {name}: there is no GPU that torch can use here")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise SettingsError(f"--device {name} cannot compute here: {str(error).splitlines()[0]}") from None
    return device


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
    """Return a model's tokenizer, with a padding token if it has one for the end of a text.

    Raises:
        ValueError: the model has none.
    """
    _check_place(path_or_repo)
    return _read_tokenizer(path_or_repo)


def _read_tokenizer(path_or_repo: str) -> Any:
    from transformers import AutoTokenizer

    quieten_transformers()
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
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(adapter: Path, base: str) -> Any:
    """Return the tokenizer that was saved with an adapter, or else the base model's."""
    return _read_tokenizer(str(adapter)) if (adapter / "tokenizer_config.json").is_file() else load_tokenizer(base)


def usable_length(max_length: int, base: str, tokenizer: Any, *, remedy: str = GIVE_BASE) -> int:
    """Return the maximum length of a text in tokens, limited to the model's positions."""
    positions = getattr(_read_config(base, remedy), "max_position_embeddings", None)
    # Some models count positions from 2: the tokenizer knows the usable length.
    known = [most for most in (positions, tokenizer.model_max_length) if isinstance(most, int) and most > 0]
    most = min(known, default=max_length)
    if most >= max_length:
        return max_length
    warning_line(f"texts are cut after {most} tokens: {base} has no more positions")
    return most


def pad_with(model: nn.Module, tokenizer: Any) -> None:
    """Tell a model which token pads a batch, if its configuration does not."""
    described: Any = model
    if getattr(described.config, "pad_token_id", None) is None:
        described.config.pad_token_id = tokenizer.pad_token_id


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
    wanted = {} if adapter is None else read_base(adapter)
    settings: dict[str, Any] = {}
    if wanted.get("id2label"):
        labels = {int(number): name for number, name in wanted["id2label"].items()}
        settings = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    if wanted.get("problem_type"):
        settings["problem_type"] = wanted["problem_type"]
    config = _read_config(path_or_repo, remedy, **settings)
    names = [wanted["class"]] if wanted.get("class") else config.architectures or []
    model_class: Any = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if model_class is None:
        raise ValueError(
            f"{path_or_repo}: there is no class {' or '.join(names) or 'named'} in transformers to create it with"
        )
    if weights:
        return loaded(path_or_repo, lambda: _with_weights(model_class, path_or_repo, config, adapter)).eval()

    def empty() -> nn.Module:
        with torch.device("meta"):
            made: nn.Module = model_class(config)
        return made

    return loaded(path_or_repo, empty).eval()


def _read_config(path_or_repo: str, remedy: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    _check_place(path_or_repo, remedy)
    try:
        return AutoConfig.from_pretrained(path_or_repo, **settings)
    except _FROM_ANYWHERE as error:
        raise ValueError(_unreadable(path_or_repo, error, remedy)) from None


def load_adapted(path_or_repo: str, adapter: Path) -> VeraModel:
    """Return an adapter on its base model, in eval mode.

    Args:
        path_or_repo: the base model.
        adapter: the adapter's directory.
    """
    base = load_model(path_or_repo, weights=True, adapter=adapter, remedy=GIVE_BASE)
    return VeraModel.from_pretrained(base, adapter)


def _with_weights(model_class: Any, path_or_repo: str, config: Any, adapter: Path | None) -> nn.Module:
    """Load a base model. Weights that its files lack, such as a new head, must be in the adapter."""
    if adapter is None:
        plain: nn.Module = model_class.from_pretrained(path_or_repo, config=config, dtype="auto")
        return plain
    made: nn.Module
    made, new = load_with_new(model_class, path_or_repo, config=config, dtype="auto", ignore_mismatched_sizes=True)
    trained = read_contents(adapter).others.keys()
    missing = [name for name in new if name not in trained]
    if missing:
        warning_line(
            f"neither {path_or_repo} nor {adapter} contains {some(missing)} of the right shape: random values are used,"
            " so the outputs are not those of training"
        )
    return made


def load_with_new(model_class: Any, path_or_repo: str, **settings: Any) -> tuple[Any, list[str]]:
    """Return a transformers model, and the names of the weights that its files lack, or have in another shape."""
    model, report = model_class.from_pretrained(path_or_repo, **settings, output_loading_info=True)
    return model, sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})


def loaded(path_or_repo: str, make: Callable[[], Loaded]) -> Loaded:
    """Return what a transformers function loads.

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
        adapter = adapter_at(path_or_repo)
        if adapter is not None:
            raise FileNotFoundError(f"{adapter} is an adapter, not a model; {_its_base(adapter)}")
        raise FileNotFoundError(f"{path_or_repo} does not contain a model: it has no config.json")


def _its_base(adapter: Path) -> str:
    try:
        return f"its base model is {base_of(adapter, None)}: pass that"
    except CheckpointError:
        return "it does not say what its base model is: pass that"
