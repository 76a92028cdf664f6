"""Rows for `veratune train`: read from a file, checked, and made into what a model takes."""

import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from veratune.cli.settings import TrainSettings

Row = dict[str, Any]
_SHOWN = 40


def read_rows(path: str) -> list[Row]:
    """Read a CSV, JSON lines or Parquet file.

    Raises:
        ValueError: no such file, another kind of file, no rows.
    """
    try:
        import pandas as pd  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"reading data needs pandas: pip install 'veratune[cli]' ({error})") from None
    file = Path(path)
    # What is written is what counts: "01" is not 1, "None" may be a word, and no column is an index.
    as_written = {"dtype": str, "keep_default_na": False, "index_col": False}
    readers: dict[str, Callable[[Path], Any]] = {
        ".csv": lambda name: pd.read_csv(name, **as_written),
        ".tsv": lambda name: pd.read_csv(name, sep="\t", **as_written),
        ".jsonl": _read_lines,
        ".parquet": pd.read_parquet,
    }
    if not file.is_file():
        raise ValueError(f"{path} is not a file")
    if file.suffix.lower() not in readers:
        raise ValueError(f"{path} is none of the kinds that are read: {', '.join(readers)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows that are longer than the header
            found = readers[file.suffix.lower()](file)
    except (ValueError, UnicodeDecodeError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    records = found if isinstance(found, list) else found.to_dict("records")
    rows: list[Row] = [{str(name): value for name, value in row.items()} for row in records]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _read_lines(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} holds no JSON object")
            rows.append(row)
    return rows


def check_columns(path: str, rows: list[Row], settings: TrainSettings) -> None:
    """Raise ValueError for a column that is missing, or a row that lacks a value."""
    wanted = [settings.text_column]
    if settings.text_pair_column is not None:
        wanted.append(settings.text_pair_column)
    if settings.task != "causal-lm":
        wanted.append(settings.label_column)
    for name in wanted:
        if name not in rows[0]:
            raise ValueError(f"{path} has no column {name!r}: it has {sorted(rows[0])}")
        empty = next((i for i, row in enumerate(rows) if _is_empty(row[name])), None)
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


def split(rows: list[Row], settings: TrainSettings) -> tuple[list[Row], list[Row]]:
    """Return (rows to train with, rows to evaluate with), chosen by the seed."""
    count = round(len(rows) * settings.eval_fraction)
    order = np.random.default_rng(settings.seed).permutation(len(rows)).tolist()
    if count < 1 or count >= len(rows):
        raise ValueError(
            f"eval_fraction={settings.eval_fraction} of {len(rows)} rows leaves none to evaluate or to train with: give"
            " eval_data, or another fraction"
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
    """Rows made into a model's inputs, once."""

    def __init__(self, rows: list[Row], encode: Callable[[Row], Row]) -> None:
        self.examples = [encode(row) for row in rows]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Row:
        return self.examples[index]


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or (isinstance(value, str) and not value)
