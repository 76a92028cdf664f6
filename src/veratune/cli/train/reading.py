"""Read rows of data from files, from standard input, or from the hub."""

import codecs
import io
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from veratune.checkpoint.header import memory_of_machine
from veratune.cli.errors import SettingsError
from veratune.cli.train.hub_rows import may_be_hub_name, read_hub_rows
from veratune.cli.values import plain
from veratune.utils.outside_files import check_count, opened

Row = dict[str, Any]
STDIN = "-"
# pandas needs kilobytes per column, and aborts the process if there is no memory for them.
_MOST_COLUMNS_READ = 10_000
_LONGEST_HEADER = 1 << 20
# Python's strings may take four times the memory of Arrow's.
_COPIES_OF_ROWS = 4
_ROWS_AT_ONCE = 1024
# Of a file in an unknown encoding, as many bytes are looked at.
_LOOKED_AT = 1 << 20
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_rows(path: str, subset: str | None = None, split: str = "train", encoding: str | None = None) -> list[Row]:
    """Read a CSV, TSV, JSON, JSON lines or Parquet file, or a part of a data set on the hub.

    Args:
        path: the file, or the data set's name.
        subset: configuration of a data set on the hub.
        split: part of a data set on the hub.
        encoding: encoding of a text file; UTF-8 by default.

    Raises:
        SettingsError: no such file, or an unsupported kind of file.
        ValueError: no such data set, a file that cannot be read, or no rows.
    """
    try:
        import pandas as pd  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"reading data needs pandas: pip install 'veratune[cli]' ({error})") from None
    file = Path(path).expanduser()
    of_text: dict[str, Callable[[TextIO], Any]] = {
        ".csv": _read_table,
        ".tsv": lambda text: _read_table(text, "\t"),
        ".json": _read_array,
        ".jsonl": _read_lines,
    }
    readers: dict[str, Callable[[BinaryIO], Any]] = {
        **{kind: _of_text(read, encoding) for kind, read in of_text.items()},
        ".parquet": _read_parquet,
    }
    known = file.suffix.lower() in readers
    if encoding is not None and file.suffix.lower() not in of_text:
        raise SettingsError(f"--encoding is for text files ({', '.join(of_text)}): leave it out for {path}")
    if not known and may_be_hub_name(path) and not file.exists():
        return _some(path, [plain(row) for row in read_hub_rows(path, subset, split)])
    if not file.is_file():
        raise SettingsError(f"{path} is not a file{' but a directory' if file.is_dir() else ''}")
    if not known:
        raise SettingsError(f"{path}: unsupported file type; use {', '.join(readers)}")
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
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ValueError(
            f"{path} cannot be read: {' '.join(str(error).split())}. Texts that contain the separator or a line break"
            " must be in double quotes"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return _some(path, [plain(row) for row in records])


def read_lines_of_stdin(column: str, encoding: str | None) -> list[Row]:
    """Return a row for each line of standard input, with the line as its text.

    Raises:
        ValueError: the input is empty, or not in this encoding.
    """
    data = sys.stdin.buffer.read()
    try:
        text = data.decode(_codec(encoding))
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input cannot be read: {_not_in_encoding(data, encoding, error)}") from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return _some("standard input", [{column: line} for line in lines] if text else [])


def _of_text(read: Callable[[TextIO], Any], encoding: str | None) -> Callable[[BinaryIO], Any]:
    """Return a reader of a binary file from a reader of text, which is decoded strictly."""

    def read_decoded(file: BinaryIO) -> Any:
        try:
            with _decoding(file, encoding) as text:
                return read(text)
        except UnicodeDecodeError as error:
            file.seek(0)
            raise ValueError(_not_in_encoding(file.read(_LOOKED_AT), encoding, error)) from None

    return read_decoded


@contextmanager
def _decoding(file: BinaryIO, encoding: str | None) -> Iterator[TextIO]:
    text = io.TextIOWrapper(file, encoding=_codec(encoding), errors="strict", newline="")
    try:
        yield text
    finally:
        text.detach()  # otherwise it would close the file


def _codec(encoding: str | None) -> str:
    """Return the codec of an encoding; UTF-8 with or without a byte order mark."""
    return "utf-8-sig" if encoding is None or codecs.lookup(encoding).name == "utf-8" else encoding


def _not_in_encoding(data: bytes, encoding: str | None, error: UnicodeDecodeError) -> str:
    """Return the message for a text that is not in its encoding. A likely encoding is named, but never just used."""
    remedy = "give its encoding with --encoding, such as gb18030, cp1252 or utf-16"
    if encoding is not None:
        remedy = "give another --encoding, or leave it out for UTF-8"
    elif data.startswith(_UTF_16):
        remedy = "it looks like UTF-16: give --encoding utf-16"
    elif _looks_chinese(data):
        remedy = "it looks like Chinese in GBK or GB18030: give --encoding gb18030"
    return f"it is not {encoding or 'UTF-8'} ({error.reason}): {remedy}"


def _looks_chinese(data: bytes) -> bool:
    """Return whether most bytes beyond ASCII are in pairs of GB2312; accented letters of other encodings are alone."""
    beyond = len(re.findall(rb"[\x80-\xff]", data))
    pairs = len(re.findall(rb"[\xa1-\xf7][\xa1-\xfe]", data))
    try:
        codecs.getincrementaldecoder("gb18030")().decode(data)
    except UnicodeDecodeError:
        return False
    return 2 * pairs > 0.8 * beyond


def _read_table(text: TextIO, separator: str | None = None) -> Any:
    """Read a table of text and convert nothing: "01" is not 1, and "None" may be a word."""
    import pandas as pd

    names = text.read(_LONGEST_HEADER).replace("\r", "\n").partition("\n")[0]
    separator = separator or _separator(names)
    if names.count(separator) >= _MOST_COLUMNS_READ:
        raise ValueError(f"it has more than {_MOST_COLUMNS_READ:,} columns")
    as_written: dict[str, Any] = {"sep": separator, "dtype": str, "keep_default_na": False, "index_col": False}
    while text.read(_LONGEST_HEADER):
        pass  # pandas would hide where the text cannot be decoded
    text.seek(0)
    # pandas renames a second column of the same name.
    header = pd.read_csv(text, **as_written, header=None, nrows=1).iloc[0].tolist()
    twice = sorted(name for name, count in Counter(header).items() if name and count > 1)
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}")
    text.seek(0)
    if len(header) > 1:
        return pd.read_csv(text, **as_written)
    # In one column, an empty line is an empty value, except at the end of the file.
    rows = pd.read_csv(text, **as_written, skip_blank_lines=False).fillna("")
    filled = rows.index[rows[rows.columns[0]] != ""]
    return rows.iloc[: filled[-1] + 1 if len(filled) else 0]


def _separator(header: str) -> str:
    """Return what separates the columns: a comma, or a semicolon or a tab if the header has no comma."""
    bare = re.sub(r'"[^"]*"', "", header)
    return next((mark for mark in (",", ";", "\t") if mark in bare), ",")


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


def _read_lines(text: TextIO) -> list[Row]:
    rows = []
    # Split at line feeds only: JSON strings may contain other line separators.
    for number, line in enumerate(text.read().split("\n"), start=1):
        if line.strip():
            row = _parsed(line, f"line {number}")
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            rows.append(row)
    return rows


def _read_array(text: TextIO) -> list[Row]:
    rows = _parsed(text.read(), "it")
    if not isinstance(rows, list):
        raise ValueError("it is not a JSON array of objects; a file with one object a line is called .jsonl")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"element {number} is not a JSON object")
    return rows


def _parsed(text: str, what: str) -> Any:
    try:
        check_count(text)
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON: {error.msg}") from None
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} occurs twice in one object")
    return found
