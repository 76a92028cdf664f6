"""Which names a configuration's lists, expressions and layer indices mean."""

from collections.abc import Callable

from veratune.config import VeraConfig
from veratune.utils.patterns import Budget, pattern


def matcher(patterns: list[str] | str, budget: Budget | None = None) -> Callable[[str], bool]:
    """Return whether a dotted module name is meant by a list of names or by a regular expression, as a function.

    The function raises PatternError where an expression takes more than the budget.
    """
    if isinstance(patterns, str):
        expression = pattern(patterns)
        return lambda name: expression.matches(name, budget)
    ends = frozenset(patterns)

    def is_listed(name: str) -> bool:
        return name in ends or any(name[i + 1 :] in ends for i, letter in enumerate(name) if letter == ".")

    return is_listed


def narrowed(names: list[str], config: VeraConfig, budget: Budget | None = None) -> list[str]:
    if config.exclude_modules is not None:
        excluded = matcher(config.exclude_modules, budget)
        names = [name for name in names if not excluded(name)]
    if config.layers_to_transform is not None:
        indices = set(layer_indices(config))
        names = [name for name in names if layer_index(name, config, budget) in indices]
    return names


def layer_indices(config: VeraConfig) -> list[int]:
    indices = config.layers_to_transform
    assert indices is not None
    return [indices] if isinstance(indices, int) else indices


def layer_index(name: str, config: VeraConfig, budget: Budget | None = None) -> int | None:
    """Return the index of a module's layer in its stack: the last number that follows `layers_pattern` in its name."""
    wanted = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    parts = name.split(".")
    numbers = [place for place in range(len(parts) - 2, 0, -1) if parts[place].isdecimal()]
    if wanted is None:
        return next((int(parts[place]) for place in numbers if parts[place - 1]), None)
    for stack in wanted:
        for place in numbers:
            if pattern(stack).matches_end(".".join(parts[:place]), budget):
                return int(parts[place])
    return None
