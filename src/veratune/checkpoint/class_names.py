"""Restore class names, which an adapter's file contains but a base model with a new head lacks."""

from typing import Any

from torch import nn

from veratune.adapters.names import without_wrappers
from veratune.checkpoint.validate import ReadyAdapter
from veratune.utils.text import notify, some


def name_classes(model: nn.Module, ready: ReadyAdapter) -> None:
    """Set the class names of a transformers model to those that an adapter was trained with.

    They are set only if the adapter includes a trained head, which determines the meaning of the outputs, and the model
    has the same number of unnamed classes ("LABEL_0", ...). Other class names are kept, with a warning.

    Args:
        model: the base model; its `config.id2label` and `config.label2id` may be changed.
        ready: the adapter.
    """
    config: Any = getattr(without_wrappers(model), "config", None)
    here, there = getattr(config, "id2label", None), ready.loaded.labels
    if not isinstance(here, dict) or not ready.loaded.saved or here.keys() != there.keys() or here == there:
        return
    if not _are_named(there):
        return
    if _are_named(here):
        notify(
            f"{ready.loaded.origin} was trained with the classes {_some(there)}, but this model's are"
            f" {_some(here)}: set model.config.id2label if that is wrong"
        )
        return
    config.id2label = dict(there)
    config.label2id = {name: number for number, name in there.items()}


def _are_named(labels: dict[int, str]) -> bool:
    return any(name != f"LABEL_{number}" for number, name in labels.items())


def _some(labels: dict[int, str]) -> str:
    return some([str(labels[number]) for number in sorted(labels)])
