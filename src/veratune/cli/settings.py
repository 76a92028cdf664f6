"""The settings of `veratune train`: defaults, a YAML file, options; checked, and written back in full."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veratune.checkpoint.files import write_text

TASKS = ("sequence-classification", "regression", "token-classification", "causal-lm")
PRECISIONS = ("float32", "bfloat16")
SETTINGS_NAME = "train.yaml"


@dataclass
class TrainSettings:
    """All that decides what a training run does.

    Attributes:
        model: the base model: a directory or a hub name.
        data: training rows: a CSV, JSONL or Parquet file.
        output: directory for checkpoints, the adapter and the results.
        task: one of TASKS.
        eval_data: rows to evaluate with; None takes `eval_fraction` of the training rows.
        eval_fraction: share of the training rows to evaluate with, where there are no others.
        text_column: the text; for token classification a list of words; for a chat a list of messages.
        text_pair_column: a second text, for classification and regression of pairs.
        label_column: the label; for token classification a list, one for each word.
        rank, target_modules, d_initial, vera_dropout, projection_prng_key: as in `VeraConfig`.
        learning_rate: of the vectors.
        head_learning_rate: of a new head.
        weight_decay: of both.
        warmup: share of the steps with a growing learning rate.
        epochs: how many times all rows are seen.
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
    eval_data: str | None = None
    eval_fraction: float = 0.1
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    rank: int = 256
    target_modules: str | list[str] = "all-linear"
    d_initial: float = 0.1
    vera_dropout: float = 0.0
    projection_prng_key: int = 0
    learning_rate: float = 2e-2
    head_learning_rate: float = 4e-3
    weight_decay: float = 0.0
    warmup: float = 0.06
    epochs: float = 3.0
    batch_size: int = 16
    gradient_accumulation: int = 1
    max_length: int = 256
    precision: str = "float32"
    seed: int = 0
    early_stopping: int = 0

    def __post_init__(self) -> None:
        for name in ("model", "data", "output"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} is missing: give it as an option or in the configuration file")
        _one_of("task", self.task, TASKS)
        _one_of("precision", self.precision, PRECISIONS)
        for name in ("rank", "batch_size", "gradient_accumulation", "max_length"):
            _whole(name, getattr(self, name), least=1)
        for name in ("seed", "early_stopping"):
            _whole(name, getattr(self, name), least=0)
        for name in ("learning_rate", "head_learning_rate", "epochs"):
            setattr(self, name, _number(name, getattr(self, name), above=0.0))
        for name in ("eval_fraction", "warmup", "weight_decay", "vera_dropout"):
            value = _number(name, getattr(self, name))
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value!r} is not allowed: it must be in [0, 1)")
            setattr(self, name, value)

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
        ValueError: the file is missing, is no YAML mapping, or has settings that there are not.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings: it must be lines of 'name: value'")
    known = [field.name for field in dataclasses.fields(TrainSettings)]
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise ValueError(f"{path} has unknown settings {unknown}: there are {known}")
    return values


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed: it must be one of {', '.join(allowed)}")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not allowed: it must be an integer from {least}")


def _number(name: str, value: Any, above: float | None = None) -> float:
    # YAML reads 1e-2 as a string, since its numbers want a dot.
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is not allowed: it must be a number") from None
    if not math.isfinite(number) or (above is not None and number <= above):
        raise ValueError(f"{name}={value!r} is not allowed: it must be a finite number above {above}")
    return number
