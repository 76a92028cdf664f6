"""Rows for `veratune train`: read from a file, checked, and made into what a model takes."""

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from veratune.cli.chats import IGNORED
from veratune.cli.hub_rows import may_be_hub_name, read_hub_rows
from veratune.cli.settings import SettingsError, TrainSettings

Row = dict[str, Any]
_SHOWN = 40


def read_rows(path: str, subset: str | None = None, split: str = "train") -> list[Row]:
    """Read a CSV, TSV, JSON lines or Parquet file, or a part of a data set on the hub.

    Args:
        path: the file, or the data set's name.
        subset: configuration of a data set on the hub.
        split: part of a data set on the hub.

    Raises:
        SettingsError: no such file, or another kind of file.
        ValueError: no such data set, a file that cannot be read, no rows.
    """
    try:
        import pandas as pd  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"reading data needs pandas: pip install 'veratune[cli]' ({error})") from None
    file = Path(path).expanduser()
    # What is written is what counts: "01" is not 1, "None" may be a word, and no column is an index.
    as_written = {"dtype": str, "keep_default_na": False, "index_col": False}
    readers: dict[str, Callable[[Path], Any]] = {
        ".csv": lambda name: pd.read_csv(name, **as_written),
        ".tsv": lambda name: pd.read_csv(name, sep="\t", **as_written),
        ".jsonl": _read_lines,
        ".parquet": pd.read_parquet,
    }
    known = file.suffix.lower() in readers
    if not file.exists() and not known and may_be_hub_name(path):
        return _some(path, read_hub_rows(path, subset, split))
    if not file.is_file():
        raise SettingsError(f"{path} is not a file")
    if not known:
        raise SettingsError(f"{path} is none of the kinds that are read: {', '.join(readers)}")
    if file.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows that are longer than the header
            found = readers[file.suffix.lower()](file)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    records = found if isinstance(found, list) else found.to_dict("records")
    return _some(path, [{str(name): value for name, value in row.items()} for row in records])


def _some(path: str, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _read_lines(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} holds no JSON object")
            rows.append(row)
    return rows


def check_columns(path: str, rows: list[Row], settings: TrainSettings) -> None:
    """Raise SettingsError for a column that is missing, and ValueError for a row that lacks a value."""
    wanted = [settings.text_column]
    if settings.text_pair_column is not None:
        wanted.append(settings.text_pair_column)
    if settings.task != "causal-lm":
        wanted.append(settings.label_column)
    for name in wanted:
        if name not in rows[0]:
            option = next(
                x for x in ("text_column", "text_pair_column", "label_column") if getattr(settings, x) == name
            )
            raise SettingsError(
                f"{path} has no column {name!r}: it has {sorted(rows[0])}; name one with --{option.replace('_', '-')}"
            )
        empty = next((i for i, row in enumerate(rows) if _is_empty(row.get(name))), None)
        if empty is not None:
            raise ValueError(f"{path}: row {empty + 1} has nothing in the column {name!r}")
    if settings.task == "regression":
        for i, row in enumerate(rows):
            try:
                finite = math.isfinite(float(row[settings.label_column]))
            except (TypeError, ValueError):
                finite = False
            if not finite:
                raise ValueError(
                    f"{path}: row {i + 1} has no number in {settings.label_column!r}: {row[settings.label_column]!r}"
                )
    if settings.task == "token-classification":
        for i, row in enumerate(rows):
            words, labels = row[settings.text_column], row[settings.label_column]
            if not _is_list(words) or not _is_list(labels) or len(words) != len(labels):
                raise ValueError(f"{path}: row {i + 1} must have lists of as many labels as words")
            if any(label is None for label in labels):
                raise ValueError(f"{path}: row {i + 1} has an empty label")
    elif settings.task == "causal-lm":
        for i, row in enumerate(rows):
            if _is_list(row[settings.text_column]):
                _check_chat(f"{path}: row {i + 1}", row[settings.text_column], settings)
    else:
        for i, row in enumerate(rows):
            if _is_list(row[settings.text_column]):
                raise ValueError(
                    f"{path}: row {i + 1} has a list in {settings.text_column!r}, and {settings.task} a text"
                )


def _check_chat(where: str, messages: Any, settings: TrainSettings) -> None:
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where} is no chat: each message must have a 'role' and a 'content'")
    if settings.chat_loss == "assistant" and not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{where} has no message of the role 'assistant', and they are what is learned: add one, or --chat-loss all"
        )


def split(rows: list[Row], settings: TrainSettings) -> tuple[list[Row], list[Row]]:
    """Return (rows to train with, rows to evaluate with), chosen by the seed."""
    count = round(len(rows) * settings.eval_fraction)
    order = np.random.default_rng(settings.seed).permutation(len(rows)).tolist()
    if count < 1 or count >= len(rows):
        raise ValueError(
            f"eval_fraction={settings.eval_fraction} of {len(rows)} rows leaves none to evaluate or to train with: give"
            " --eval-data, or another --eval-fraction"
        )
    chosen = set(order[:count])
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def label_names(train: list[Row], evaluation: list[Row], settings: TrainSettings) -> list[str]:
    """Return the classes, sorted.

    Raises:
        ValueError: there is one class only, or evaluation rows have others than training rows.
    """

    def found(rows: list[Row]) -> Counter[str]:
        values = (row[settings.label_column] for row in rows)
        if settings.task == "token-classification":
            return Counter(str(label) for labels in values for label in labels)
        return Counter(str(label) for label in values)

    there, other = found(train), found(evaluation)
    if len(there) < 2:
        raise ValueError(f"all training rows have the same {settings.label_column}: {next(iter(there))!r}")
    new = sorted(set(other) - set(there))
    if new:
        shown = [label if len(label) <= _SHOWN else label[:_SHOWN] + "..." for label in new[:5]]
        raise ValueError(f"rows to evaluate with have {len(new)} labels that no training row has: {shown}")
    return sorted(there)


def digest(*parts: list[Row]) -> str:
    """Return a SHA-256 of rows, by which a run that is gone on with knows its own."""
    sha = hashlib.sha256()
    for rows in parts:
        for row in rows:
            sha.update(repr(sorted((name, str(value)) for name, value in row.items())).encode())
        sha.update(b"|")
    return sha.hexdigest()


class Examples(torch.utils.data.Dataset[Row]):
    """Rows made into a model's inputs, once.

    Attributes:
        examples: the inputs; rows of which nothing is learned are not among them.
        left_out: how many those are.

    Raises:
        ValueError: a row that cannot be.
    """

    def __init__(self, origin: str, rows: list[Row], encode: Callable[[Row], Row]) -> None:
        self.examples: list[Row] = []
        for number, row in enumerate(rows, start=1):
            try:
                example = encode(row)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{origin}, row {number}: {error}") from None
            if not _is_list(example["labels"]) or any(label != IGNORED for label in example["labels"]):
                self.examples.append(example)
        self.left_out = len(rows) - len(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.examples)

    def __getitem__(self, index: int) -> Row:
        return self.examples[index]


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or (isinstance(value, str) and not value)
