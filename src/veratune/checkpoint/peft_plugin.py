"""Files that the `peft` package wrote through `veratune.integrations.peft`: reading them as veratune's own.

They are laid out as PEFT's VeRA files are, without projections; the JSON file has their fingerprint.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veratune.adapters.names import joined, unwrapped
from veratune.adapters.plan import make_scheme
from veratune.adapters.target import TargetError
from veratune.adapters.targets import configured_parameters
from veratune.checkpoint.base import AdapterContents, AdapterFiles
from veratune.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, CheckpointError
from veratune.checkpoint.peft import (
    STEPS_FOR_A_FILE,
    PeftFiles,
    check_complete,
    check_numbers,
    sort_tensors,
    vera_contents,
)
from veratune.checkpoint.peft_rules import PREFIX
from veratune.checkpoint.validate import ReadyAdapter, make_ready, other_projections, targets_of
from veratune.config import VeraConfig
from veratune.utils.patterns import Budget, PatternError

PLUGIN_TYPE = "VERATUNE_PEFT"


class PluginFormat(PeftFiles):
    """PEFT's files of veratune's layers. Only PEFT writes them."""

    name = "veratune in peft"
    peft_type = PLUGIN_TYPE
    about = (
        "written by PEFT with veratune's layers; veratune loads it, and so does PEFT after"
        " veratune.integrations.peft.install()"
    )

    def read(self, modules: Mapping[str, nn.Module], files: AdapterFiles) -> ReadyAdapter:
        config = _config(files.directory / CONFIG_NAME, files.config or {})
        fingerprint = _fingerprint(files)
        return files.ready(
            lambda tensors, sizes_only: _ready(
                modules, files.directory, config, None if sizes_only else fingerprint, tensors
            )
        )

    def contents(self, files: AdapterFiles) -> AdapterContents:
        return vera_contents(files, self.name, _fingerprint(files))


def _fingerprint(files: AdapterFiles) -> str | None:
    fingerprint = (files.config or {}).get("fingerprint")
    if not isinstance(fingerprint, str | None):
        raise CheckpointError(f"{files.directory / CONFIG_NAME}: fingerprint={fingerprint!r} is not a string or null")
    return fingerprint


def _ready(
    modules: Mapping[str, nn.Module],
    directory: Path,
    config: VeraConfig,
    fingerprint: str | None,
    tensors: dict[str, Tensor],
) -> ReadyAdapter:
    """Check an adapter against its configuration, a model, and the fingerprint of its projections, if one is given."""
    path = directory / WEIGHTS_NAME
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
        if target.r not in ranks:
            raise CheckpointError(
                f"{path}: d of {target.name} has {target.r} numbers, but its rank is {config.r} or one of"
                f" rank_pattern={config.rank_pattern}"
            )
    scheme = make_scheme(config, targets)
    if fingerprint is not None and fingerprint != scheme.fingerprint():
        raise other_projections(str(path), config, fingerprint, scheme.fingerprint())
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
