"""Fields of a settings dataclass that are also command-line options; each declares its help, names and check."""

import codecs
import dataclasses
import inspect
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer

from veratune.cli.errors import SettingsError
from veratune.utils.text import shown

_LARGEST_INTEGER = (1 << 31) - 1
_KEY = "option"

# Takes a field's name and value, and returns the value to use.
Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Option:
    """An option of the command line for a field.

    Attributes:
        help: the text of `--help`, with "{default}" and "{choices}" as placeholders.
        panel: the group of options in `--help`.
        check: raises SettingsError for a bad value, wherever it comes from.
        short: another name.
        choices: the allowed values, for the text of `--help`.
        parse: converts the text from the command line to the value.
    """

    help: str
    panel: str
    check: Check
    short: str | None = None
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None

    def help_text(self, default: object) -> str:
        """Return the text of `--help` for a field with this default."""
        named = [f"{choice} (the default)" if choice == default else choice for choice in self.choices]
        choices = " or ".join(filter(None, (", ".join(named[:-1]), *named[-1:])))
        number = f"{default:g}" if isinstance(default, float) else str(default)
        return self.help.format(default=number, choices=choices)


def setting(
    help: str,
    panel: str,
    check: Check,
    *,
    default: Any = dataclasses.MISSING,
    short: str | None = None,
    choices: Collection[str] = (),
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Declare a field that is also an option; see `Option` for the arguments."""
    option = Option(help, panel, check, short, tuple(choices), parse)
    return dataclasses.field(default=default, metadata={_KEY: option})


def options_of(settings: Any) -> dict[str, Option]:
    """Return the options of a settings dataclass, or of an instance, by field name."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(settings) if _KEY in field.metadata}


def flag(name: str) -> str:
    """Return the name of a field's option."""
    return f"--{name.replace('_', '-')}"


def parameters_of(settings: type) -> list[inspect.Parameter]:
    """Return typer's parameters for the options of a settings dataclass; an option that is not given is None."""
    hints = get_type_hints(settings)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    return [
        parameter(
            name,
            _given_type(hints[name], option),
            typer.Option(
                *((flag(name), option.short) if option.short else ()),
                help=option.help_text(defaults[name]),
                rich_help_panel=option.panel,
            ),
        )
        for name, option in options_of(settings).items()
    ]


def parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    """Return one of typer's parameters, with None as its default."""
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _given_type(hint: Any, option: Option) -> Any:
    """Return the type that typer converts an option to."""
    if option.parse is not None:
        return str
    return next(kind for kind in (str, int, float) if hint in (kind, kind | None))


def bad(name: str, value: object, wanted: str) -> SettingsError:
    """Return the error for a value that is not allowed."""
    return SettingsError(f"{name}={shown(value)} is not allowed: it must be {wanted}")


def one_of(allowed: Collection[str]) -> Check:
    """Check for one of several values."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise bad(name, value, f"one of {', '.join(allowed)}")
        return value

    return check


def text(wanted: str) -> Check:
    """Return a check for non-empty text without null characters."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise bad(name, value, f"{wanted}; in a YAML file, put it in quotes")
        if not value or "\0" in value:
            raise bad(name, value, wanted)
        return value

    return check


def encoding(name: str, value: Any) -> str:
    """Check for the name of a text encoding."""
    try:
        found = codecs.lookup(value).name if isinstance(value, str) else None
        " ".encode(found or "")
    except (LookupError, ValueError):
        found = None
    if found is None:
        raise bad(name, value, "the name of a text encoding, such as utf-8, gb18030 or cp1252")
    return str(value)


def required(check: Check) -> Check:
    """Check for a value that has no default."""

    def present(name: str, value: Any) -> Any:
        if value in ("", None):
            raise SettingsError(f"{name} is missing: give it as {flag(name)}, or in the --config file")
        return check(name, value)

    return present


def optional(check: Check) -> Check:
    """Return a check that accepts None as well."""
    return lambda name, value: None if value is None else check(name, value)


def integer(least: int) -> Check:
    """Check for an integer that is not too small."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST_INTEGER:
            raise bad(name, value, f"an integer from {least} to {_LARGEST_INTEGER}")
        return value

    return check


def number(above: float | None = None, most: float = math.inf) -> Check:
    """Check for a finite number, or text of one, within bounds."""

    def check(name: str, value: Any) -> float:
        found = _as_float(name, value)
        if not math.isfinite(found) or (above is not None and found <= above) or abs(found) > most:
            wanted = "a finite number" if above is None else f"a finite number above {above:g}"
            raise bad(name, value, wanted if most == math.inf else f"{wanted}, of at most {most:g}")
        return found

    return check


def share(name: str, value: Any) -> float:
    """Check for a number of at least 0 and below 1."""
    found: float = number()(name, value)
    if not 0.0 <= found < 1.0:
        raise bad(name, found, "in [0, 1)")
    return found


def _as_float(name: str, value: Any) -> float:
    # YAML reads 1e-2 as a string, as its floats need a dot.
    try:
        return math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        raise bad(name, value, "a number") from None
