"""PEFT's rules for which modules a configuration selects, applied in bounded time.

PEFT passes the patterns of a downloaded configuration to `re`, which may never return.
"""

from typing import Any

from veratune.utils.patterns import pattern


def is_meant(config: Any, name: str) -> bool | None:
    """Return whether PEFT adapts the module with this name, or None if the configuration excludes the module.

    Raises:
        PatternError: a regular expression in the configuration is invalid, or takes too long to match.
    """
    ends = _ends(name)
    excluded, wanted = getattr(config, "exclude_modules", None), config.target_modules
    if excluded and (pattern(excluded).matches(name) if isinstance(excluded, str) else not ends.isdisjoint(excluded)):
        return None
    if any(_is_inside(name, saved) for saved in config.modules_to_save or ()):
        return None
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return pattern(wanted).matches(name)
    if ends.isdisjoint(wanted):
        return False
    indices = config.layers_to_transform
    if indices is None or indices == []:
        return True
    index = _first_index(name, config.layers_pattern)
    return index is not None and (index == indices if isinstance(indices, int) else index in indices)


def _ends(name: str) -> set[str]:
    return {name, *(name[i + 1 :] for i, letter in enumerate(name) if letter == ".")}


def _is_inside(name: str, saved: str) -> bool:
    """Return whether a name is that of a module to save, or of a module inside one, at any depth."""
    expression = pattern(f"(?:{saved})")
    parts = name.split(".")
    return any(expression.matches_end(".".join(parts[: i + 1])) for i in range(len(parts)))


def _first_index(name: str, stacks: list[str] | str | None) -> int | None:
    """Return the first number in a name, before its last part, that follows one of these stacks (or any name)."""
    parts = name.split(".")
    numbers = [index for index in range(1, len(parts) - 1) if parts[index].isdecimal()]
    if not stacks:
        # PEFT's pattern requires a dot before the stack's name.
        return next((int(parts[index]) for index in numbers if index >= 2), None)
    for stack in [stacks] if isinstance(stacks, str) else stacks:
        for index in numbers:
            if pattern(f"(?:{stack})").matches_end(".".join(parts[:index])):
                return int(parts[index])
    return None
