"""The settings of `veratune train`: defaults, a YAML file, options; checked, and written back in full."""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veratune.checkpoint.files import write_text
from veratune.config import VeraConfig

# PEFT's names of the tasks.
TASKS = {
    "sequence-classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "causal-lm": "CAUSAL_LM",
}
PRECISIONS = ("float32", "bfloat16")
CHAT_LOSSES = ("assistant", "all")
SETTINGS_NAME = "train.yaml"

# Fields of VeraConfig that a run sets itself, or that have settings of their own.
_NOT_IN_VERA = {
    *("r", "target_modules", "d_initial", "vera_dropout", "projection_prng_key"),
    *("task_type", "inference_mode", "init_weights", "base_model_name_or_path", "revision"),
}


class SettingsError(ValueError):
    """A setting that cannot be: the call is wrong, whatever the files hold."""


def dtype_of(name: str) -> torch.dtype:
    """Return what an option --dtype names.

    Raises:
        SettingsError: torch has no floating-point dtype of this name.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SettingsError(f"--dtype {name}: not a floating-point dtype of torch; try float32 or bfloat16")
    return found


@dataclass
class TrainSettings:
    """All that decides what a training run does.

    Attributes:
        model: the base model: a directory or a hub name.
        data: training rows: a CSV, TSV, JSONL or Parquet file, or a data set's name on the hub.
        output: directory for checkpoints, the adapter and the results.
        task: one of TASKS.
        subset: which configuration of a data set on the hub.
        split: which part of a data set on the hub to train with.
        eval_data: rows to evaluate with; None takes `eval_split`, or else `eval_fraction` of the training rows.
        eval_split: which part of a data set on the hub to evaluate with.
        eval_fraction: share of the training rows to evaluate with, where there are no others.
        text_column: the text; for token classification a list of words; for a chat a list of messages.
        text_pair_column: a second text, for classification and regression of pairs.
        label_column: the label; for token classification a list, one for each word.
        chat_loss: which part of a chat is learned: what the "assistant" says, or "all".
        rank, target_modules, d_initial, vera_dropout, projection_prng_key: as in `VeraConfig`.
        vera: other fields of `VeraConfig`.
        learning_rate: of the vectors.
        head_learning_rate: of a new head.
        weight_decay: of both.
        warmup: share of the steps with a growing learning rate.
        epochs: how many times all rows are seen.
        max_steps: steps of the optimizer after which to end, whatever `epochs` says; 0 for no limit.
        eval_steps: steps of the optimizer between evaluations and checkpoints; 0 for once an epoch.
        batch_size: rows in a step on one device.
        gradient_accumulation: steps that are added up before the optimizer's.
        max_length: tokens after which a text is cut.
        precision: float32, or bfloat16 through autocast.
        seed: of everything random.
        early_stopping: evaluations without a better one after which to stop; 0 for none.
    """

    model: str
    data: str
    output: str
    task: str = "sequence-classification"
    subset: str | None = None
    split: str = "train"
    eval_data: str | None = None
    eval_split: str | None = None
    eval_fraction: float = 0.1
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    chat_loss: str = "assistant"
    rank: int = 256
    target_modules: str | list[str] = "all-linear"
    d_initial: float = 0.1
    vera_dropout: float = 0.0
    projection_prng_key: int = 0
    vera: dict[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float = 2e-2
    head_learning_rate: float = 4e-3
    weight_decay: float = 0.0
    warmup: float = 0.06
    epochs: float = 3.0
    max_steps: int = 0
    eval_steps: int = 0
    batch_size: int = 16
    gradient_accumulation: int = 1
    max_length: int = 256
    precision: str = "float32"
    seed: int = 0
    early_stopping: int = 0

    def __post_init__(self) -> None:
        for name in ("model", "data", "output"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise SettingsError(f"{name} is missing: give it as --{name}, or in the --config file")
        for name in ("split", "text_column", "label_column"):
            if not isinstance(getattr(self, name), str):
                raise SettingsError(f"{name}={getattr(self, name)!r} is not allowed: it must be a name")
        for name in ("subset", "eval_data", "eval_split", "text_pair_column"):
            if not isinstance(getattr(self, name), str | None):
                raise SettingsError(f"{name}={getattr(self, name)!r} is not allowed: it must be a name, or nothing")
        _one_of("task", self.task, TASKS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("chat_loss", self.chat_loss, CHAT_LOSSES)
        for name in ("rank", "batch_size", "gradient_accumulation", "max_length"):
            _whole(name, getattr(self, name), least=1)
        for name in ("seed", "early_stopping", "max_steps", "eval_steps"):
            _whole(name, getattr(self, name), least=0)
        for name in ("learning_rate", "head_learning_rate", "epochs"):
            setattr(self, name, _number(name, getattr(self, name), above=0.0))
        for name in ("eval_fraction", "warmup", "weight_decay", "vera_dropout"):
            value = _number(name, getattr(self, name))
            if not 0.0 <= value < 1.0:
                raise SettingsError(f"{name}={value!r} is not allowed: it must be in [0, 1)")
            setattr(self, name, value)
        self.d_initial = _number("d_initial", self.d_initial)
        self._complete_vera()

    def _complete_vera(self) -> None:
        known = {field.name for field in dataclasses.fields(VeraConfig)} - _NOT_IN_VERA
        if not isinstance(self.vera, dict):
            raise SettingsError(f"vera={self.vera!r} is not allowed: it must hold lines of 'name: value'")
        unknown = sorted(set(map(str, self.vera)) - known)
        if unknown:
            raise SettingsError(f"vera has unknown settings {unknown}: there are {sorted(known)}")
        try:
            every = self.vera_config().to_dict()
        except (TypeError, ValueError) as error:
            raise SettingsError(str(error)) from None
        self.vera = {name: value for name, value in every.items() if name in known}

    def vera_config(self) -> VeraConfig:
        """Return the adapter's settings."""
        return VeraConfig(
            r=self.rank,
            target_modules=self.target_modules,
            d_initial=self.d_initial,
            vera_dropout=self.vera_dropout,
            projection_prng_key=self.projection_prng_key,
            task_type=TASKS[self.task],
            **self.vera,
        )

    def to_yaml(self) -> str:
        """Return all settings as YAML, in their order."""
        import yaml

        text: str = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        return text

    def write(self, directory: Path) -> None:
        """Write all settings into a directory."""
        write_text(directory / SETTINGS_NAME, self.to_yaml())


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        SettingsError: the file is missing, is no YAML mapping, or has settings that there are not.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise SettingsError(f"{path} is a directory, not a YAML file") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not a text file: {error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds no settings: it must be lines of 'name: value'")
    known = [field.name for field in dataclasses.fields(TrainSettings)]
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise SettingsError(f"{path} has unknown settings {unknown}: there are {known}")
    return values


def _one_of(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name}={value!r} is not allowed: it must be one of {', '.join(allowed)}")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"{name}={value!r} is not allowed: it must be an integer from {least}")


def _number(name: str, value: Any, above: float | None = None) -> float:
    # YAML reads 1e-2 as a string, since its numbers want a dot.
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{name}={value!r} is not allowed: it must be a number") from None
    if not math.isfinite(number) or (above is not None and number <= above):
        wanted = "a finite number" if above is None else f"a finite number above {above:g}"
        raise SettingsError(f"{name}={value!r} is not allowed: it must be {wanted}")
    return number
