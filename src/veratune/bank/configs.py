"""What to make a bank with: for the adapters that it is to hold, or for the file that it is to read."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from veratune.adapters.names import base_modules
from veratune.bank.layout import BankError, check_kind
from veratune.checkpoint.formats import read_adapter
from veratune.checkpoint.hub import find_directory
from veratune.config import VeraConfig


def config_for_adapters(model: nn.Module, adapters: Mapping[str, str | os.PathLike[str]]) -> VeraConfig:
    """Return the configuration of the smallest bank that holds all of these adapters.

    Its layers are those that any of them adapts, its rank the largest of theirs, and its `modules_to_save` what any of
    them trains in full.

    Args:
        model: the base model, without adapters; it is not changed.
        adapters: name to directory, or to repository on the hub.

    Raises:
        BankError: no adapters, adapters that no bank holds, or that take one layer as one and as several.
        CheckpointError: files that are missing or damaged, or for another model.
    """
    if not adapters:
        raise BankError("there is no adapter to make a bank for")
    rank = 0
    parts: dict[str, tuple[int, ...]] = {}
    heads: dict[str, None] = {}
    modules = base_modules(model)
    for name, place in adapters.items():
        ready = read_adapter(modules, find_directory(place))
        for target in ready.plan.targets:
            check_kind(target, f"adapter {name!r} ({place}) cannot be in a bank")
            if parts.setdefault(target.name, target.parts) != target.parts:
                raise BankError(
                    f"adapter {name!r} ({place}) has {len(target.parts) or 1} parts on {target.name}, and one before it"
                    f" {len(parts[target.name]) or 1}: they cannot be in the same bank"
                )
            rank = max(rank, target.r)
        if ready.loaded.biases:
            raise BankError(
                f"adapter {name!r} ({place}) cannot be in a bank: it trains biases"
                f" (bias={ready.plan.config.bias!r}), which a bank does not hold for each adapter"
            )
        heads |= dict.fromkeys(ready.loaded.saved)
    return _config(rank, parts, heads)


def config_of_layout(model: nn.Module, layout: dict[str, Any], origin: str) -> VeraConfig:
    """Return the configuration that makes a bank of a layout, as `Layout.describe` returns it and a file has it.

    Args:
        model: the base model.
        layout: the layout.
        origin: the file.

    Raises:
        BankError: a layer that the model does not have. Names from a file that are the model's are all that is used.
    """
    modules = base_modules(model)
    parts = {name: tuple(own) for name, _, _, own in layout["layers"]}
    heads = [name for name, _ in layout["heads"]]
    missing = [name for name in (*parts, *heads) if name not in modules]
    if missing:
        raise BankError(f"{origin} is for another model: this one has no {missing[0]!r} ({len(missing)} are missing)")
    return _config(layout["rank"], parts, heads)


def _config(rank: int, parts: dict[str, tuple[int, ...]], heads: Iterable[str]) -> VeraConfig:
    # A list of names would also match layers whose names end in one of them.
    return VeraConfig(
        r=rank,
        target_modules="|".join(map(re.escape, parts)),
        fused_parts={name: list(own) for name, own in parts.items() if own},
        modules_to_save=list(heads),
    )
