"""Read rows from a data set on the Hugging Face hub."""

import re
from typing import Any

# "name" or "owner/name", with the characters that the hub allows.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def may_be_hub_name(name: str) -> bool:
    """Return whether a name is valid for a data set on the hub."""
    return _NAME.fullmatch(name) is not None


def read_hub_rows(name: str, subset: str | None, split: str) -> list[dict[str, Any]]:
    """Return the rows of one split of a data set, with classes as names instead of numbers.

    Args:
        name: the data set: "name" or "owner/name".
        subset: its configuration; None if it has only one.
        split: its part, such as "train" or "validation".

    Raises:
        ValueError: the hub cannot be reached, or has no such data set, configuration or part.
    """
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"reading a data set from the hub needs: pip install 'veratune[cli]' ({error})") from None
    try:
        found = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the package raises a dozen types, some of them from three other packages
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is not a file here, and cannot be read as a data set on the hub: {reason}") from None
    features = found.features
    return [{column: _named(features[column], value) for column, value in row.items()} for row in found]


def _named(feature: Any, value: Any) -> Any:
    """Return a value with classes' numbers replaced by their names; -1 means no label."""
    if hasattr(feature, "int2str"):
        return None if value is None or value < 0 else feature.int2str(value)
    inner = getattr(feature, "feature", None)
    return [_named(inner, item) for item in value] if isinstance(value, list) and hasattr(inner, "int2str") else value
