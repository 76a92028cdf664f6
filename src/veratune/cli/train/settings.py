"""The settings of `veratune train`: defaults, a YAML file, options; checked, and written back in full."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veratune.cli.errors import SettingsError
from veratune.cli.options import SETTINGS_NAME
from veratune.cli.train.fields import (
    bad,
    encoding,
    integer,
    number,
    one_of,
    optional,
    options_of,
    required,
    setting,
    share,
    text,
)
from veratune.utils.outside_files import OutsideFileError, read_text
from veratune.utils.text import closest, shown

if TYPE_CHECKING:
    import torch

    from veratune.config import VeraConfig

# PEFT's names of the tasks.
TASKS = {
    "sequence-classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "causal-lm": "CAUSAL_LM",
}
CLASSIFICATION = ("sequence-classification", "token-classification")
PRECISIONS = ("float32", "bfloat16")
CHAT_LOSSES = ("assistant", "all")

# Far beyond any use, and still within the range of an optimizer in float32.
_LARGEST_RATE, _LARGEST_FLOAT = 1e30, (2 - 2.0**-23) * 2.0**127
_MOST_EPOCHS = 1e6
_LARGEST_FILE = 1 << 20

PANELS = _RUN, _ROWS, _ADAPTER, _TRAINING = "The run", "The rows", "The adapter", "The training"
_A_NAME_OR_NOTHING = optional(text("a name, or nothing"))


def dtype_of(name: str) -> "torch.dtype":
    """Return the dtype that --dtype names.

    Raises:
        SettingsError: torch has no floating-point dtype of this name.
    """
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SettingsError(f"--dtype {name}: not a floating-point dtype of torch; try float32 or bfloat16")
    return found


def _layers(given: str) -> str | list[str]:
    return given if given == "all-linear" else [name.strip() for name in given.split(",")]


def _as_given(name: str, value: Any) -> Any:
    return value  # VeraConfig checks it


@dataclass
class TrainSettings:
    """All settings of a training run.

    Each field declares its default, its option with the text of `--help`, and the check of its values, which applies to
    options and to a YAML file alike.
    """

    model: str = setting(
        "Base model: a directory or a hub name; or an earlier run, to start from its adapter.",
        _RUN,
        required(text("a path or a name")),
    )
    data: str = setting(
        "Training rows: a CSV, TSV, JSON, JSONL or Parquet file, or a data set's hub name.",
        _ROWS,
        required(text("a path or a name")),
    )
    output: str = setting("New directory for all output.", _RUN, required(text("a path or a name")))
    task: str = setting("{choices}.", _RUN, one_of(TASKS), default="sequence-classification", choices=TASKS)
    subset: str | None = setting("Configuration of a data set on the hub.", _ROWS, _A_NAME_OR_NOTHING, default=None)
    split: str = setting(
        "Part of a data set on the hub to train with. [default: {default}]", _ROWS, text("a name"), default="train"
    )
    eval_data: str | None = setting(
        "Evaluation rows; by default some of the training rows.", _ROWS, _A_NAME_OR_NOTHING, default=None
    )
    eval_split: str | None = setting(
        "Part of a data set on the hub to evaluate with.", _ROWS, _A_NAME_OR_NOTHING, default=None
    )
    eval_fraction: float = setting(
        "Share of the training rows to evaluate with. [default: {default}]", _ROWS, share, default=0.1
    )
    encoding: str | None = setting(
        "Encoding of a text file, such as gb18030; by default utf-8.", _ROWS, optional(encoding), default=None
    )
    # For token classification a list of words, for a chat a list of messages.
    text_column: str = setting(
        "Column of the text, of words, or of a chat. [default: {default}]", _ROWS, text("a name"), default="text"
    )
    text_pair_column: str | None = setting("Column of a second text.", _ROWS, _A_NAME_OR_NOTHING, default=None)
    # For token classification a list, with a label for each word.
    label_column: str = setting("Column of the label. [default: {default}]", _ROWS, text("a name"), default="label")
    chat_loss: str = setting(
        "What to learn from a chat: {choices}.", _ROWS, one_of(CHAT_LOSSES), default="assistant", choices=CHAT_LOSSES
    )
    # The settings of the adapter have the names and the defaults that they have in VeraConfig.
    r: int = setting("VeRA's rank. [default: {default}]", _ADAPTER, integer(1), default=256, short="-r")
    target_modules: str | list[str] = setting(  # noqa: RUF009  # it makes a field
        "Layers: all-linear (the default), or comma-separated names.",
        _ADAPTER,
        _as_given,
        default="all-linear",
        parse=_layers,
    )
    d_initial: float = setting(
        "Initial value of d. [default: {default}]", _ADAPTER, number(most=_LARGEST_FLOAT), default=0.1
    )
    vera_dropout: float = setting("Dropout on the adapter's input. [default: {default}]", _ADAPTER, share, default=0.0)
    projection_prng_key: int = setting(
        "Key of the random projections. [default: {default}]", _ADAPTER, _as_given, default=0
    )
    # Other fields of VeraConfig; only a YAML file can have them.
    vera: dict[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float = setting(
        "For the vectors. [default: {default}]", _TRAINING, number(0.0, _LARGEST_RATE), default=2e-2, short="--lr"
    )
    head_learning_rate: float = setting(
        "For a new head. [default: {default}]", _TRAINING, number(0.0, _LARGEST_RATE), default=4e-3, short="--head-lr"
    )
    weight_decay: float = setting("For both. [default: {default}]", _TRAINING, share, default=0.0)
    warmup: float = setting(
        "Share of the steps with a rising learning rate. [default: {default}]", _TRAINING, share, default=0.06
    )
    epochs: float = setting(
        "Passes over all rows. [default: {default}]", _TRAINING, number(0.0, _MOST_EPOCHS), default=3.0
    )
    # 0 for no limit; a limit overrides the epochs.
    max_steps: int = setting("Steps to train for, instead of epochs.", _TRAINING, integer(0), default=0)
    # 0 for once an epoch.
    eval_steps: int = setting(
        "Steps between evaluations, with checkpoints; by default one epoch.", _TRAINING, integer(0), default=0
    )
    # 0 for never.
    early_stopping: int = setting(
        "Evaluations without improvement to stop after; by default never.", _TRAINING, integer(0), default=0
    )
    batch_size: int = setting("Rows in a step. [default: {default}]", _TRAINING, integer(1), default=16)
    gradient_accumulation: int = setting(
        "Batches to accumulate for each optimizer step. [default: {default}]", _TRAINING, integer(1), default=1
    )
    max_length: int = setting("Tokens after which a text is cut. [default: {default}]", _ROWS, integer(1), default=256)
    precision: str = setting("{choices}.", _TRAINING, one_of(PRECISIONS), default="float32", choices=PRECISIONS)
    seed: int = setting("For everything random. [default: {default}]", _RUN, integer(0), default=0)

    def __post_init__(self) -> None:
        for name, option in options_of(self).items():
            setattr(self, name, option.check(name, getattr(self, name)))
        self._complete_vera()

    def _complete_vera(self) -> None:
        from veratune.config import VeraConfig, foreign_field

        known = set(VeraConfig.names_with(train=True))
        if not isinstance(self.vera, dict):
            raise bad("vera", self.vera, "lines of 'name: value'")
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

    def vera_config(self) -> "VeraConfig":
        """Return the adapter's settings."""
        from veratune.config import VeraConfig

        named = {name: getattr(self, name) for name in ADAPTER_SETTINGS}
        return VeraConfig(task_type=TASKS[self.task], **named, **self.vera)

    def to_yaml(self) -> str:
        """Return all settings as YAML, in order."""
        import yaml

        lines: str = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        return lines

    def write(self, directory: Path) -> None:
        """Write all settings into a directory."""
        from veratune.checkpoint.files import write_text

        write_text(directory / SETTINGS_NAME, self.to_yaml())


# The options that are fields of VeraConfig; the others are in `vera`.
ADAPTER_SETTINGS = ("r", "target_modules", "d_initial", "vera_dropout", "projection_prng_key")


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        SettingsError: the file is missing, is not a YAML mapping, or has unknown settings.
    """
    import yaml

    try:
        values = yaml.safe_load(read_text(path, _LARGEST_FILE))
    except OutsideFileError as error:
        raise SettingsError(str(error)) from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SettingsError(f"{path} cannot be read: it is nested too deeply") from None
    except SettingsError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # in a number, a date or a key
        raise SettingsError(f"{path} has a value that cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} does not contain settings: it must consist of 'name: value' lines")
    known = [field.name for field in dataclasses.fields(TrainSettings)]
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise SettingsError(f"{path} has unknown settings {shown(unknown)}{_meant(unknown, known)}: there are {known}")
    return values


def _meant(unknown: list[str], known: Collection[str]) -> str:
    near = closest(unknown[0], known)
    return f" (did you mean {near[0]!r}?)" if near else ""
