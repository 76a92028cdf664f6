"""The model card saved with an adapter."""

import hashlib
import json
from pathlib import Path

from veratune.checkpoint.files import CARD_NAME, write_text
from veratune.checkpoint.hub import hub_name
from veratune.config import VeraConfig
from veratune.utils.outside_files import OutsideFileError, read_text

_TEXT = """---
{front_matter}---

# VeRA adapter

A VeRA adapter (Vector-based Random Matrix Adaptation, Kopiczko, Blankevoort & Asano, ICLR 2024) for
{base}, trained with veratune. It adapts {layers} layers with {numbers:,} trained parameters{others}; the random
projections are redrawn from a key when it is loaded.

```python
from veratune import VeraModel

model = VeraModel.from_pretrained(base_model, "path/to/this/adapter")
```

| setting | value |
|---|---|
{settings}
"""


def write_card(directory: Path, config: VeraConfig, layers: int, numbers: int, others: int) -> None:
    """Write a model card, unless the directory has a README that a user wrote or edited.

    Args:
        directory: the adapter's directory.
        config: the adapter's configuration.
        layers: the number of layers and parameters that it adapts.
        numbers: the number of elements in its vectors.
        others: the number of other trained parameters, in modules_to_save and biases.
    """
    path = directory / CARD_NAME
    if path.exists() and not _is_untouched(path):
        return
    base = hub_name(config.base_model_name_or_path)  # a local path must not become public
    front: dict[str, object] = {"library_name": "veratune", "tags": ["vera", "veratune", "adapter"]}
    if base:
        front["base_model"] = base
    # JSON is valid YAML, and quotes special characters in names.
    front_matter = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
    settings = "\n".join(
        f"| `{name}` | `{json.dumps(getattr(config, name))}` |" for name in config.names_with(card=True)
    )
    text = _TEXT.format(
        front_matter=front_matter,
        base=f"`{base}`" if base else "its base model",
        layers=layers,
        numbers=numbers,
        others=f", and has {others:,} more in modules_to_save and biases" if others else "",
        settings=settings,
    )
    write_text(path, f"{text}\n{_mark(text)}\n")


def _mark(text: str) -> str:
    return f"<!-- veratune card {hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]} -->"


def _is_untouched(path: Path) -> bool:
    """Return whether a README is a card written by veratune that has not been edited."""
    try:
        text, _, mark = read_text(path).rstrip("\n").rpartition("\n")
    except OutsideFileError:
        return False
    return mark == _mark(text)
