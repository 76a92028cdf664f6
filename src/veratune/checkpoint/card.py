"""The model card that stands beside a saved adapter."""

import json
from pathlib import Path

from veratune.checkpoint.files import CARD_NAME, write_text
from veratune.config import VeraConfig

_TEXT = """---
{front_matter}---

# VeRA adapter

A VeRA adapter (Vector-based Random Matrix Adaptation, Kopiczko, Blankevoort & Asano, ICLR 2024) for
{base}, made with veratune. It holds {layers} adapted linear layers, {numbers:,} trained numbers in all; the
random projections are drawn again from a key when it is loaded.

```python
from veratune import VeraModel

model = VeraModel.from_pretrained(base_model, "path/to/this/adapter")
```

| setting | value |
|---|---|
{settings}
"""


def write_card(directory: Path, config: VeraConfig, layers: int, numbers: int) -> None:
    """Write a model card, unless a README is there already: it may be the user's own."""
    path = directory / CARD_NAME
    if path.exists():
        return
    base = config.base_model_name_or_path
    front = {"library_name": "veratune", "tags": ["vera", "veratune", "adapter"]}
    if base and not Path(base).is_absolute():  # a place on one machine's disk is nobody else's business
        front["base_model"] = base
    else:
        base = None
    # JSON is YAML, and quotes whatever a name may contain.
    front_matter = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
    shown = (
        "r",
        "target_modules",
        "projection",
        "projection_prng_key",
        "d_initial",
        "vera_dropout",
        "bias",
        "modules_to_save",
    )
    settings = "\n".join(f"| `{name}` | `{json.dumps(getattr(config, name))}` |" for name in shown)
    text = _TEXT.format(
        front_matter=front_matter,
        base=f"`{base}`" if base else "its base model",
        layers=layers,
        numbers=numbers,
        settings=settings,
    )
    write_text(path, text.encode(errors="replace").decode())
