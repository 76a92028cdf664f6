"""The settings of `veratune train`: defaults, a YAML file, options; checked, and written back in full."""

import dataclasses
import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veratune.checkpoint.files import write_text
from veratune.config import VeraConfig, foreign_field, shown

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

# Far beyond all use, and still within what an optimizer computes with in float32.
_LARGEST_RATE, _LARGEST_FLOAT = 1e30, float(torch.finfo(torch.float32).max)
_MOST_EPOCHS = 1e6
_LARGEST_INTEGER = (1 << 31) - 1
_LARGEST_FILE = 1 << 20

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
            if getattr(self, name) in ("", None):
                raise SettingsError(f"{name} is missing: give it as --{name}, or in the --config file")
            _text(name, getattr(self, name), "a path or a name")
        for name in ("split", "text_column", "label_column"):
            _text(name, getattr(self, name), "a name")
        for name in ("subset", "eval_data", "eval_split", "text_pair_column"):
            if getattr(self, name) is not None:
                _text(name, getattr(self, name), "a name, or nothing")
        _one_of("task", self.task, TASKS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("chat_loss", self.chat_loss, CHAT_LOSSES)
        for name in ("rank", "batch_size", "gradient_accumulation", "max_length"):
            _whole(name, getattr(self, name), least=1)
        for name in ("seed", "early_stopping", "max_steps", "eval_steps"):
            _whole(name, getattr(self, name), least=0)
        for name, most in (
            ("learning_rate", _LARGEST_RATE),
            ("head_learning_rate", _LARGEST_RATE),
            ("epochs", _MOST_EPOCHS),
        ):
            setattr(self, name, _number(name, getattr(self, name), above=0.0, most=most))
        for name in ("eval_fraction", "warmup", "weight_decay", "vera_dropout"):
            value = _number(name, getattr(self, name))
            if not 0.0 <= value < 1.0:
                raise _bad(name, value, "in [0, 1)")
            setattr(self, name, value)
        self.d_initial = _number("d_initial", self.d_initial, most=_LARGEST_FLOAT)
        self._complete_vera()

    def _complete_vera(self) -> None:
        known = {field.name for field in dataclasses.fields(VeraConfig)} - _NOT_IN_VERA
        if not isinstance(self.vera, dict):
            raise _bad("vera", self.vera, "lines of 'name: value'")
        unknown = sorted(set(map(str, self.vera)) - known)
        if unknown:
            remedy = foreign_field(unknown[0])
            own = f" ({remedy})" if remedy else _meant(unknown, known)
            raise SettingsError(f"vera has unknown settings {shown(unknown)}{own}: there are {sorted(known)}")
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
        if path.exists() and not path.is_file():
            raise SettingsError(f"{path} is {'a directory' if path.is_dir() else 'no regular file'}, not a YAML file")
        if path.is_file() and path.stat().st_size > _LARGEST_FILE:
            raise SettingsError(f"{path} has {path.stat().st_size:,} bytes, too many for settings")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not a text file: {error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SettingsError(f"{path} is not settings: it is nested too deeply") from None
    except SettingsError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # of a number, a date or a key
        raise SettingsError(f"{path} has a value that cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds no settings: it must be lines of 'name: value'")
    known = [field.name for field in dataclasses.fields(TrainSettings)]
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise SettingsError(f"{path} has unknown settings {shown(unknown)}{_meant(unknown, known)}: there are {known}")
    return values


def _meant(unknown: list[str], known: Collection[str]) -> str:
    near = difflib.get_close_matches(unknown[0], known, n=1)
    return f" (do you mean {near[0]!r}?)" if near else ""


def _bad(name: str, value: object, wanted: str) -> SettingsError:
    return SettingsError(f"{name}={shown(value)} is not allowed: it must be {wanted}")


def _one_of(name: str, value: object, allowed: Collection[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise _bad(name, value, f"one of {', '.join(allowed)}")


def _text(name: str, value: object, wanted: str) -> None:
    if not isinstance(value, str):
        raise _bad(name, value, f"{wanted}; in a YAML file, put it in quotes")
    if not value or "\0" in value:
        raise _bad(name, value, wanted)


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST_INTEGER:
        raise _bad(name, value, f"an integer from {least} to {_LARGEST_INTEGER}")


def _number(name: str, value: Any, above: float | None = None, most: float = math.inf) -> float:
    # YAML reads 1e-2 as a string, since its numbers want a dot.
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        raise _bad(name, value, "a number") from None
    if not math.isfinite(number) or (above is not None and number <= above) or abs(number) > most:
        wanted = "a finite number" if above is None else f"a finite number above {above:g}"
        raise _bad(name, value, wanted if most == math.inf else f"{wanted}, of at most {most:g}")
    return number
