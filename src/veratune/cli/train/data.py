"""Rows for `veratune train`: read from a file, checked, and converted to a model's inputs."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from veratune.checkpoint.header import memory_of_machine
from veratune.cli.train.chats import IGNORED
from veratune.cli.train.fields import SettingsError
from veratune.cli.train.hub_rows import may_be_hub_name, read_hub_rows
from veratune.cli.train.settings import TrainSettings
from veratune.cli.values import (
    check_chat,
    check_not_measured,
    check_number,
    check_text,
    check_words,
    class_name,
    describe,
    is_empty,
    plain,
)
from veratune.utils.outside_files import check_count, opened

Row = dict[str, Any]
_SHOWN = 40
_MOST_COLUMNS = 20
# pandas needs kilobytes per column, and aborts the process if there is no memory for them.
_MOST_COLUMNS_READ = 10_000
_LONGEST_HEADER = 1 << 20
# Python's strings may take four times the memory of Arrow's.
_COPIES_OF_ROWS = 4
_ROWS_AT_ONCE = 1024


def read_rows(path: str, subset: str | None = None, split: str = "train") -> list[Row]:
    """Read a CSV, TSV, JSON lines or Parquet file, or a part of a data set on the hub.

    Args:
        path: the file, or the data set's name.
        subset: configuration of a data set on the hub.
        split: part of a data set on the hub.

    Raises:
        SettingsError: no such file, or an unsupported kind of file.
        ValueError: no such data set, a file that cannot be read, or no rows.
    """
    try:
        import pandas as pd  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"reading data needs pandas: pip install 'veratune[cli]' ({error})") from None
    file = Path(path).expanduser()
    readers: dict[str, Callable[[BinaryIO], Any]] = {
        ".csv": _read_table(","),
        ".tsv": _read_table("\t"),
        ".jsonl": _read_lines,
        ".parquet": _read_parquet,
    }
    known = file.suffix.lower() in readers
    if not known and may_be_hub_name(path) and not file.exists():
        return _some(path, [plain(row) for row in read_hub_rows(path, subset, split)])
    if not file.is_file():
        raise SettingsError(f"{path} is not a file{' but a directory' if file.is_dir() else ''}")
    if not known:
        raise SettingsError(f"{path} is not of a supported kind: {', '.join(readers)}")
    if file.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        with opened(file) as (opened_file, size), warnings.catch_warnings():
            if size > memory_of_machine():
                raise ValueError(f"it has {size:,} bytes, more than this machine's memory")
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows that are longer than the header
            found = readers[file.suffix.lower()](opened_file)
            records = found if isinstance(found, list) else found.to_dict("records")
    except RecursionError:
        raise ValueError(f"{path} cannot be read: it is nested too deeply") from None
    except MemoryError:
        raise ValueError(f"{path} cannot be read: its rows do not fit into memory") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return _some(path, [plain(row) for row in records])


def _read_table(separator: str) -> Callable[[BinaryIO], Any]:
    """Return a reader of tables of text that converts nothing: "01" is not 1, and "None" may be a word."""
    import pandas as pd

    as_written: dict[str, Any] = {"sep": separator, "dtype": str, "keep_default_na": False, "index_col": False}

    def read(file: BinaryIO) -> Any:
        names = file.read(_LONGEST_HEADER).replace(b"\r", b"\n").partition(b"\n")[0]
        if names.count(separator.encode()) >= _MOST_COLUMNS_READ:
            raise ValueError(f"it has more than {_MOST_COLUMNS_READ:,} columns")
        file.seek(0)
        # pandas renames a second column of the same name.
        header = pd.read_csv(file, **as_written, header=None, nrows=1).iloc[0].tolist()
        twice = sorted(name for name, count in Counter(header).items() if name and count > 1)
        if twice:
            raise ValueError(f"two columns are called {twice[0]!r}")
        file.seek(0)
        return pd.read_csv(file, **as_written)

    return read


def _read_parquet(file: BinaryIO) -> list[Row]:
    """Read a Parquet file, whose few bytes may decode to the same long text in millions of rows."""
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    rows: list[Row] = []
    size, most = 0, memory_of_machine() // _COPIES_OF_ROWS
    # In other threads, Arrow would abort the process if memory runs out.
    for batch in ParquetFile(file).iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False):
        size += batch.nbytes
        if size > most:
            raise ValueError(f"its rows take up more than {most:,} bytes, which is too much for this machine's memory")
        rows += batch.to_pylist()
    return rows


def _some(path: str, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _read_lines(file: BinaryIO) -> list[Row]:
    rows = []
    # Split at line feeds only: JSON strings may contain other line separators.
    for number, line in enumerate(file.read().decode("utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                check_count(line)
                row = json.loads(line, object_pairs_hook=_object)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error.msg}") from None
            except ValueError as error:
                raise ValueError(f"line {number} cannot be read: {error}") from None
            except RecursionError:
                raise ValueError(f"line {number} is nested too deeply") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            rows.append(row)
    return rows


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} occurs twice in one object")
    return found


def check_columns(path: str, rows: list[Row], settings: TrainSettings) -> None:
    """Raise SettingsError for a missing column, and ValueError for a row whose values cannot be used.

    Values must already have the types that the task needs: nothing is converted to text.
    """
    texts = [settings.text_column]
    if settings.text_pair_column is not None:
        texts.append(settings.text_pair_column)
    labels = [] if settings.task == "causal-lm" else [settings.label_column]
    _check_names(path, rows, texts + labels, settings)
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        for name in texts + labels:
            if is_empty(row.get(name)):
                raise ValueError(f"{where} has nothing in the column {name!r}")
        if settings.task == "token-classification":
            words, given = row[settings.text_column], row[settings.label_column]
            check_words(where, words, given, settings.label_column)
            continue
        if settings.task == "regression":
            check_number(f"{where} has no number in {settings.label_column!r}", row[settings.label_column])
        if settings.task == "causal-lm" and isinstance(row[settings.text_column], list):
            check_chat(where, row[settings.text_column], wants_answer=settings.chat_loss == "assistant")
            continue
        for name in texts:
            if isinstance(row[name], list):
                raise ValueError(f"{where} has a list in {name!r}, but {settings.task} needs text")
            check_text(f"{where}: {name!r}", row[name])
    if settings.task in ("sequence-classification", "token-classification"):
        _check_labels(path, rows, settings)


def _check_names(path: str, rows: list[Row], wanted: list[str], settings: TrainSettings) -> None:
    for name in wanted:
        option = next(x for x in ("text_column", "text_pair_column", "label_column") if getattr(settings, x) == name)
        if name not in rows[0]:
            columns = sorted(rows[0])
            shown = f"{columns[:_MOST_COLUMNS]}{' and more' if len(columns) > _MOST_COLUMNS else ''}"
            raise SettingsError(
                f"{path} has no column {name!r}: it has {shown}; name one with --{option.replace('_', '-')}"
            )
        if wanted.count(name) > 1:
            raise SettingsError(
                f"the column {name!r} cannot have two uses: --{option.replace('_', '-')} and another option name it"
            )


def split(rows: list[Row], settings: TrainSettings) -> tuple[list[Row], list[Row]]:
    """Return (training rows, evaluation rows), chosen by the seed."""
    count = round(len(rows) * settings.eval_fraction)
    order = np.random.default_rng(settings.seed).permutation(len(rows)).tolist()
    if count < 1 or count >= len(rows):
        raise ValueError(
            f"eval_fraction={settings.eval_fraction} of {len(rows)} rows leaves none to evaluate or train with: pass"
            " --eval-data, or another --eval-fraction"
        )
    chosen = set(order[:count])
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def label_names(train: list[Row], evaluation: list[Row], settings: TrainSettings) -> list[str]:
    """Return the classes, sorted.

    Raises:
        ValueError: there is only one class, or evaluation rows have classes that training rows lack.
    """
    there, other = (set(_names_of_classes(rows, settings)) for rows in (train, evaluation))
    if len(there) < 2:
        raise ValueError(f"all training rows have the same {settings.label_column}: {next(iter(there))!r}")
    new = sorted(other - there)
    if new:
        shown = [label if len(label) <= _SHOWN else label[:_SHOWN] + "..." for label in new[:5]]
        raise ValueError(f"evaluation rows have {len(new)} labels that no training row has: {shown}")
    return sorted(there)


def _names_of_classes(rows: list[Row], settings: TrainSettings) -> Iterator[str]:
    for row in rows:
        value = row[settings.label_column]
        for label in value if isinstance(value, list) else [value]:
            yield class_name("the label", label)


def _check_labels(path: str, rows: list[Row], settings: TrainSettings) -> None:
    """Raise ValueError for labels that are not classes, or that only look equal."""
    kinds: dict[str, tuple[type, str]] = {}
    names, sources = [], []
    for number, row in enumerate(rows, start=1):
        value = row[settings.label_column]
        where = f"{path}: row {number}: {settings.label_column!r}"
        for label in value if isinstance(value, list) else [value]:
            name = class_name(where, label)
            kind = int if isinstance(label, float) else type(label)
            before, first_source = kinds.setdefault(name, (kind, where))
            if before is not kind:
                raise ValueError(
                    f"{where} is {describe(label)}, and {first_source} is a {before.__name__} that looks the same"
                )
            names.append(name)
            sources.append(where)
    check_not_measured(sources.__getitem__, names)


def digest(*parts: list[Row]) -> str:
    """Return a SHA-256 of rows, by which a resumed run recognizes its rows."""
    sha = hashlib.sha256()
    for rows in parts:
        for row in rows:
            sha.update(repr(sorted((name, str(value)) for name, value in row.items())).encode())
        sha.update(b"|")
    return sha.hexdigest()


class Examples(torch.utils.data.Dataset[Row]):
    """Rows converted to a model's inputs, once.

    Attributes:
        examples: the inputs, without those of rows from which nothing would be learned.
        left_out: the number of such rows.

    Raises:
        ValueError: a row cannot be converted.
    """

    def __init__(self, origin: str, rows: list[Row], encode: Callable[[Row], Row]) -> None:
        self.examples: list[Row] = []
        for number, row in enumerate(rows, start=1):
            try:
                example = encode(row)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{origin}, row {number}: {error}") from None
            if not example["input_ids"]:
                raise ValueError(f"{origin}, row {number}: the tokenizer returns no tokens for its text")
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
    return isinstance(value, list | tuple)
