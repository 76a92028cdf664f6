"""The model card saved with an adapter."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from veratune.adapters.names import without_wrappers
from veratune.checkpoint.base_model import are_named, describe_base
from veratune.checkpoint.files import CARD_NAME, write_text
from veratune.checkpoint.hub import hub_name
from veratune.config import VeraConfig
from veratune.utils.outside_files import OutsideFileError, read_text
from veratune.utils.text import some

_TEXT = """---
{front_matter}---

# VeRA adapter

A VeRA adapter (Vector-based Random Matrix Adaptation, Kopiczko, Blankevoort & Asano, ICLR 2024) for
{base}, trained with veratune. It adapts {layers} layers with {numbers:,} trained parameters{others}; the random
projections are redrawn from a key when it is loaded.{classes}

## How to load it

```python
{imported}from veratune import VeraModel

{loaded}model = VeraModel.from_pretrained(base_model, "path/to/this/adapter")
```

PEFT alone raises `KeyError: 'VERATUNE'`. With veratune's plug-in it loads the same files:

```python
import peft
from veratune.integrations.peft import install

install()
model = peft.PeftModel.from_pretrained(base_model, "path/to/this/adapter")
```

`veratune export path/to/this/adapter DIRECTORY --format peft` (or `VeraModel.export_peft`) writes files that PEFT loads
without veratune, and `--format lora` a LoRA. `veratune merge path/to/this/adapter DIRECTORY` writes a plain model.

## Settings

| setting | value |
|---|---|
{settings}
"""
_TRAINING = "\n## Training\n"
# More classes than this are abbreviated.
_MOST_CLASSES = 20


def write_card(directory: Path, config: VeraConfig, model: nn.Module, layers: int, numbers: int, others: int) -> None:
    """Write a model card, unless the directory has a README that a user wrote or edited.

    Args:
        directory: the adapter's directory.
        config: the adapter's configuration.
        model: the base model.
        layers: the number of layers and parameters that it adapts.
        numbers: the number of elements in its vectors.
        others: the number of other trained parameters, in modules_to_save and biases.
    """
    path = directory / CARD_NAME
    if path.exists() and _untouched(path) is None:
        return
    described = describe_base(model)
    known = type(without_wrappers(model)).__module__.startswith("transformers.")
    base = hub_name(config.base_model_name_or_path)  # a local path must not become public
    front: dict[str, object] = {"library_name": "veratune", "tags": ["vera", "veratune", "adapter"]}
    if base:
        front["base_model"] = base
    settings = {name: json.dumps(getattr(config, name)) for name in config.names_with(card=True)}
    text = _TEXT.format(
        # JSON is valid YAML, and quotes special characters in names.
        front_matter="".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()),
        base=f"`{base}` (`{described['class']}`)" if base else f"its base model, a `{described['class']}`",
        layers=layers,
        numbers=numbers,
        others=f", and has {others:,} more in modules_to_save and biases" if others else "",
        classes=_classes(described.get("id2label") or {}),
        imported=f"from transformers import {described['class']}\n" if known else "",
        loaded=_load(base, described) if known else "",
        settings="\n".join(f"| `{name}` | `{value}` |" for name, value in (settings | _versions()).items()),
    )
    write_text(path, _signed(text))


def add_training(directory: Path, facts: Mapping[str, str]) -> None:
    """Add how an adapter was trained, and its scores, to a card that nobody has edited.

    Args:
        directory: the adapter's directory.
        facts: name to value.
    """
    text = _untouched(directory / CARD_NAME)
    if text is not None:
        rows = "\n".join(f"| {name} | `{value.replace('|', '/')}` |" for name, value in facts.items())
        text = text.partition(_TRAINING)[0].rstrip("\n")
        write_text(directory / CARD_NAME, _signed(f"{text}\n{_TRAINING}\n| | |\n|---|---|\n{rows}\n"))


def _classes(labels: Mapping[str, str]) -> str:
    """Return a sentence with the names of the classes, if they have any."""
    if not are_named(labels):
        return ""
    named = [f"{number} `{json.dumps(labels[number], ensure_ascii=False)}`" for number in sorted(labels, key=int)]
    return f"\n\nIts classes: {some(named, _MOST_CLASSES)}."


def _load(base: str | None, described: Mapping[str, Any]) -> str:
    """Return the line that loads one of transformers' models."""
    labels, problem = described.get("id2label") or {}, described.get("problem_type")
    settings = f", num_labels={len(labels)}" if "Classification" in described["class"] and labels else ""
    if settings and problem == "regression":
        settings += f', problem_type="{problem}"'
    place = json.dumps(base or "path/to/the/base/model")
    return f"base_model = {described['class']}.from_pretrained({place}{settings})\n"


def _versions() -> dict[str, str]:
    """Return the versions of the packages that were used."""
    names = ("veratune", "torch", "transformers")  # nothing is imported for its version
    return {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}


def _signed(text: str) -> str:
    """Return a card with a line at its end that shows whether it was edited."""
    return f"{text}\n{_mark(text)}\n"


def _mark(text: str) -> str:
    return f"<!-- veratune card {hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]} -->"


def _untouched(path: Path) -> str | None:
    """Return the text of a card written by veratune that has not been edited, or None for any other README."""
    try:
        text, _, mark = read_text(path).rstrip("\n").rpartition("\n")
    except OutsideFileError:
        return None
    return text if mark == _mark(text) else None
