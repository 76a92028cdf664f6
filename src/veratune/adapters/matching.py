"""Match names against the lists, regular expressions and layer indices of a configuration."""

from collections.abc import Callable

from veratune.config import VeraConfig
from veratune.utils.patterns import Budget, pattern


def matcher(patterns: list[str] | str, budget: Budget | None = None) -> Callable[[str], bool]:
    """Return a predicate for dotted module names from a list of names or a regular expression.

    The predicate raises PatternError if an expression exceeds the budget.
    """
    if isinstance(patterns, str):
        expression = pattern(patterns)
        return lambda name: expression.matches(name, budget)
    ends = frozenset(patterns)

    def is_listed(name: str) -> bool:
        return name in ends or any(name[i + 1 :] in ends for i, letter in enumerate(name) if letter == ".")

    return is_listed


def narrowed(names: list[str], config: VeraConfig, budget: Budget | None = None) -> list[str]:
    """Filter names by `exclude_modules` and `layers_to_transform`."""
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
    positions = [i for i in range(len(parts) - 2, 0, -1) if parts[i].isdecimal()]
    if wanted is None:
        return next((int(parts[i]) for i in positions if parts[i - 1]), None)
    for stack in wanted:
        for i in positions:
            if pattern(stack).matches_end(".".join(parts[:i]), budget):
                return int(parts[i])
    return None
