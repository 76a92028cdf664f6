"""`veratune predict`: label rows with a trained adapter, and score them if they have labels."""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from veratune.checkpoint.files import write_text
from veratune.checkpoint.formats import ADAPTER_FOLDER, read_base
from veratune.cli.directories import check_new_file
from veratune.cli.errors import SettingsError
from veratune.cli.models import adapter_in, base_of, device_of, load_adapted, pad_with, tokenizer_of, usable_length
from veratune.cli.options import SETTINGS_NAME
from veratune.cli.output import print_text, printable, warning_line
from veratune.cli.train.data import Examples, check_columns, check_known
from veratune.cli.train.metrics import scores_text, trivial_answer
from veratune.cli.train.preflight import check_vocabulary, unknown_tokens
from veratune.cli.train.reading import STDIN, Row, read_lines_of_stdin, read_rows
from veratune.cli.train.settings import CLASSIFICATION, TrainSettings, read_settings
from veratune.cli.train.start import classes_of_adapter, task_of_adapter
from veratune.cli.train.tasks import Task, make_task
from veratune.cli.values import is_empty
from veratune.utils.text import counted

_PREDICTION, _PROBABILITIES = "prediction", "probabilities"
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_LINES = ".jsonl"
_DIGITS = 6


def predict(
    run: Path,
    data: str,
    output: Path | None,
    model: str | None,
    given: dict[str, Any],
    *,
    device: str | None,
    as_json: bool,
) -> None:
    """Write the predictions for rows, in their order.

    Args:
        run: a training run's output directory, or an adapter's.
        data: the rows' file, their name on the hub, or "-" for lines of standard input.
        output: the new file; None for standard output.
        model: the base model; None for the one that the adapter names.
        given: settings that are not None replace those of the training run.
        device: the device's name.
        as_json: whether to write JSON lines to standard output.
    """
    kind = _kind(output, as_json=as_json)
    adapter = adapter_in(run)
    base = base_of(adapter, model)
    settings = _settings(adapter, base, data, given)
    torch_device = device_of(device)
    rows = _rows(settings)
    asked = given["label_column"] is not None
    labelled = [row for row in rows if not is_empty(row.get(settings.label_column))]
    if asked or labelled:
        check_columns(data, labelled or rows, settings)
    check_columns(data, rows, settings, labelled=False)
    labels = classes_of_adapter(adapter) if settings.task in CLASSIFICATION else []
    if labels and labelled:
        check_known(labelled, settings, labels, f"{adapter} was not trained with: it has {labels}")
    added = _added(settings, labels, kind)
    taken = [name for name in added if name in rows[0]]
    if taken:
        raise SettingsError(f"{data} has a column {taken[0]!r}, which is what predict adds: rename it")
    tokenizer = tokenizer_of(adapter, base)
    settings = dataclasses.replace(settings, max_length=usable_length(settings.max_length, base, tokenizer))
    adapted = load_adapted(base, adapter).to(torch_device)
    pad_with(adapted.base_model, tokenizer)
    task = make_task(settings, tokenizer, labels)
    examples = Examples(data, rows, lambda row: task.encode(row, labelled=False))
    check_vocabulary(adapted.base_model, examples, base)
    unknown = unknown_tokens(tokenizer, examples)
    if unknown is not None:
        warning_line(unknown)
    logits = list(_logits(adapted, task, examples.examples, settings.batch_size, torch_device))
    predicted = [
        _prediction(row, example, own, settings, labels)
        for row, example, own in zip(rows, examples.examples, logits, strict=True)
    ]
    lost = sum(value is None for row in predicted for value in _as_list(row[_PREDICTION]))
    if lost:
        warning_line(f"{counted(lost, 'word')} beyond max_length={settings.max_length} tokens got no label")
    _write([{**row, **own} for row, own in zip(rows, predicted, strict=True)], output, kind)
    if labelled:
        line = _scores(settings, task, rows, logits, labels)
        if output is None:
            print(line, file=sys.stderr)
        else:
            print_text(line)
    if output is not None:
        print_text(f"{counted(len(rows), 'prediction')}: {output}")


def _kind(output: Path | None, *, as_json: bool) -> str:
    """Return the kind of file to write, by its ending, after checking that it can be written."""
    if output is None:
        return _LINES if as_json else ".csv"
    kind = output.suffix.lower()
    if kind not in (*_SEPARATORS, _LINES):
        raise SettingsError(f"--output {output}: unsupported file type; use {', '.join(_SEPARATORS)} or {_LINES}")
    if as_json and kind != _LINES:
        raise SettingsError(f"--json writes JSON lines: give an --output that ends in {_LINES}, or leave --json out")
    check_new_file(output)
    return kind


def _settings(adapter: Path, base: str, data: str, given: dict[str, Any]) -> TrainSettings:
    """Return the settings of the run that trained an adapter, as far as they are known, with the given ones.

    Raises:
        ValueError: the adapter's model is of a class whose outputs are not predictions.
    """
    path = adapter.parent / SETTINGS_NAME
    known: dict[str, Any] = {}
    if adapter.name == ADAPTER_FOLDER and path.is_file():
        names = ("text_column", "text_pair_column", "label_column", "max_length", "chat_loss")
        trained = read_settings(path)
        known = {name: trained[name] for name in names if name in trained}
    described = read_base(adapter)
    task = task_of_adapter(adapter)
    if task == "causal-lm":
        raise ValueError(f"{adapter} is for a language model, which answers instead: veratune chat {adapter}")
    if task is None or described.get("problem_type") == "multi_label_classification":
        raise ValueError(
            f"{adapter} is for a {described.get('class') or 'model of an unknown class'}"
            f" ({described.get('problem_type') or 'no problem type'}); predict is for classification with one label,"
            " token classification and regression"
        )
    own = {name: value for name, value in given.items() if value is not None}
    return TrainSettings(**{**known, **own, "model": base, "data": data, "output": STDIN, "task": task})


def _rows(settings: TrainSettings) -> list[Row]:
    if settings.data != STDIN:
        return read_rows(settings.data, settings.subset, settings.split, settings.encoding)
    if settings.text_pair_column is not None:
        raise SettingsError("--data - has one text a line, but this model takes two: give a file")
    rows = read_lines_of_stdin(settings.text_column, settings.encoding)
    if settings.task == "token-classification":
        return [{name: line.split() for name, line in row.items()} for row in rows]
    return rows


def _logits(
    model: nn.Module, task: Task, examples: list[Row], batch_size: int, device: torch.device
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield each example's logits, in order; the batches are of similar lengths, the longest first."""
    found: dict[int, np.ndarray[Any, Any]] = {}
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i]["input_ids"]), i))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = [{name: value for name, value in examples[i].items() if name != "word_starts"} for i in chosen]
        batch = {name: tensor.to(device) for name, tensor in task.collator(inputs).items()}
        with torch.no_grad():
            logits = model(**batch).logits.float().cpu().numpy()
        for i, own, mask in zip(chosen, logits, batch["attention_mask"].bool().cpu().numpy(), strict=True):
            found[i] = own[mask] if "word_starts" in examples[i] else own
    yield from (found[i] for i in range(len(examples)))


def _prediction(
    row: Row, example: Row, logits: np.ndarray[Any, Any], settings: TrainSettings, labels: list[str]
) -> Row:
    """Return the columns to add to a row."""
    if settings.task == "regression":
        return {_PREDICTION: float(f"{float(logits[0]):.{_DIGITS + 1}g}")}
    if settings.task == "sequence-classification":
        shares = _softmax(logits)
        return {
            _PREDICTION: labels[int(np.argmax(logits))],
            _PROBABILITIES: {name: round(float(share), _DIGITS) for name, share in zip(labels, shares, strict=True)},
        }
    named: list[str | None] = [None] * len(row[settings.text_column])
    for word, own in zip(example["word_starts"], logits, strict=True):
        if word is not None:
            named[word] = labels[int(np.argmax(own))]
    return {_PREDICTION: named}


def _softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    powers = np.exp(logits.astype(np.float64) - np.max(logits))
    shares: np.ndarray[Any, Any] = powers / powers.sum()
    return shares


def _scores(
    settings: TrainSettings, task: Task, rows: list[Row], logits: list[np.ndarray[Any, Any]], labels: list[str]
) -> str:
    """Return the metrics of the rows with labels, as the evaluation during training computes them."""
    chosen = [i for i, row in enumerate(rows) if not is_empty(row.get(settings.label_column))]
    examples = [task.encode(rows[i]) for i in chosen]
    targets = [np.atleast_1d(np.asarray(example["labels"])) for example in examples]
    outputs = [np.atleast_2d(logits[i]) for i in chosen]
    assert task.metrics is not None
    found = task.metrics(SimpleNamespace(predictions=np.concatenate(outputs), label_ids=np.concatenate(targets)))
    scores = scores_text(found, trivial_answer(settings, (examples, examples), labels))
    return f"{scores}; {counted(len(chosen), 'row')} with labels"


def _added(settings: TrainSettings, labels: list[str], kind: str) -> list[str]:
    """Return the names of the columns that the predictions add."""
    if settings.task != "sequence-classification":
        return [_PREDICTION]
    return [_PREDICTION, *([_PROBABILITIES] if kind == _LINES else map(_column, labels))]


def _column(label: str) -> str:
    return f"p({label})"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _write(rows: list[Row], output: Path | None, kind: str) -> None:
    text = "".join(_json_lines(rows)) if kind == _LINES else _table(rows, _SEPARATORS[kind])
    if output is not None:
        write_text(output, text)
        return
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _json_lines(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _table(rows: list[Row], separator: str) -> str:
    """Return rows as a table; the probabilities become columns, and lists are written as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    flat = []
    for row in rows:
        shares = row.pop(_PROBABILITIES, {})
        flat.append(row | {_column(label): f"{share:.{_DIGITS}f}" for label, share in shares.items()})
    names = list(dict.fromkeys(name for row in flat for name in row))
    writer.writerow(names)
    writer.writerows([[_cell(row.get(name)) for name in names] for row in flat])
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
