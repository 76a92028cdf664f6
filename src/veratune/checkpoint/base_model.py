"""The base model of an adapter: its description in files, and warnings if a model is probably a different one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from veratune.adapters.names import without_wrappers
from veratune.adapters.target import TargetError
from veratune.adapters.targets import find_targets
from veratune.checkpoint.files import CheckpointError
from veratune.checkpoint.validate import ReadyAdapter
from veratune.config import VeraConfig
from veratune.utils.text import notify, some

_MOST_DIGITS = 9


def describe_base(model: nn.Module) -> dict[str, Any]:
    """Return the information needed to recreate a base model: its class and the names of its labels."""
    model = without_wrappers(model)
    config: Any = getattr(model, "config", None)
    labels = getattr(config, "id2label", None)
    described: dict[str, Any] = {"class": type(model).__name__}
    if isinstance(labels, dict):
        described["id2label"] = {str(number): str(name) for number, name in labels.items()}
        described["problem_type"] = getattr(config, "problem_type", None)
    return described


def check_labels(origin: str, labels: Any) -> dict[int, str]:
    """Return a file's class names by class index.

    Raises:
        CheckpointError: the class names are invalid.
    """
    if not isinstance(labels, dict) or not all(
        isinstance(name, str) and number.isdecimal() and number.isascii() and len(number) <= _MOST_DIGITS
        for number, name in labels.items()
    ):
        raise CheckpointError(f"{origin}: its class names (id2label) are invalid")
    return {int(number): name for number, name in labels.items()}


def tell_apart(model: nn.Module, ready: ReadyAdapter, named: Sequence[str]) -> None:
    """Warn if an adapter fits this model but was probably trained on a different one.

    Args:
        model: the model without a wrapper.
        ready: the adapter.
        named: the result of `layers_named` for the model and the adapter's configuration.
    """
    config, origin = ready.plan.config, ready.loaded.origin
    here = getattr(getattr(model, "config", None), "_name_or_path", None)
    there = config.base_model_name_or_path
    # The same model may be in another directory, so only the last component of a name is compared.
    if here and there and Path(str(here)).name != Path(there).name:
        notify(f"{origin} was trained on {there!r}, but this model is {str(here)!r}")
    left_out = [name for name in named if name not in ready.loaded.vectors]
    if left_out:
        notify(
            f"{origin} adapts {len(ready.loaded.vectors)} of the {len(named)} layers that its target_modules selects"
            f" in this model, but not {some(left_out)}: is this the model that the adapter was trained on?"
        )


def layers_named(model: nn.Module, config: VeraConfig) -> list[str]:
    """Return the layers of a model that a file's configuration selects, or an empty list if it is not for this model.

    The list is also empty if the configuration has regular expressions, or more names than the model has modules:
    matching them takes too long for a mere warning.
    """
    wanted = config.target_modules
    if not config.names_only() or (isinstance(wanted, list) and len(wanted) > sum(1 for _ in model.modules())):
        return []
    try:
        return [target.name for target in find_targets(model, config, lambda _: None)]
    except TargetError:
        return []


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
    if not are_named(there):
        return
    if are_named(here):
        notify(
            f"{ready.loaded.origin} was trained with the classes {_some(there)}, but this model's are"
            f" {_some(here)}: set model.config.id2label if that is wrong"
        )
        return
    config.id2label = dict(there)
    config.label2id = {name: number for number, name in there.items()}


def are_named(labels: Mapping[Any, str]) -> bool:
    """Return whether any class, by its index, has another name than transformers' placeholder ("LABEL_0")."""
    return any(name != f"LABEL_{number}" for number, name in labels.items())


def _some(labels: dict[int, str]) -> str:
    return some([str(labels[number]) for number in sorted(labels)])
