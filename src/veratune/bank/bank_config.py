"""Derive a bank's configuration from the adapters that it will hold, or from a bank's file."""

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

    Its layers are those that any of them adapts, its rank is the largest of theirs, and its `modules_to_save` are the
    modules that any of them trains in full.

    Args:
        model: the base model, without adapters; it is not changed.
        adapters: name to directory, or to repository on the hub.

    Raises:
        BankError: no adapters, adapters that a bank cannot hold, or ones that split a fused layer differently.
        CheckpointError: files that are missing or damaged, or for another model.
    """
    if not adapters:
        raise BankError("there is no adapter to make a bank for")
    rank = 0
    parts: dict[str, tuple[int, ...]] = {}
    modules_to_save: dict[str, None] = {}
    modules = base_modules(model)
    for name, path_or_repo in adapters.items():
        ready = read_adapter(modules, find_directory(path_or_repo))
        for target in ready.plan.targets:
            check_kind(target, f"adapter {name!r} ({path_or_repo}) cannot be in a bank")
            if parts.setdefault(target.name, target.parts) != target.parts:
                raise BankError(
                    f"adapter {name!r} ({path_or_repo}) has {len(target.parts) or 1} parts on {target.name}, but an"
                    f" earlier one has {len(parts[target.name]) or 1}: they cannot be in the same bank"
                )
            rank = max(rank, target.r)
        if ready.loaded.biases:
            raise BankError(
                f"adapter {name!r} ({path_or_repo}) cannot be in a bank: it trains biases"
                f" (bias={ready.plan.config.bias!r}), which a bank does not hold for each adapter"
            )
        modules_to_save |= dict.fromkeys(ready.loaded.saved)
    return _config(rank, parts, modules_to_save)


def config_of_layout(model: nn.Module, layout: dict[str, Any], origin: str) -> VeraConfig:
    """Return the configuration of a bank with a file's layout, as returned by `Layout.describe`.

    Args:
        model: the base model.
        layout: the layout.
        origin: the file, for messages.

    Raises:
        BankError: a layer that the model does not have. Of the names in a file, only those of the model's modules are
            used.
    """
    modules = base_modules(model)
    parts = {name: tuple(widths) for name, _, _, widths in layout["layers"]}
    modules_to_save = [name for name, _ in layout["modules_to_save"]]
    missing = [name for name in (*parts, *modules_to_save) if name not in modules]
    if missing:
        raise BankError(f"{origin} is for another model: this one has no {missing[0]!r} ({len(missing)} are missing)")
    return _config(layout["rank"], parts, modules_to_save)


def _config(rank: int, parts: dict[str, tuple[int, ...]], modules_to_save: Iterable[str]) -> VeraConfig:
    # A list of names would also match layers whose names end in one of them.
    return VeraConfig(
        r=rank,
        target_modules="|".join(map(re.escape, parts)),
        fused_parts={name: list(widths) for name, widths in parts.items() if widths},
        modules_to_save=list(modules_to_save),
    )
