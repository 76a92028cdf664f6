"""Files that the `peft` package wrote through `veratune.integrations.peft`: reading them as veratune's own.

They are laid out as PEFT's VeRA files are, without projections; the JSON file has their fingerprint.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veratune.adapters.adapted_model import make_scheme
from veratune.adapters.targets import TargetError, configured_parameters, joined, unwrapped
from veratune.checkpoint.files import CONFIG_NAME, LARGEST_CONFIG, WEIGHTS_NAME, CheckpointError, read_json
from veratune.checkpoint.peft import PREFIX, STEPS_FOR_A_FILE, check_complete, check_numbers, sort_tensors
from veratune.checkpoint.validate import ReadyAdapter, make_ready, other_projections, targets_of
from veratune.config import VeraConfig
from veratune.utils.patterns import Budget, PatternError

PLUGIN_TYPE = "VERATUNE_PEFT"


def ready_plugin(
    modules: Mapping[str, nn.Module], directory: Path, tensors: dict[str, Tensor], *, sizes_only: bool = False
) -> ReadyAdapter:
    """Read an adapter that the `peft` package wrote through the plug-in and check it against a model.

    Args:
        modules: what `base_modules` returns for the model.
        directory: where the adapter is.
        tensors: what its tensors file holds.
        sizes_only: check names and shapes alone; the tensors may be on the meta device.

    Raises:
        CheckpointError: the files cannot be used, or not with this model.
    """
    path = directory / WEIGHTS_NAME
    values = read_json(directory / CONFIG_NAME, largest=LARGEST_CONFIG)
    config = _config(directory / CONFIG_NAME, values)
    loaded = sort_tensors(str(path), config, {_plain(key, modules): tensors[key] for key in tensors}, modules)
    targets = targets_of(modules, loaded)
    check_complete(loaded, modules)
    try:
        named = configured_parameters(modules, config, Budget(STEPS_FOR_A_FILE))
    except (TargetError, PatternError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    missing = [name for name in named if name not in loaded.vectors]
    if missing:
        raise CheckpointError(f"{path} has no vectors of {missing[0]}, which target_parameters names")
    # Which layer has which rank is what the tensors say; the patterns in rank_pattern are not matched.
    ranks = {config.r, *config.rank_pattern.values()}
    for target in targets:
        if target.rank not in ranks:
            raise CheckpointError(
                f"{path}: d of {target.name} has {target.rank} numbers, but its rank is {config.r} or one of"
                f" rank_pattern={config.rank_pattern}"
            )
    scheme = make_scheme(config, targets)
    expected = values.get("fingerprint")
    if not isinstance(expected, str | None):
        raise CheckpointError(f"{directory / CONFIG_NAME}: fingerprint={expected!r} is not a string or null")
    if expected is not None and not sizes_only and expected != scheme.fingerprint():
        raise other_projections(str(path), config, expected, scheme.fingerprint())
    return make_ready(modules, loaded, targets, scheme)


def _config(path: Path, values: dict[str, Any]) -> VeraConfig:
    names = [field.name for field in dataclasses.fields(VeraConfig)]
    check_numbers(path, values)
    kept = {name: values[name] for name in names if values.get(name) is not None}
    if kept.get("target_modules") == [] and kept.get("target_parameters"):
        del kept["target_modules"]  # which says there that no layer is adapted
    try:
        return VeraConfig(**{"modules_to_save": [], **kept})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None


def _plain(key: str, modules: Mapping[str, nn.Module]) -> str:
    """Return a key without the names of the wrappers that the plug-in puts around modules that read parameters.

    What the model itself has under a name comes first.
    """
    if not key.startswith(PREFIX):
        return key  # which is refused with the others
    name, parts = "", key.removeprefix(PREFIX).split(".")
    while parts:
        there = joined(name, parts[0])
        if there in modules:
            name = there
        elif parts[0] == "adapted" and parts[1:2] and parts[1] in unwrapped(modules[name])._parameters:
            pass
        elif parts[0] != "base_layer":
            break
        del parts[0]
    return PREFIX + ".".join([*([name] if name else []), *parts])
