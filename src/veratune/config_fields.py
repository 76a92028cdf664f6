"""Checks and metadata of the fields of a configuration."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from veratune.utils.patterns import PatternError, pattern
from veratune.utils.text import clipped, shown

Check = Callable[[str, Any], Any]

LARGEST_RANK = 1 << 20
LONGEST_VALUE = 500

_KEY = "veratune"
_LARGEST_INDEX = (1 << 63) - 1
# The smallest normal and the largest finite float32 number.
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


@dataclass(frozen=True)
class Setting:
    """Metadata of a configuration field.

    Attributes:
        check: takes the field's name and a value, and returns the value to store or raises an error.
        peft: "vera" if PEFT's VeraConfig has the field with the same meaning, "any" if every PEFT configuration has
            it (such fields do not change what the adapter computes), None if only veratune has it.
        card: whether the model card lists it.
        train: whether the `vera` settings of `veratune train` may set it; other fields are determined by the run or
            have separate settings.
        selects: whether its only effect is to select the modules to adapt or to train in full.
    """

    check: Check
    peft: Literal["vera", "any"] | None = None
    card: bool = False
    train: bool = True
    selects: bool = False


def setting(default: Any, check: Check, **roles: Any) -> Any:
    """Return a dataclass field with its metadata.

    Args:
        default: the field's default, or a type that creates the default (such as `dict`).
        check: the field's check.
        roles: other attributes of `Setting`.
    """
    metadata = {_KEY: Setting(check, **roles)}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(config: Any) -> dict[str, Setting]:
    """Return the metadata of the fields of a configuration or its class, by name."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(config) if _KEY in field.metadata}


def bad(field: str, value: object, allowed: str, error: type[Exception] = ValueError) -> Exception:
    """Return the exception for an invalid value of a field."""
    return error(f"{clipped(f'{field}={shown(value)}', LONGEST_VALUE)} is not allowed: it must be {allowed}")


@dataclass(frozen=True)
class TaskType:
    """A task that a configuration can name, as in PEFT.

    Attributes:
        model: transformers' class that loads the task's base model.
        heads: the names of the modules that PEFT trains in full for it, in addition to modules_to_save.
    """

    model: str | None
    heads: tuple[str, ...] = ()


TASK_TYPES = {
    "SEQ_CLS": TaskType("AutoModelForSequenceClassification", ("classifier", "score")),
    "TOKEN_CLS": TaskType("AutoModelForTokenClassification", ("classifier", "score")),
    "QUESTION_ANS": TaskType("AutoModelForQuestionAnswering", ("qa_outputs",)),
    "CAUSAL_LM": TaskType("AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": TaskType("AutoModelForSeq2SeqLM"),
    "FEATURE_EXTRACTION": TaskType(None),
}


def heads_of(task_type: str | None) -> tuple[str, ...]:
    """Return the names of the new heads that a task trains in full; none for other tasks and without one."""
    return TASK_TYPES[task_type].heads if task_type in TASK_TYPES else ()


# Checks


def integer(allowed: range, description: str) -> Check:
    """Return a check for an integer in a range."""

    def check(field: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(field, value, description, TypeError)
        if value not in allowed:
            raise bad(field, value, description)
        return value

    return check


rank = integer(range(1, LARGEST_RANK + 1), f"an integer from 1 to {LARGEST_RANK}")


def choice(choices: Collection[str]) -> Check:
    """Return a check for one of several strings, including those registered later."""

    def check(field: str, value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise bad(field, value, "one of " + ", ".join(map(repr, choices)))
        return value

    return check


def boolean(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise bad(field, value, "True or False", TypeError)
    return value


def text(field: str, value: object) -> str | None:
    if not isinstance(value, str | None):
        raise bad(field, value, "a string or None", TypeError)
    return value


def initial_d(field: str, value: object) -> float:
    number = _finite(field, value)
    if not _SMALLEST <= abs(number) <= _LARGEST:
        allowed = "a nonzero number in float32's range: with b = 0 and d = 0, nothing would ever be learned"
        raise bad(field, number, allowed)
    return number


def probability(field: str, value: object) -> float:
    number = _finite(field, value)
    if not 0.0 <= number < 1.0:
        raise bad(field, number, "a probability in [0, 1)")
    return number


def _finite(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad(field, value, "a number", TypeError)
    try:
        number = float(value)
    except OverflowError:
        raise bad(field, "a huge integer", "a finite number") from None
    if not math.isfinite(number):
        raise bad(field, value, "a finite number")
    return number


def _check_regex(field: str, text: str, around: str = "{}") -> None:
    try:
        pattern(around.format(text))
    except PatternError as error:
        given = clipped(f"{field}={text!r}", LONGEST_VALUE)
        raise ValueError(f"{given} is not a regular expression that veratune supports: {error}") from None


def _name_list(field: str, value: Iterable[object]) -> list[str]:
    # PEFT's configurations contain sets; sorting makes the files of equal configurations identical.
    names = sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise bad(field, value, "a list of non-empty names", TypeError)
    return list(dict.fromkeys(str(name) for name in names))


def names_or_regex(field: str, value: object) -> list[str] | str | None:
    names = _names(field, value)
    if isinstance(names, str) and names != "all-linear":
        _check_regex(field, names)
    return names


def stack_names(field: str, value: object) -> list[str] | str | None:
    names = _names(field, value)
    for stack in [names] if isinstance(names, str) else names or []:
        _check_regex(field, stack, "(?:{})")
    return names


def _names(field: str, value: object) -> list[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not value:
            raise bad(field, value, "a non-empty string, a list of names, or None")
        return value
    if not isinstance(value, list | tuple | set | frozenset):
        raise bad(field, value, "a string, a list of names, or None", TypeError)
    if not value:
        raise bad(field, value, "a non-empty list, a string, or None")
    return _name_list(field, value)


def listed_names(field: str, value: object) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple | set | frozenset):
        raise bad(field, value, "a list of names, or None", TypeError)
    return _name_list(field, value)


def parts(field: str, value: object) -> dict[str, int | list[int]]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad(field, value, "a dictionary from names to a number of parts or a list of sizes", TypeError)
    checked: dict[str, int | list[int]] = {}
    for name, given in value.items():
        if not isinstance(name, str) or not name:
            raise bad(field, value, "a dictionary whose keys are non-empty strings", TypeError)
        sizes = list(given) if isinstance(given, list | tuple) else [given]
        if not sizes or any(type(size) is not int or not 1 <= size <= _LARGEST_INDEX for size in sizes):
            raise bad(f"{field}[{name!r}]", given, "a number of parts, or a list of output sizes", TypeError)
        if len(sizes) == 1 and (sizes[0] < 2 or isinstance(given, list | tuple)):
            raise bad(f"{field}[{name!r}]", given, "at least two parts")
        checked[name] = sizes if isinstance(given, list | tuple) else sizes[0]
    return checked


def layer_indices(field: str, value: object) -> list[int] | int | None:
    if value is None:
        return None
    indices = [value] if isinstance(value, int) else value  # booleans are rejected below
    if not isinstance(indices, list | tuple | set | frozenset | range) or not indices:
        raise bad(field, value, "an index, a non-empty list of indices, or None", TypeError)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise bad(field, value, "an integer, or a list of integers", TypeError)
        if not 0 <= index <= _LARGEST_INDEX:
            raise bad(field, value, "an index of 0 or more, or a list of such indices")
    return value if isinstance(value, int) else sorted(set(indices))


def ranks_by_pattern(field: str, value: object) -> dict[str, int]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad(field, value, "a dictionary from patterns to ranks", TypeError)
    for key, its_rank in value.items():
        if not isinstance(key, str) or not key:
            raise bad(field, value, "a dictionary whose keys are non-empty strings", TypeError)
        _check_regex(field, key, "(?:{})")
        rank(f"{field}[{key!r}]", its_rank)
    return dict(value)


def task_type(field: str, value: object) -> str | None:
    if value is None:
        return None
    name = getattr(value, "value", value)  # PEFT's TaskType is an enum of strings
    if not isinstance(name, str) or name not in TASK_TYPES:
        raise bad(field, value, "one of " + ", ".join(TASK_TYPES) + ", or None")
    return str(name)
