"""Make PEFT's `PeftModel.from_pretrained` and `load_adapter` read veratune's files."""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn

from veratune.adapters.names import base_modules, joined, public_state
from veratune.checkpoint.files import (
    CONFIG_NAME,
    LARGEST_CONFIG,
    WEIGHTS_NAME,
    CheckpointError,
    open_tensors,
    read_json,
)
from veratune.checkpoint.hub import find_directory
from veratune.checkpoint.native import file_tensors, native_scheme, native_targets, read_native
from veratune.checkpoint.native_header import METADATA_KEY
from veratune.checkpoint.peft_rules import exact_targets, peft_saved
from veratune.checkpoint.validate import LoadedAdapter, check_keys, other_projections
from veratune.config import PEFT_TYPE
from veratune.config_fields import heads_of
from veratune.integrations.peft.state import base_model_of, file_keys, saved_wrappers, with_module_names
from veratune.layers.entries import VECTOR_PREFIX, VECTORS
from veratune.projections.schemes import Stored

_LOCATION = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
# The names of a tuned layer's or tuned module's contents.
_PARTS = ("base_layer", "adapted", *(VECTOR_PREFIX + which for which in VECTORS), "vera_dropout")


def read_for_peft(path_or_repo: str, **location: Any) -> LoadedAdapter:
    """Return the adapter in a directory or repository that is passed to PEFT.

    Raises:
        CheckpointError: its files cannot be used.
    """
    return read_native(find_directory(path_or_repo, **{name: location[name] for name in _LOCATION if name in location}))


def task_type_for_peft(loaded: LoadedAdapter) -> str | None:
    """Return an adapter's task type, or None if PEFT would train a head for it that is not in the file."""
    task = loaded.config.task_type
    heads = heads_of(task)
    return None if heads and not any(name.endswith(heads) for name in loaded.saved) else task


def name_targets(peft_config: Any, loaded: LoadedAdapter, model: nn.Module) -> None:
    """Make a configuration select exactly the layers of an adapter in a file, under PEFT's rules.

    Raises:
        CheckpointError: the adapter is not for this model, or PEFT cannot hold it.
    """
    modules = base_modules(model)
    targets = native_targets(modules, loaded)
    for target in targets:
        if target.r != loaded.config.rank_of(target.name):
            raise CheckpointError(
                f"{loaded.origin}: d of {target.name} has {target.r} elements, but its rank in the configuration is"
                f" {loaded.config.rank_of(target.name)}"
            )
    if isinstance(native_scheme(loaded, targets), Stored):
        raise CheckpointError(
            f"{loaded.origin} has projections that came from a PEFT file, but veratune's layers in PEFT draw theirs"
            " from the key: load the adapter with veratune.VeraModel.from_pretrained, export it with export_peft, and"
            " load that directory with PEFT"
        )
    for name in peft_saved(modules, peft_config.modules_to_save or ()):
        within = next((layer for layer in loaded.vectors if layer == name or layer.startswith(f"{name}.")), None)
        if within is not None:
            raise _otherwise(loaded, peft_config, within)
    # PEFT would also treat parts of the tuned layers as saved modules.
    ends = tuple(peft_config.modules_to_save or ())
    inside = next((part for part in _PARTS if ends and part.endswith(ends)), None)
    if inside is not None:
        raise _otherwise(loaded, peft_config, inside)
    layers = [target.name for target in targets if target.parameter is None]
    exact = exact_targets(model, layers, loaded.config.target_modules)
    peft_config.target_modules = exact if isinstance(exact, str) else set(exact)
    peft_config.target_parameters = [target.name for target in targets if target.parameter is not None] or None
    peft_config.exclude_modules = peft_config.layers_to_transform = peft_config.layers_pattern = None


def check_named(peft_config: Any, loaded: LoadedAdapter, names: set[str]) -> None:
    """Raise CheckpointError unless PEFT is about to adapt exactly the layers of an adapter in a file."""
    apart = sorted(names ^ loaded.vectors.keys())
    if apart:
        raise _otherwise(loaded, peft_config, apart[0])


def _otherwise(loaded: LoadedAdapter, peft_config: Any, name: str) -> CheckpointError:
    return CheckpointError(
        f"{loaded.origin} cannot be loaded into PEFT here, because PEFT would not treat {name} as the file does: it"
        f" compares the ends of names with modules_to_save={peft_config.modules_to_save!r} and the heads for"
        f" task_type={peft_config.task_type!r}. Use veratune.VeraModel.from_pretrained"
    )


class AdapterWeights(dict[str, Tensor]):
    """The result of PEFT's `load_peft_weights` for one of veratune's files: the tensors by their keys in the file.

    Attributes:
        loaded: the file's contents.
        device: the device that PEFT passed for the tensors.
    """

    def __init__(self, loaded: LoadedAdapter, device: Any) -> None:
        super().__init__(file_tensors(loaded))
        self.loaded, self.device = loaded, device

    def for_model(self, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """Return the tensors under PEFT's keys for an adapter on a model.

        Names and shapes are checked here, because PEFT keeps the initial values of missing tensors, and copies any
        other tensor whose name is in the model.

        Raises:
            CheckpointError: the adapter has other projections, layers or shapes, or is not one of veratune's.
        """
        peft_model: Any = model
        loaded, config = self.loaded, peft_model.peft_config[adapter_name]
        if config.peft_type != PEFT_TYPE:
            raise CheckpointError(
                f"{loaded.origin} is a veratune adapter, but adapter {adapter_name!r} here has type"
                f" {config.peft_type.value}: load it under another name"
            )
        if loaded.header["fingerprint"] != config.fingerprint:
            found = config.fingerprint
            raise other_projections(loaded.origin, config.checked(), loaded.header["fingerprint"], found)
        modules = base_modules(base_model_of(model))
        native_targets(modules, loaded)
        tensors = dict(self)
        # Modules that PEFT also trains in full, because their names have the same ending, keep the base weights.
        for name, wrapper in saved_wrappers(modules, adapter_name).items():
            if name not in loaded.saved:
                original = public_state(wrapper.original_module)
                tensors |= {f"modules_to_save.{joined(name, key)}": t.detach().clone() for key, t in original.items()}
        keys = file_keys(model, adapter_name)
        expected = {key: tensor for key, tensor in _state(model, adapter_name).items() if key in keys}
        check_keys(
            f"{loaded.origin}, compared with adapter {adapter_name!r},", {keys[key] for key in expected}, tensors
        )
        for key, own in expected.items():
            tensor = tensors[keys[key]]
            if tensor.shape != own.shape:
                raise CheckpointError(
                    f"{loaded.origin}: {keys[key]} has shape {tuple(tensor.shape)}, but {tuple(own.shape)} in this"
                    " model"
                )
            if tensor.is_floating_point() != own.is_floating_point() or tensor.is_complex():
                raise CheckpointError(f"{loaded.origin}: {keys[key]} is {tensor.dtype}, but {own.dtype} in this model")
        return {key: tensors[keys[key]].to(device=self.device) for key in expected}


def _state(model: nn.Module, adapter_name: str) -> Mapping[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about models without embeddings
        state: dict[str, Tensor] = get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        )
    return state


def reading(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap PEFT's `load_peft_weights` to read veratune's adapters as well."""

    @wraps(load)
    def load_weights(model_id: Any, device: Any = None, key_mapping: Any = None, **location: Any) -> Any:
        if _type_of(model_id, **location) != PEFT_TYPE:
            return load(model_id, device=device, key_mapping=key_mapping, **location)
        loaded = read_for_peft(model_id, **location)
        for name in (*loaded.vectors, *loaded.saved, *loaded.biases):
            changed = next((old for old in key_mapping or () if re.search(old, name)), None)
            if changed is not None:
                raise CheckpointError(
                    f"{loaded.origin} cannot be loaded with key_mapping, which would rename {name} ({changed!r}):"
                    " veratune's files use the names of the model that the adapter was trained on. Omit key_mapping"
                )
        return AdapterWeights(loaded, device)

    return load_weights


def refusing(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap transformers' `load_adapter`, which reads files itself, to reject veratune's."""

    @wraps(load)
    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("adapter_state_dict") is not None or len(args) > 2
        path_or_repo = peft_model_id or getattr(kwargs.get("load_config"), "pretrained_model_name_or_path", None)
        if (
            not given
            and path_or_repo is not None
            and _type_of(path_or_repo, **(kwargs.get("adapter_kwargs") or {})) == PEFT_TYPE
        ):
            raise CheckpointError(
                f"{path_or_repo} is a veratune adapter, which transformers' load_adapter cannot read: use"
                " peft.PeftModel.from_pretrained or veratune.VeraModel.from_pretrained"
            )
        return load(self, peft_model_id, *args, **kwargs)

    return load_adapter


def _type_of(path_or_repo: Any, **location: Any) -> Any:
    """Return the type of the adapter in a directory or repository, or None if PEFT finds none."""
    try:
        return PeftConfig._get_peft_type(
            path_or_repo, **{name: location[name] for name in _LOCATION if name in location}
        )
    except (ValueError, KeyError, TypeError):
        return None


def check_local(model_id: Any, **location: Any) -> None:
    """Raise CheckpointError if a local configuration has a type unknown to PEFT, or belongs to another adapter.

    Args:
        model_id: the path or Hub name passed to PEFT; Hub names are not checked.
        location: `subfolder`, and other arguments passed to PEFT.
    """
    if not isinstance(model_id, str | os.PathLike):
        return
    directory = Path(model_id) / (location.get("subfolder") or ".")
    path = directory / CONFIG_NAME
    if not os.path.lexists(path):
        return  # PEFT raises an error
    kind = read_json(path, finite=False, largest=LARGEST_CONFIG).get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: peft_type={kind!r} is not an adapter type that PEFT supports; a veratune adapter has"
            f" {PEFT_TYPE!r}"
        )
    if kind != PEFT_TYPE and _is_native(directory / WEIGHTS_NAME):
        raise CheckpointError(
            f"{path} belongs to an adapter of type {kind!r}, but {WEIGHTS_NAME} next to it is a veratune adapter: an"
            " interrupted save can cause this. Load it with veratune.VeraModel.from_pretrained, and save it again"
        )


def _is_native(path: Path) -> bool:
    try:
        with open_tensors(path) as file:
            return METADATA_KEY in file.metadata
    except CheckpointError:
        return False  # PEFT reads the file, or reports the error


def placing(put: Callable[..., Any], own_tuner: type) -> Callable[..., Any]:
    """Wrap PEFT's `set_peft_model_state_dict` to accept an `AdapterWeights`, even for a wrapped model.

    Args:
        put: PEFT's function.
        own_tuner: the tuner class for veratune's layers.
    """

    @wraps(put)
    def put_weights(
        model: nn.Module,
        peft_model_state_dict: dict[str, Tensor],
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        state = peft_model_state_dict
        if isinstance(state, AdapterWeights):
            state = state.for_model(model, adapter_name)
        peft_model: Any = model
        if issubclass(PEFT_TYPE_TO_TUNER_MAPPING[peft_model.peft_config[adapter_name].peft_type], own_tuner):
            state = with_module_names(model, adapter_name, state)
        return put(model, state, adapter_name, *args, **kwargs)

    return put_weights
