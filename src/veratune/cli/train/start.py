"""Start a training run from a trained adapter: its settings, its classes, and the adapted model."""

from pathlib import Path
from typing import Any

from torch import nn

from veratune.checkpoint.formats import format_of, read_base, read_contents
from veratune.checkpoint.native import NativeFormat
from veratune.cli.errors import SettingsError
from veratune.cli.models import adapter_at
from veratune.cli.train.fields import flag
from veratune.cli.train.settings import ADAPTER_SETTINGS, TrainSettings
from veratune.cli.train.tasks import task_of_class
from veratune.config import VeraConfig
from veratune.model import VeraModel, get_peft_model
from veratune.utils.text import some


def start_of(model: str) -> Path | None:
    """Return the directory of the adapter to start from, or None if a run's `model` is a base model."""
    is_model = (Path(model).expanduser() / "config.json").is_file()
    return None if is_model else adapter_at(model)


def with_adapters_settings(values: dict[str, Any]) -> TrainSettings:
    """Return the settings of a run; if its model is an adapter, with that adapter's.

    Args:
        values: the settings that were given.

    Raises:
        SettingsError: a setting is not allowed, or is not the adapter's.
    """
    settings = TrainSettings(**values)
    adapter = start_of(settings.model)
    if adapter is None:
        return settings
    if not isinstance(format_of(adapter), NativeFormat):
        raise SettingsError(f"{adapter} is not in veratune's format: veratune convert writes it in that format")
    config = read_contents(adapter).config
    there = {name: config[name] for name in ADAPTER_SETTINGS}
    vera = {name: config[name] for name in VeraConfig.names_with(train=True)}
    task = task_of_adapter(adapter)
    if task is not None:
        there["task"] = task
    given = {flag(name): (getattr(settings, name), value) for name, value in there.items() if name in values}
    given |= {f"vera: {name}": (settings.vera[name], vera[name]) for name in values.get("vera") or {}}
    for name, (wanted, own) in given.items():
        if wanted != own:
            raise SettingsError(
                f"{name} {wanted!r} is not what {adapter} has: {own!r}. Training continues with the adapter's settings:"
                " leave it out, or start from the base model"
            )
    return TrainSettings(**{**values, **there, "vera": vera})


def task_of_adapter(adapter: Path) -> str | None:
    """Return the task of an adapter's base class, or None if it has no task that training supports."""
    base = read_base(adapter)
    return task_of_class(str(base.get("class") or ""), base.get("problem_type"), len(base.get("id2label") or {}))


def classes_of_adapter(adapter: Path) -> list[str]:
    """Return the names of an adapter's classes, by their numbers."""
    named = read_base(adapter).get("id2label") or {}
    return [named[number] for number in sorted(named, key=int)]


def adapted_model(base: nn.Module, new: list[str], adapter: Path | None, config: VeraConfig) -> VeraModel:
    """Return the model to train: with the given adapter, or with a new one.

    Args:
        base: the base model.
        new: the names of its weights that are random, as its files lack them.
        adapter: the adapter to start from.
        config: the configuration of a new adapter.

    Raises:
        SettingsError: a random weight would be in neither the base model's files nor the adapter's.
    """
    if adapter is None:
        model = get_peft_model(base, config)
    else:
        model = VeraModel.from_pretrained(base, adapter, is_trainable=True)
    saved = model.peft_config["default"].modules_to_save or []
    lost = [name for name in new if not any(name.startswith(f"{module}.") for module in saved)]
    if lost:
        modules = sorted({*saved, *(name.rpartition(".")[0] for name in lost)})
        raise SettingsError(
            f"the base model's files do not contain {some(lost)}: random values would be used and lost, as the adapter"
            f" would not contain them either. Train them in full with vera: {{modules_to_save: {modules}}} in a"
            " --config file, or choose a base model that has them"
        )
    return model
