"""Read untrusted files: regular files of bounded size, and strict JSON.

The user who passes the path may not have written the file. A pipe or a device never ends, a sparse file claims a
terabyte while using no space, and JSON can nest deeper than Python's stack, repeat a key, or hold huge numbers.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from veratune.utils.text import clipped

LARGEST_TEXT = 64 << 20
_DEEPEST = 32
_LONGEST_NUMBER = 40
# Two bytes of JSON can become an object of 64 bytes. Large files written by veratune have less than one value per 16
# bytes.
_MOST_VALUES = 1 << 22
_BYTES_OF_A_VALUE = 16


class OutsideFileError(ValueError):
    """A file that cannot be read safely; the message names it."""


@contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file for reading and yield it with its size. Opening never blocks.

    Raises:
        OutsideFileError: the file is missing, not a regular file, or cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        # Checked before opening, because opening a device may have side effects.
        if not stat.S_ISREG(path.stat().st_mode):
            raise OutsideFileError(f"{path} is {'a directory' if path.is_dir() else 'not a regular file'}")
        descriptor = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        raise OutsideFileError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # a null byte in a path raises ValueError
        if isinstance(error, OutsideFileError):
            raise
        raise OutsideFileError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OutsideFileError(f"{path} is not a regular file")
        yield file, status.st_size


def read_bounded(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """Return the bytes of a regular file of at most `largest` bytes.

    Raises:
        OutsideFileError: the file is missing, not a regular file, too large, or cannot be read.
    """
    with opened(path) as (file, size):
        if size > largest:
            raise OutsideFileError(f"{path} has {size:,} bytes; at most {largest:,} are allowed")
        try:
            data = file.read(largest + 1)
        except (OSError, MemoryError) as error:
            raise OutsideFileError(f"{path} cannot be read: {error or 'out of memory'}") from None
    if len(data) > largest:  # it grew, or misreports its size, as files in /proc do
        raise OutsideFileError(f"{path} has more than the allowed {largest:,} bytes")
    return data


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """Return the text of a regular UTF-8 file of at most `largest` bytes.

    Raises:
        OutsideFileError: as for `read_bounded`, or the file is not UTF-8.
    """
    try:
        return read_bounded(path, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OutsideFileError(f"{path} is not a text file: {error.reason} at byte {error.start}") from None


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Parse a JSON text strictly and return its value.

    Args:
        text: the text.
        finite: reject NaN and infinity, which are not valid JSON but which Python's parser accepts.

    Raises:
        ValueError: the text is not JSON, repeats a key, nests too deeply, has a number that is too large, or has too
            many values.
    """
    check_count(text)
    constant = _refuse_constant if finite else float
    number = _finite if finite else float
    try:
        value = json.loads(
            text, parse_constant=constant, parse_float=number, parse_int=_integer, object_pairs_hook=_object
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from None
    except MemoryError:
        raise ValueError("it does not fit into memory") from None
    _check_depth(value)
    return value


def check_count(text: str | bytes) -> None:
    """Raise ValueError for JSON that may have too many values; commas and brackets inside strings count as well."""
    marks = (",", "[", "{")
    count = sum(map(text.count, marks)) if isinstance(text, str) else sum(text.count(m.encode()) for m in marks)
    most = max(_MOST_VALUES, len(text) // _BYTES_OF_A_VALUE)
    if count > most:
        raise ValueError(f"it has about {count:,} values, more than the maximum of {most:,}")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {clipped(digits, 60)} is too large")
    return number


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"the number {clipped(digits, 60)} is too large")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {clipped(name, 100)!r} occurs more than once")
        found[name] = value
    return found


def _check_depth(value: Any) -> None:
    """Raise ValueError for values nested too deeply."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
