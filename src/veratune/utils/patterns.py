r"""Match regular expressions against names in bounded time, for any expression.

Python's `re` backtracks: "(\w+\.?)+!" on one name can take exponential time while holding the GIL. Here, an expression
runs on all positions of a name at once, with the set of positions as the bits of an integer, so that each part visits a
position at most once. The syntax is that of `re` without the features that need backtracking: backreferences,
conditionals, atomic groups and possessive quantifiers.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parser  # type: ignore[attr-defined]
from typing import Any

_LONGEST = 1 << 20
_DEEPEST = 60
# Names joined by "|" with special characters escaped, as by `re.escape`.
_NAMES = re.compile(r"(?:[\w\-]|\\\W)+(?:\|(?:[\w\-]|\\\W)+)*")
_MOST_STEPS = 200_000


class PatternError(ValueError):
    """An invalid or unsupported regular expression, or one that takes too long."""


class Budget:
    """The total number of steps that untrusted expressions may take."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def take(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise PatternError("the regular expression takes too long")


class _Name:
    """A name to run an expression on; positions are between its characters, from 0 to its length."""

    def __init__(self, text: str) -> None:
        self.text, self.length = text, len(text)
        self.all = (1 << self.length + 1) - 1
        self.where: dict[int, int] = {}  # by the id of a test: the characters that pass it
        self.reached: dict[tuple[int, int], int] = {}  # by the id of a repetition and a position
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise PatternError("the regular expression takes too long")


# Maps the positions where a part of an expression may begin to those where it may end.
_Part = Callable[[_Name, int], int]
_Test = Callable[[str], bool]


class Pattern:
    """A regular expression."""

    def __init__(self, text: str) -> None:
        self._names = _names_in(text)
        self._parts: _Part | None = None if self._names is not None else _compiled(text)

    @property
    def is_list(self) -> bool:
        """Whether the expression consists only of names joined by "|"."""
        return self._names is not None

    def matches(self, name: str, budget: Budget | None = None) -> bool:
        """Return whether the expression matches a full name; `budget` limits expressions that come from files."""
        return self._runs(name, 1, budget)

    def matches_end(self, name: str, budget: Budget | None = None) -> bool:
        """Return whether the expression matches a dotted name, or the part of it after any dot."""
        return self._runs(name, 1 | sum(2 << i for i, character in enumerate(name) if character == "."), budget)

    def _runs(self, name: str, starts: int, budget: Budget | None) -> bool:
        if self._parts is None:
            assert self._names is not None
            return any(name[start:] in self._names for start in _bits(starts))
        run = _Name(name)
        try:
            return bool(self._parts(run, starts) >> run.length & 1)
        finally:
            if budget is not None:
                budget.take(run.steps + 1)


@lru_cache(maxsize=256)
def pattern(text: str) -> Pattern:
    """Compile a regular expression.

    Raises:
        PatternError: the text is not a regular expression, or uses a feature that is not supported here.
    """
    return Pattern(text)


def _names_in(text: str) -> frozenset[str] | None:
    if _NAMES.fullmatch(text) is None:
        return None
    return frozenset(re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in text.split("|"))


def _compiled(text: str) -> _Part:
    if len(text) > _LONGEST:
        raise PatternError(f"it has {len(text):,} characters; at most {_LONGEST:,} are allowed")
    try:
        parsed = sre_parser.parse(text)
        re.compile(text)  # finds errors that the parser alone does not, such as a variable-width lookbehind
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(str(error) or "it nests too deeply") from None
    return _sequence(parsed, parsed.state.flags, 0)


def _sequence(items: Iterable[tuple[Any, Any]], flags: int, depth: int) -> _Part:
    if depth > _DEEPEST:
        raise PatternError(f"it is nested more than {_DEEPEST} levels deep")
    parts: list[_Part] = []
    letters = ""
    for kind, value in [*items, (None, None)]:
        if kind is sre.LITERAL and not flags & re.IGNORECASE:
            letters += chr(value)
            continue
        if letters:
            parts.append(_text(letters))
            letters = ""
        if kind is not None:
            parts.append(_part(kind, value, flags, depth + 1))
    return parts[0] if len(parts) == 1 else _one_after_another(parts)


def _one_after_another(parts: Sequence[_Part]) -> _Part:
    def run(name: _Name, starts: int) -> int:
        for part in parts:
            if not starts:
                break
            starts = part(name, starts)
        return starts

    return run


def _text(letters: str) -> _Part:
    if len(letters) == 1:
        return _character(letters.__eq__)

    def run(name: _Name, starts: int) -> int:
        ends = 0
        for start in _bits(starts):
            name.step()
            if name.text.startswith(letters, start):
                ends |= 1 << start + len(letters)
        return ends

    return run


def _character(test: _Test) -> _Part:
    def run(name: _Name, starts: int) -> int:
        name.step()
        return (starts & _where(name, test)) << 1

    return run


def _where(name: _Name, test: _Test) -> int:
    found = name.where.get(id(test))
    if found is None:
        found = sum(1 << i for i, character in enumerate(name.text) if test(character))
        name.where[id(test)] = found
    return found


def _part(kind: Any, value: Any, flags: int, depth: int) -> _Part:
    test = _test(kind, value, flags)
    if test is not None:
        return _character(test)
    if kind is sre.SUBPATTERN:
        _, added, removed, inside = value
        return _sequence(inside, (flags | added) & ~removed, depth)
    if kind is sre.BRANCH:
        return _branch([_sequence(branch, flags, depth) for branch in value[1]])
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        least, most, inside = value
        items = list(inside)
        single = _test(items[0][0], items[0][1], flags) if len(items) == 1 else None
        if single is not None and most is sre.MAXREPEAT and least <= 1:
            return _run_of(single, least)
        return _repetition(_sequence(items, flags, depth), least, most)
    if kind in (sre.ASSERT, sre.ASSERT_NOT):
        direction, inside = value
        width = inside.getwidth()[0] if direction < 0 else None
        return _look(_sequence(inside, flags, depth), width, wanted=kind is sre.ASSERT)
    if kind is sre.AT:
        return _anchor(value, flags)
    if kind is getattr(sre, "FAILURE", None):
        return lambda name, starts: 0
    raise PatternError("backreferences, conditionals, atomic groups and possessive quantifiers are not supported")


def _branch(branches: Sequence[_Part]) -> _Part:
    def run(name: _Name, starts: int) -> int:
        ends = 0
        for branch in branches:
            ends |= branch(name, starts)
        return ends

    return run


def _run_of(test: _Test, least: int) -> _Part:
    """Return the part for `least` (0 or 1) or more characters that pass a test."""

    def run(name: _Name, starts: int) -> int:
        where = _where(name, test)
        ends = added = (starts & where) << 1 if least else starts
        while added:
            name.step()
            added = (added & where) << 1 & ~ends
            ends |= added
        return ends

    return run


def _repetition(inside: _Part, least: int, most: int) -> _Part:
    def run(name: _Name, starts: int) -> int:
        ends = 0
        for start in _bits(starts):
            reached = name.reached.get((id(run), start))
            if reached is None:
                reached = name.reached[(id(run), start)] = from_one(name, 1 << start)
            ends |= reached
        return ends

    def once(name: _Name, starts: int) -> int:
        ends = 0
        for start in _bits(starts):
            reached = name.reached.get((id(once), start))
            if reached is None:
                name.step()
                reached = name.reached[(id(once), start)] = inside(name, 1 << start)
            ends |= reached
        return ends

    def from_one(name: _Name, here: int) -> int:
        # Positions never decrease: after this many repetitions, only positions that a repetition does not move remain.
        for _ in range(min(least, 3 * name.length + 3)):
            here = once(name, here)
            if not here:
                return 0
        ends = added = here
        for _ in range(min(most - least, name.length + 1)):
            added = once(name, added) & ~ends
            if not added:
                break
            ends |= added
        return ends

    return run


def _look(inside: _Part, width: int | None, *, wanted: bool) -> _Part:
    """Return the part for a lookahead, or for a lookbehind if a width is given."""

    def run(name: _Name, starts: int) -> int:
        found = 0
        for start in _bits(starts):
            name.step()
            if width is None:
                there = inside(name, 1 << start) != 0
            else:
                there = start >= width and bool(inside(name, 1 << start - width) >> start & 1)
            found |= (there is wanted) << start
        return found

    return run


def _anchor(where: Any, flags: int) -> _Part:
    lines = bool(flags & re.MULTILINE)

    def is_word(name: _Name, position: int) -> bool:
        return 0 <= position < name.length and (name.text[position].isalnum() or name.text[position] == "_")

    def fits(name: _Name, position: int) -> bool:
        if where is sre.AT_BEGINNING:
            return position == 0 or (lines and name.text[position - 1] == "\n")
        if where is sre.AT_END:
            rest = name.text[position:]
            return rest in ("", "\n") or (lines and rest.startswith("\n"))
        if where is sre.AT_BEGINNING_STRING:
            return position == 0
        if where is sre.AT_END_STRING:
            return position == name.length
        between = is_word(name, position - 1) != is_word(name, position)
        return between is (where is sre.AT_BOUNDARY)

    def run(name: _Name, starts: int) -> int:
        name.step()
        return sum(1 << position for position in _bits(starts) if fits(name, position))

    return run


def _test(kind: Any, value: Any, flags: int) -> _Test | None:
    """Return the test for a part that matches a single character, or None for other parts."""
    if kind is sre.ANY:
        return (lambda _: True) if flags & re.DOTALL else "\n".__ne__
    if kind in (sre.LITERAL, sre.NOT_LITERAL):
        same = _same(chr(value), flags)
        return same if kind is sre.LITERAL else lambda character: not same(character)
    if kind is not sre.IN:
        return None
    tests = [_one_of(kind, inside, flags) for kind, inside in value if kind is not sre.NEGATE]
    if value[0][0] is sre.NEGATE:
        return lambda character: not any(test(character) for test in tests)
    return lambda character: any(test(character) for test in tests)


def _one_of(kind: Any, value: Any, flags: int) -> _Test:
    if kind is sre.LITERAL:
        return _same(chr(value), flags)
    if kind is sre.RANGE:
        low, high = value
        if not flags & re.IGNORECASE:
            return lambda character: low <= ord(character) <= high
        return lambda character: any(low <= ord(c) <= high for c in _cases(character))
    assert kind is sre.CATEGORY
    name = str(value).removeprefix("CATEGORY_")
    ascii_only = bool(flags & re.ASCII)
    kinds: dict[str, _Test] = {
        "DIGIT": str.isdecimal,
        "SPACE": str.isspace,
        "WORD": lambda character: character.isalnum() or character == "_",
    }
    test = kinds[name.removeprefix("NOT_")]

    def passes(character: str) -> bool:
        return (test(character) and not (ascii_only and not character.isascii())) is not name.startswith("NOT_")

    return passes


def _same(wanted: str, flags: int) -> _Test:
    if not flags & re.IGNORECASE:
        return wanted.__eq__
    cases = _cases(wanted)
    return lambda character: not cases.isdisjoint(_cases(character))


def _cases(character: str) -> frozenset[str]:
    return frozenset(c for c in (character, character.lower(), character.upper()) if len(c) == 1)


def _bits(mask: int) -> Iterator[int]:
    """Yield the positions in a bit set."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
