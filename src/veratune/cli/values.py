"""Check single values in rows of data: values that are not text are never converted to text."""

import contextlib
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

_SHOWN = 40
_LARGEST = float(torch.finfo(torch.float32).max)


def plain(value: Any) -> Any:
    """Return a value as plain Python: lists for arrays, Python's numbers for numpy's, None for every missing value."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if _is_missing(value) else value


def _is_missing(value: object) -> bool:
    try:
        return bool(value != value)  # noqa: PLR0124  # NaN and NaT
    except TypeError:  # pandas' NA
        return True


def is_empty(value: object) -> bool:
    """Return whether a cell is empty: no value, or only whitespace."""
    return value is None or (isinstance(value, str) and not value.strip())


def describe(value: object) -> str:
    """Return the type of a value, and the value if it is short, for a message."""
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "a truth value"),
        (Real, "a number"),
        (str, "a text"),
        (dict, "an object"),
        (list, "a list"),
    )
    if value is None:
        return "nothing"
    kind = next((name for types, name in kinds if isinstance(value, types)), f"a {type(value).__name__}")
    if isinstance(value, dict | list):
        return kind
    try:
        shown = repr(value)
    except ValueError:  # an integer with more digits than Python converts
        return kind
    return f"{kind} ({shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'})"


def check_text(where: str, value: object) -> None:
    """Raise ValueError unless a value is a non-empty text."""
    if is_empty(value):
        raise ValueError(f"{where} has nothing in it")
    if not isinstance(value, str):
        raise ValueError(f"{where} is {describe(value)}, not a text: write it as a text if it is meant as one")


def check_words(where: str, words: object, labels: object, label_column: str) -> None:
    """Raise ValueError unless words are a list of texts, and labels None or a list of as many class names."""
    if labels is None:
        labels = words
    if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels):
        raise ValueError(f"{where} must have a list of words and a list of as many labels")
    for number, word in enumerate(words, start=1):
        check_text(f"{where}, word {number}", word)
    for number, label in enumerate(labels, start=1):
        if is_empty(label):
            raise ValueError(f"{where} has an empty label (number {number} in {label_column!r})")


def class_name(where: str, label: object) -> str:
    """Return the class name of a label: text, an integer or a boolean, as written.

    Raises:
        ValueError: it is anything else, such as a number with a fraction.
    """
    if isinstance(label, str):
        return label
    if isinstance(label, bool | Integral):
        return str(label)
    if isinstance(label, float) and label.is_integer():
        return str(int(label))  # pandas converts a column of integers with a missing value to floats
    if isinstance(label, Real):
        raise ValueError(f"{where} is {describe(label)}, {_NOT_A_CLASS}")
    raise ValueError(f"{where} is {describe(label)}, but a class must be a text or an integer")


_NOT_A_CLASS = (
    "and classes are names or whole numbers: --task regression learns numbers; a class that is called like one must be"
    " written as a name, such as 'stars 4.5'"
)


def check_not_measured(where: Callable[[int], str], labels: list[str]) -> None:
    """Raise ValueError if the labels are numbers with fractions: they are measurements, not classes.

    Args:
        where: maps a label's position to its location, for the message.
        labels: the names of the classes, row by row. A file without types, such as CSV, has only texts.
    """
    first = None
    for position, label in enumerate(labels):
        try:
            number = float(label)
        except ValueError:
            return
        if first is None and math.isfinite(number) and not number.is_integer():
            first = position
    if first is not None:
        raise ValueError(f"{where(first)} is {labels[first]}, {_NOT_A_CLASS}")


def check_number(where: str, value: object) -> None:
    """Raise ValueError unless a value is a number in the range of float32, or the text of one."""
    number = math.nan
    if isinstance(value, str | Real) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not abs(number) <= _LARGEST:
        shown = repr(value) if isinstance(value, str | float) else describe(value)
        raise ValueError(f"{where}: {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}")


def check_chat(where: str, messages: list[Any], *, wants_answer: bool) -> None:
    """Raise ValueError unless a list is a chat: messages with roles and contents.

    Args:
        where: where it is, for the message.
        messages: the list.
        wants_answer: whether only the assistant's messages are learned, so that there has to be one.
    """
    if not messages:
        raise ValueError(f"{where} is an empty chat")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where} is not a chat: each message must have a 'role' and a 'content'")
        role, content = message["role"], message["content"]
        check_text(f"{where}, message {number}: its 'role'", role)
        # Some data sets have an empty system prompt in every row, and tool calls have no content.
        if (role == "system" and content == "") or (content is None and message.get("tool_calls")):
            continue
        check_text(f"{where}, message {number}: its 'content'", content)
    if wants_answer and not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{where} has no message of the role 'assistant', which is what is learned: add one, or use --chat-loss all"
        )
