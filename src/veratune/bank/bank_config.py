"""Derive a bank's configuration from the adapters that it will hold, or from a bank file."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from veratune.adapters.names import base_modules
from veratune.bank.layout import BankError, check_kind, shown_parts
from veratune.checkpoint.formats import read_adapter
from veratune.checkpoint.hub import find_directory
from veratune.config import VeraConfig


def config_for_adapters(model: nn.Module, adapters: Mapping[str, str | os.PathLike[str]]) -> VeraConfig:
    """Return the configuration of the smallest bank that can hold all of these adapters.

    Its layers and its `modules_to_save` are the union over the adapters, and its rank is the largest of their ranks.

    Args:
        model: the base model, without adapters; it is not modified.
        adapters: adapter names, mapped to directories or Hub repositories.

    Raises:
        BankError: there are no adapters, a bank cannot hold one of them, or they split a fused layer differently.
        CheckpointError: an adapter's files are missing, damaged, or for another model.
    """
    if not adapters:
        raise BankError("adapters is empty: pass at least one adapter")
    r = 0
    parts: dict[str, tuple[int, ...]] = {}
    modules_to_save: dict[str, None] = {}
    modules = base_modules(model)
    for name, path_or_repo in adapters.items():
        ready = read_adapter(modules, find_directory(path_or_repo))
        for target in ready.plan.targets:
            check_kind(target, f"adapter {name!r} ({path_or_repo}) cannot be in a bank")
            if parts.setdefault(target.name, target.parts) != target.parts:
                raise BankError(
                    f"adapter {name!r} ({path_or_repo}) splits the outputs of {target.name} into"
                    f" {shown_parts(target.parts)}, but an earlier adapter into {shown_parts(parts[target.name])}: they"
                    " cannot be in the same bank"
                )
            r = max(r, target.r)
        if ready.loaded.biases:
            raise BankError(
                f"adapter {name!r} ({path_or_repo}) cannot be in a bank: it trains biases"
                f" (bias={ready.plan.config.bias!r}), but a bank does not support per-adapter biases"
            )
        modules_to_save |= dict.fromkeys(ready.loaded.saved)
    return _config(r, parts, modules_to_save)


def config_of_layout(model: nn.Module, layout: dict[str, Any], origin: str) -> VeraConfig:
    """Return the configuration of a bank with the layout in a file.

    Args:
        model: the base model.
        layout: the layout, as returned by `Layout.describe`.
        origin: the file, for error messages.

    Raises:
        BankError: the model does not have one of the layers. Names from the file are only used if they are names of
            the model's modules.
    """
    modules = base_modules(model)
    parts = {name: tuple(widths) for name, _, _, widths in layout["layers"]}
    modules_to_save = [name for name, _ in layout["modules_to_save"]]
    missing = [name for name in (*parts, *modules_to_save) if name not in modules]
    if missing:
        raise BankError(f"{origin} is for another model: this model has no {missing[0]!r} ({len(missing)} missing)")
    return _config(layout["rank"], parts, modules_to_save)


def _config(r: int, parts: dict[str, tuple[int, ...]], modules_to_save: Iterable[str]) -> VeraConfig:
    # A list of names would also match layers whose names end in one of them.
    return VeraConfig(
        r=r,
        target_modules="|".join(map(re.escape, parts)),
        fused_parts={name: list(widths) for name, widths in parts.items() if widths},
        modules_to_save=list(modules_to_save),
    )
