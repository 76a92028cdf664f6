"""Print tables, JSON, and errors in one line."""

import json
import os
import platform
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Wide enough that lines are not wrapped if the output is a pipe or a file.
_UNBOUNDED = 10_000
# Longer errors are truncated, as they may quote a file.
_LONGEST_LINE = 2_000


def printable(text: str) -> str:
    """Return text with unprintable characters, such as terminal escapes, written as in Python's repr."""
    if text.isprintable():
        return text
    kept = (x if x.isprintable() or x in "\n\t" or unicodedata.category(x) == "Zs" else _escaped(x) for x in text)
    return "".join(kept)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _one_line(message: str) -> str:
    line = printable(next(iter(message.strip().splitlines()), "an error without a message"))
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}... ({len(line):,} characters)"


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes, of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Return the number of processes that torchrun has started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table: framed on a terminal, plain columns elsewhere. Columns of numbers are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not is_main_process():
        return
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_UNBOUNDED)
    table = Table(
        box=box.SIMPLE_HEAD if console.is_terminal else None, title=printable(title) or None, title_justify="left"
    )
    for position, name in enumerate(header):
        numbers = all(_is_number(row[position]) for row in rows)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(table)


def print_text(text: str) -> None:
    """Print text."""
    if is_main_process():
        print(printable(text))


def print_json(value: Any) -> None:
    """Print a value as JSON, indented."""
    print(json.dumps(value, indent=2))


def error_line(message: str) -> None:
    """Print an error's first line to standard error."""
    process = "" if is_main_process() else f" (process {os.environ['RANK']})"
    print(f"veratune{process}: {_one_line(message)}", file=sys.stderr)


def warning_line(message: str) -> None:
    """Print a warning to standard error."""
    if is_main_process():
        print(f"veratune: warning: {_one_line(message)}", file=sys.stderr)


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "", 1).replace("-", "", 1).replace(" %", "").isdigit()


def bytes_text(count: float) -> str:
    """Return a number of bytes as human-readable text."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def cpu_name() -> str:
    """Return the processor's name, as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
