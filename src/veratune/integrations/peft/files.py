"""veratune's own files in `peft.PeftModel.from_pretrained` and `load_adapter`, with the plug-in."""

import os
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from veratune.adapters.names import adapted_layers, base_modules, joined, module_names, unwrapped
from veratune.checkpoint.files import (
    CONFIG_NAME,
    LARGEST_CONFIG,
    WEIGHTS_NAME,
    CheckpointError,
    open_tensors,
    read_json,
)
from veratune.checkpoint.formats import read_contents
from veratune.checkpoint.hub import find_directory
from veratune.checkpoint.native import read_native
from veratune.checkpoint.peft_plugin import PLUGIN_TYPE
from veratune.checkpoint.peft_rules import PREFIX, TASK_HEADS, exact_targets, peft_saved
from veratune.checkpoint.validate import LoadedAdapter, check_keys, other_projections, targets_of
from veratune.config import PEFT_TYPE
from veratune.integrations.peft.state import with_module_names
from veratune.layers import VeraLayer
from veratune.layers.entries import VECTOR_PREFIX, VECTORS
from veratune.projections.schemes import Stored

_LOCATION = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
# What a tuned layer or a tuned module has inside.
_PARTS = ("base_layer", "adapted", *(VECTOR_PREFIX + which for which in VECTORS), "vera_dropout")


def read_for_peft(place: str, **location: Any) -> tuple[LoadedAdapter, str]:
    """Return the native adapter at a place, and the fingerprint of its projections.

    Raises:
        CheckpointError: its files cannot be used, or not with PEFT.
    """
    directory = find_directory(place, **{name: location[name] for name in _LOCATION if name in location})
    loaded, header, projections = read_native(directory)
    fingerprint: str = header["fingerprint"]
    if loaded.config.projection == "peft" and projections.keys() == {"A", "B"}:
        a, b = (projections[side] for side in "AB")
        if a.ndim == b.ndim == 2 and Stored.from_tensors(a, b).fingerprint() == fingerprint:
            raise CheckpointError(
                f"{loaded.origin} has projections that came from a PEFT file, and veratune's layers in PEFT draw theirs"
                " from the key: load it with veratune.VeraModel.from_pretrained, write it with export_peft, and give"
                " that directory to PEFT"
            )
    return loaded, fingerprint


def task_type_for_peft(loaded: LoadedAdapter) -> str | None:
    """Return an adapter's task type, or None where PEFT would train a head in full for it that the file has not."""
    task = loaded.config.task_type
    heads = TASK_HEADS.get(task or "", ())
    return None if heads and not any(name.endswith(heads) for name in loaded.saved) else task


def name_targets(peft_config: Any, loaded: LoadedAdapter, model: nn.Module) -> None:
    """Let a configuration name exactly what a native adapter is on, under PEFT's rules.

    Raises:
        CheckpointError: the adapter is not for this model.
    """
    modules = base_modules(model)
    targets = targets_of(modules, loaded)
    for target in targets:
        if target.r != loaded.config.rank_of(target.name):
            raise CheckpointError(
                f"{loaded.origin}: d of {target.name} has {target.r} numbers, but its rank in the configuration is"
                f" {loaded.config.rank_of(target.name)}"
            )
    for name in peft_saved(modules, peft_config.modules_to_save or ()):
        within = next((layer for layer in loaded.vectors if layer == name or layer.startswith(f"{name}.")), None)
        if within is not None:
            raise _otherwise(loaded, peft_config, within)
    # It would also take parts of the tuned layers for saved modules.
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
    """Raise CheckpointError unless what PEFT is about to adapt is what a native adapter is on."""
    apart = sorted(names ^ loaded.vectors.keys())
    if apart:
        raise _otherwise(loaded, peft_config, apart[0])


def _otherwise(loaded: LoadedAdapter, peft_config: Any, name: str) -> CheckpointError:
    return CheckpointError(
        f"{loaded.origin} cannot be loaded into PEFT here, where {name} would be adapted or trained in full otherwise:"
        f" PEFT goes by the ends of names, with modules_to_save={peft_config.modules_to_save!r} and"
        f" task_type={peft_config.task_type!r}. Use veratune.VeraModel.from_pretrained"
    )


class AdapterWeights(dict[str, Tensor]):
    """What PEFT reads of one of veratune's adapters, with what it would drop.

    Attributes:
        place: the directory, for messages.
        fingerprint: of the projections it was trained with; None if the file does not say.
        native: the adapter, if the file is veratune's own.
        device: where PEFT wants the tensors.
    """

    def __init__(
        self,
        place: str,
        tensors: dict[str, Tensor],
        fingerprint: str | None,
        native: LoadedAdapter | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__(tensors)
        self.place, self.fingerprint, self.native, self.device = place, fingerprint, native, device

    def for_model(self, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """Return the tensors under the names that PEFT has for them, after a look at the adapter they are for.

        Raises:
            CheckpointError: the adapter of this name has other projections or layers, or is not one of veratune's.
        """
        peft_model: Any = model
        config = peft_model.peft_config[adapter_name]
        if config.peft_type != PLUGIN_TYPE:
            raise CheckpointError(
                f"{self.place} is a veratune adapter, and adapter {adapter_name!r} here is of the type"
                f" {config.peft_type.value}: load it under another name"
            )
        if self.fingerprint is not None and config.fingerprint != self.fingerprint:
            raise other_projections(self.place, config.checked(), self.fingerprint, config.fingerprint)
        if self.native is None:
            return dict(self)
        tensors = _peft_tensors(self.native, peft_model, adapter_name)
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}


def _peft_tensors(native: LoadedAdapter, peft_model: Any, adapter_name: str) -> dict[str, Tensor]:
    """Return a native adapter's tensors under PEFT's names, for an adapter that a PEFT model has."""
    base: nn.Module = peft_model.get_base_model()
    names = module_names(peft_model)
    places = {id(module): name for name, module in peft_model.named_modules() if not names[name].wrapper}
    layers = {name: layer for name, layer in adapted_layers(base).items() if adapter_name in layer.entries}
    check_named(peft_model.peft_config[adapter_name], native, set(layers))
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        shapes = {which: tuple(vector.shape) for which, vector in layer.vectors(adapter_name).items()}
        if {which: tuple(vector.shape) for which, vector in native.vectors[name].items()} != shapes:
            raise CheckpointError(f"{native.origin}: {name} has vectors of other shapes than the {shapes} here")
        for which, vector in native.vectors[name].items():
            tensors[f"{places[id(layer)]}.{VECTOR_PREFIX}{which}"] = vector
    saved = dict(native.saved)
    wrappers: dict[str, Any] = {n: m for n, m in peft_model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    for place, module in wrappers.items():
        if module.adapter_state_dict_load_map(adapter_name):
            # Modules that PEFT also treats as saved keep their present weights.
            own = saved.pop(names[place].public.removeprefix(PREFIX), None)
            if own is None:
                own = {key: tensor.clone() for key, tensor in module.original_module.state_dict().items()}
            tensors |= {f"{place}.{key}": tensor for key, tensor in own.items()}
    if saved:
        raise CheckpointError(f"{native.origin} holds {', '.join(saved)} in full, which PEFT does not train here")
    modules = base_modules(base)
    for name, bias in native.biases.items():
        owner = modules[name.rpartition(".")[0]]
        place = places[id(owner.base_layer if isinstance(owner, VeraLayer) else unwrapped(owner))]
        tensors[joined(place, "bias")] = bias
    return tensors


def reading(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return PEFT's `load_peft_weights` that knows veratune's adapters."""

    @wraps(load)
    def load_weights(model_id: Any, device: str | None = None, key_mapping: Any = None, **location: Any) -> Any:
        try:
            kind = PeftConfig._get_peft_type(model_id, **location)
        except (ValueError, KeyError):
            kind = None
        if kind not in (PEFT_TYPE, PLUGIN_TYPE):
            return load(model_id, device=device, key_mapping=key_mapping, **location)
        place = str(Path(model_id) / (location.get("subfolder") or "."))
        if kind == PEFT_TYPE:
            loaded, fingerprint = read_for_peft(model_id, **location)
            tensors = {
                f"{PREFIX}{name}.{VECTOR_PREFIX}{which}": vector
                for name, vectors in loaded.vectors.items()
                for which, vector in vectors.items()
            }
            return AdapterWeights(place, tensors, fingerprint, loaded, device)
        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(model_id, **location)
        directory = find_directory(model_id, **{name: location[name] for name in _LOCATION if name in location})
        with open_tensors(directory / WEIGHTS_NAME) as file:  # never a pickle, which PEFT would take in its place
            tensors = file.tensors()
        if key_mapping:
            tensors = load(model_id, device="cpu", key_mapping=key_mapping, **location)
        return AdapterWeights(place, tensors, config.fingerprint, device=device)

    return load_weights


def check_tensors(
    place: str,
    tensors: dict[str, Tensor],
    peft_model: Any,
    adapter_name: str,
    *,
    sizes: bool = True,
    complete: bool = True,
) -> None:
    """Raise CheckpointError unless a file of PEFT's has the tensors that PEFT would write for an adapter.

    PEFT itself keeps the initial values of missing tensors, and copies any other tensor whose name is in the model.

    Args:
        place: the directory, for messages.
        tensors: what the file has.
        peft_model: the model, on which the adapter is.
        adapter_name: which adapter.
        sizes: whether shapes have to fit.
        complete: whether there have to be all of these tensors and no others; False for veratune's own files, which
            are checked for that when they are read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models without embeddings
        expected = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
        extra = set(tensors) - set(expected)
        # PEFT adds a resized embedding, or the weight that an adapted one has.
        more = get_peft_model_state_dict(peft_model, adapter_name=adapter_name) if extra else {}
    if complete:
        check_keys(f"{place}/{WEIGHTS_NAME}", expected, set(tensors) - set(more) | (set(expected) & set(tensors)))
    known = more | expected
    for name, tensor in tensors.items():
        if name not in known:
            continue
        own = known[name]
        if sizes and tensor.shape != own.shape:
            raise CheckpointError(
                f"{place}/{WEIGHTS_NAME}: {name} has the shape {tuple(tensor.shape)}, but {tuple(own.shape)} in this"
                " model"
            )
        if tensor.is_floating_point() != own.is_floating_point() or tensor.is_complex():
            raise CheckpointError(f"{place}/{WEIGHTS_NAME}: {name} is {tensor.dtype}, but {own.dtype} in this model")


def check_local(model_id: Any, **location: Any) -> None:
    """Raise CheckpointError if PEFT is about to read files of a local directory that are not safe to open.

    Args:
        model_id: what PEFT is given; hub names are not looked at.
        location: `subfolder`, and what else PEFT is given.
    """
    if not isinstance(model_id, str | os.PathLike):
        return
    directory = Path(model_id) / (location.get("subfolder") or ".")
    if not os.path.lexists(directory / CONFIG_NAME):
        return  # PEFT says so
    values = read_json(directory / CONFIG_NAME, finite=False, largest=LARGEST_CONFIG)
    kind = values.get("peft_type")
    if kind is not None and not isinstance(kind, str):
        raise CheckpointError(f"{directory / CONFIG_NAME}: peft_type={kind!r} is not a string")
    if kind == PLUGIN_TYPE:
        read_contents(directory)


def placing(put: Callable[..., Any], own_tuner: type) -> Callable[..., Any]:
    """Return PEFT's `set_peft_model_state_dict` that takes what `reading` returns, also on a wrapped model.

    Args:
        put: PEFT's own.
        own_tuner: the class of the tuners of veratune's layers.
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
        peft_model: Any = model
        if isinstance(state, AdapterWeights):
            read = state
            state = read.for_model(model, adapter_name)
            sizes = not (kwargs.get("ignore_mismatched_sizes") or (args and args[0]))
            check_tensors(read.place, state, peft_model, adapter_name, sizes=sizes, complete=read.native is None)
            if read.native is None:
                state = {name: tensor.to(read.device) for name, tensor in state.items()}
        if issubclass(PEFT_TYPE_TO_TUNER_MAPPING[peft_model.peft_config[adapter_name].peft_type], own_tuner):
            state = with_module_names(model, adapter_name, state)
        return put(model, state, adapter_name, *args, **kwargs)

    return put_weights
