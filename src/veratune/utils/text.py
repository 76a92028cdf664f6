"""Text for messages: untrusted parts are bounded in length, and their control characters are escaped."""

import difflib
import reprlib
import warnings
from collections.abc import Iterable, Sequence

LONGEST_MESSAGE = 2000

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 20


def clipped(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Escape control characters in a text, and cut out its middle if it is too long.

    Names and values in messages may come from files. The end is kept because it contains the remedy.
    """
    if len(text) > longest:
        end = longest // 3
        text = f"{text[: longest - end]} [... {len(text) - longest:,} more characters ...] {text[-end:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """Format a value for a message, in bounded length: a file may contain anything."""
    return _SHORT.repr(value)


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, separated by commas, and the number of remaining names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: "1 step", "1,000 steps"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def closest(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return the known names that resemble a mistyped name, the closest first."""
    return difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)


def notify(sentence: str) -> None:
    """Warn about something that is not an error but may be surprising."""
    warnings.warn(clipped(f"veratune: {sentence}"), UserWarning, stacklevel=2)
