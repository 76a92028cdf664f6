"""Rows of data: checked, split, and converted to a model's inputs."""

import hashlib
import re
from collections.abc import Callable, Iterator

import numpy as np
import torch

from veratune.cli.errors import SettingsError
from veratune.cli.train.chats import IGNORED
from veratune.cli.train.reading import Row
from veratune.cli.train.settings import CLASSIFICATION, TrainSettings
from veratune.cli.values import (
    check_chat,
    check_not_measured,
    check_number,
    check_text,
    check_words,
    class_name,
    describe,
    is_empty,
)
from veratune.utils.text import counted

_SHOWN = 40
_MOST_COLUMNS = 20
# More classes than this, all of them numbers, are probably not classes.
_MANY_NUMBERS = 10
_NUMBER, _DECIMAL = re.compile(r"[+-]?\d{1,9}(\.\d{0,9})?"), re.compile(r"[+-]?\d{1,9}\.\d{0,9}")


def check_columns(path: str, rows: list[Row], settings: TrainSettings, *, labelled: bool = True) -> None:
    """Raise SettingsError for a missing column, and ValueError for a row whose values cannot be used.

    Values must already have the types that the task needs: nothing is converted to text.

    Args:
        path: the rows' file, for messages.
        rows: the rows.
        settings: the settings.
        labelled: whether every row must have a label; otherwise labels are not looked at.
    """
    texts = [settings.text_column]
    if settings.text_pair_column is not None:
        texts.append(settings.text_pair_column)
    labels = [settings.label_column] if labelled and settings.task != "causal-lm" else []
    _check_names(path, rows, texts + labels, settings)
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        for name in texts + labels:
            if is_empty(row.get(name)):
                raise ValueError(f"{where} has nothing in the column {name!r}")
        if settings.task == "token-classification":
            words = row[settings.text_column]
            check_words(where, words, row[settings.label_column] if labelled else None, settings.label_column)
            continue
        if settings.task == "regression" and labelled:
            check_number(f"{where} has no number in {settings.label_column!r}", row[settings.label_column])
        if settings.task == "causal-lm" and isinstance(row[settings.text_column], list):
            check_chat(where, row[settings.text_column], wants_answer=settings.chat_loss == "assistant")
            continue
        for name in texts:
            if isinstance(row[name], list):
                raise ValueError(f"{where} has a list in {name!r}, but {settings.task} needs text")
            check_text(f"{where}: {name!r}", row[name])
    if settings.task in CLASSIFICATION and labelled:
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


def label_names(
    train: list[Row], evaluation: list[Row], settings: TrainSettings, known: list[str] | None = None
) -> list[str]:
    """Return the classes, sorted, or those that are already known.

    Args:
        train, evaluation: the rows.
        settings: the settings.
        known: the classes of the adapter to start from.

    Raises:
        ValueError: there is only one class, evaluation rows have classes that training rows lack, or rows have classes
            that are not known.
    """
    there = set(_names_of_classes(train, settings))
    if len(there) < 2:
        raise ValueError(f"all training rows have the same {settings.label_column}: {next(iter(there))!r}")
    if known:
        check_known(train + evaluation, settings, known, f"{settings.model} was not trained with: it has {known}")
        return known
    check_known(evaluation, settings, sorted(there), "no training row has", "evaluation rows have")
    return sorted(there)


def check_known(
    rows: list[Row], settings: TrainSettings, known: list[str], without: str, who: str = "rows have"
) -> None:
    """Raise ValueError for rows with classes that are not known."""
    new = sorted(set(_names_of_classes(rows, settings)) - set(known))
    if new:
        shown = [label if len(label) <= _SHOWN else label[:_SHOWN] + "..." for label in new[:5]]
        raise ValueError(f"{who} {counted(len(new), 'label')} that {without}: {shown}")


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


def looks_measured(rows: list[Row], settings: TrainSettings) -> bool:
    """Return whether the labels of a classification are probably measurements, whose order means something."""
    labels = [row[settings.label_column] for row in rows]
    if all(isinstance(label, float) or (isinstance(label, str) and _DECIMAL.fullmatch(label)) for label in labels):
        return True
    names = {str(label) for label in labels}
    return len(names) > _MANY_NUMBERS and all(_NUMBER.fullmatch(name) for name in names)


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
            labels = example.get("labels")
            if not isinstance(labels, list | tuple) or any(label != IGNORED for label in labels):
                self.examples.append(example)
        self.left_out = len(rows) - len(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.examples)

    def __getitem__(self, index: int) -> Row:
        return self.examples[index]
