"""Which numbers of a trainer's log are measures of the model, not of the machine."""

from collections.abc import Mapping
from typing import Any

_PREFIX = "eval_"
_OF_THE_MACHINE = ("runtime", "per_second", "_time")


def evaluated(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return what an evaluation found, by name without its prefix: the loss first, then the metrics."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in entry.items()
        if name.startswith(_PREFIX) and isinstance(value, float) and not name.endswith(_OF_THE_MACHINE)
    }
