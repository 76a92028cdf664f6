"""The tables of headline figures in the README and elsewhere: each figure comes from a committed result.

`headline.yaml` maps every cell of the tables to paths in JSON files. `report.py` writes the tables.
"""

import json
import re
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
MAPPING = Path(__file__).with_name("headline.yaml")
OPERATORS = re.compile(r" (over|minus) ")

Cell = str | list[str]
"""Text, or a format and the figures that it prints."""


class Number(float):
    """A figure that can also be printed as bytes or as milliseconds: `{:size}`, `{:gib}`, `{:ms}`."""

    def __format__(self, spec: str) -> str:
        if spec == "size":
            return f"{self / 1e3:.0f} KB" if self < 1e6 else f"{self / 1e6:.{1 if self < 1e7 else 0}f} MB"
        if spec == "gib":
            return f"{self / 2**30:.1f} GiB"
        if spec == "ms":
            return f"{1e3 * self:.{1 if self < 0.01 else 0}f} ms"
        return format(round(self) if spec == "," else float(self), spec)


def load() -> dict[str, Any]:
    """Return the mapping."""
    mapping: dict[str, Any] = yaml.safe_load(MAPPING.read_text(encoding="utf-8"))
    return mapping


@cache
def _results(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def at(path: str, sources: dict[str, str]) -> Any:
    """Return the value at a path, `source:key/key`; `name=value` selects from a list.

    A source is a file, or a file and a path in it.
    """
    source, _, rest = path.partition(":")
    file, _, prefix = sources[source].partition(":")
    found = _results(REPOSITORY / file)
    for part in filter(None, [*prefix.split("/"), *rest.split("/")]):
        if isinstance(found, list):
            name, _, value = part.partition("=")
            found = next(entry for entry in found if str(entry[name]) == value)
        else:
            found = found[part]
    return found


def figure(expression: str, sources: dict[str, str]) -> Number:
    """Return a value, a difference, or a ratio; of two lists of times the median of their ratios round by round."""
    first, *rest = OPERATORS.split(expression)
    value = at(first, sources)
    if not rest:
        return Number(statistics.median(value) if isinstance(value, list) else value)
    operator, second = rest
    other = at(second, sources)
    if operator == "minus":
        return Number(value - other)
    if isinstance(value, list):
        return Number(statistics.median(a / b for a, b in zip(value, other, strict=True)))
    return Number(value / other)


def text(cell: Cell, sources: dict[str, str]) -> str:
    """Return a cell as it is printed."""
    if isinstance(cell, str):
        return cell
    form, *expressions = cell
    return form.format(*(figure(expression, sources) for expression in expressions))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in markdown, its first column aligned left, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def markers(name: str) -> tuple[str, str]:
    """Return the comments around a table."""
    return f"<!-- table: {name}, by benchmarks/report.py -->", "<!-- /table -->"


def pages() -> dict[Path, str]:
    """Return the text that every page with tables should have."""
    mapping = load()
    found: dict[Path, str] = {}
    for name, table in mapping["tables"].items():
        rows = [[text(cell, mapping["sources"]) for cell in row] for row in table["rows"]]
        path = REPOSITORY / table["page"]
        page = found.get(path) or path.read_text(encoding="utf-8")
        begin, end = markers(name)
        before, _, rest = page.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_end:
            raise SystemExit(f"{table['page']} has no place for the table {name!r}: add {begin} and {end}")
        found[path] = f"{before}{begin}\n\n{markdown(table['header'], rows)}\n\n{end}{after}"
    return found
