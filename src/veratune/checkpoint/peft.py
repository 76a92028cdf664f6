"""PEFT's own VeRA files: reading what the `peft` package wrote, and writing what it reads, with equal outputs."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veratune.adapters.adapted_model import AdaptedModel, make_scheme
from veratune.adapters.targets import Target, base_modules, configured_names, matcher, unwrapped, without_wrappers
from veratune.checkpoint.files import (
    CONFIG_NAME,
    LARGEST_CONFIG,
    WEIGHTS_NAME,
    CheckpointError,
    read_json,
    write_pair,
)
from veratune.checkpoint.peft_rules import check_called
from veratune.checkpoint.validate import LoadedAdapter, ReadyAdapter, make_ready, targets_of
from veratune.config import VeraConfig
from veratune.layers import SavedModule, VeraLayer, VeraLinear, VeraParameter
from veratune.layers.biases import bias_first_names
from veratune.layers.registry import is_conv1d
from veratune.projections.schemes import PeftShared, Scheme, Side, Stored
from veratune.utils.patterns import Budget, PatternError

PEFT_VERA = "VERA"
PREFIX = "base_model.model."
A_KEY, B_KEY = "base_model.vera_A", "base_model.vera_B"

# The names of the modules that PEFT trains in full for a task, whatever modules_to_save says.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# A file's expressions are only matched to find out that a layer is missing; this many steps take about a second.
STEPS_FOR_A_FILE = 3_000_000

_WRAPPER_PARTS = ("original_module.", "modules_to_save.")

_SAME_FIELDS = (
    "r",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "d_initial",
    "vera_dropout",
    "bias",
    "init_weights",
    "projection_prng_key",
    "save_projection",
    "base_model_name_or_path",
    "revision",
    "exclude_modules",
)


# Reading


def ready_peft(
    modules: Mapping[str, nn.Module], directory: Path, tensors: dict[str, Tensor], *, sizes_only: bool = False
) -> ReadyAdapter:
    """Check an adapter that the `peft` package wrote against its own configuration and a model.

    Args:
        modules: what `base_modules` returns for the model.
        directory: where the adapter's files are.
        tensors: what `read_tensors` returned for its tensors file.
        sizes_only: check names and shapes alone; the tensors may be on the meta device.

    Raises:
        CheckpointError: the files cannot be used, or not with this model.
    """
    path = directory / WEIGHTS_NAME
    config = _read_config(directory / CONFIG_NAME)
    tensors = dict(tensors)
    a, b = tensors.pop(A_KEY, None), tensors.pop(B_KEY, None)
    if (a is None) != (b is None):
        raise CheckpointError(f"{path} has one of {A_KEY} and {B_KEY} only")
    if config.save_projection and a is None:
        raise CheckpointError(f"{path}: save_projection is true in {CONFIG_NAME}, but the file has no projections")
    loaded = sort_tensors(str(path), config, tensors, modules)
    targets = targets_of(modules, loaded)
    check_complete(loaded, modules)
    for target in targets:
        if target.rank != config.r:
            raise CheckpointError(f"{path}: d of {target.name} has {target.rank} numbers, but r is {config.r}")
    scheme = make_scheme(config, targets)
    if a is not None and b is not None:
        _check_shapes(str(path), config, targets, a, b)
        if not sizes_only:
            scheme = _stored_source(config, targets, a, b)
    return make_ready(modules, loaded, targets, scheme)


def check_complete(loaded: LoadedAdapter, modules: Mapping[str, nn.Module]) -> None:
    """Raise CheckpointError if layers or saved modules that the configuration names are not in the file.

    With projections drawn again, a missing layer would give all others projections of other shapes.
    """
    config = loaded.config
    if config.target_modules not in (None, "all-linear"):
        try:
            named = configured_names(modules, config, Budget(STEPS_FOR_A_FILE))
        except PatternError as error:
            raise CheckpointError(
                f"{loaded.origin}: target_modules={config.target_modules!r} cannot be checked against the file: {error}"
            ) from None
        missing = [name for name in named if name not in loaded.vectors]
        missing = [name for name in missing if not any(f"{name}.".startswith(f"{top}.") for top in loaded.saved)]
        if missing:
            raise CheckpointError(
                f"{loaded.origin} has no vectors of {missing[0]} (one of {len(missing)} such layers), which"
                f" target_modules={config.target_modules!r} names"
            )
    for name in peft_saved(modules, config.modules_to_save or []):
        if name not in loaded.saved and next(modules[name].parameters(), None) is not None:
            raise CheckpointError(f"{loaded.origin} has no weights of {name}, which modules_to_save names")


def peft_saved(modules: Mapping[str, nn.Module], suffixes: Collection[str]) -> list[str]:
    """Return the modules that PEFT trains in full for these names: it compares the ends of names, letter by letter."""
    names = [name for name in modules if name and name.endswith(tuple(suffixes))]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _read_config(path: Path) -> VeraConfig:
    values = read_json(path, largest=LARGEST_CONFIG)
    if values.get("peft_type") != PEFT_VERA:
        raise CheckpointError(f"{path}: peft_type is {values.get('peft_type')!r}, not {PEFT_VERA!r}")
    kept = {name: values[name] for name in _SAME_FIELDS if values.get(name) is not None}
    check_numbers(path, values)
    for name, allowed in (("task_type", str), ("modules_to_save", list)):
        if not isinstance(values.get(name), allowed | None):
            raise CheckpointError(f"{path}: {name}={values[name]!r} is not {allowed.__name__} or null")
    if values.get("task_type") is not None:
        kept["task_type"] = values["task_type"]
    # A stack's indices beside a regular expression would be refused in a new configuration; which layers an adapter
    # has is read from its tensors, so what chose them is only kept where it can be.
    if isinstance(kept.get("target_modules"), str) and "layers_to_transform" in kept:
        kept.pop("layers_to_transform")
        kept.pop("layers_pattern", None)
    if kept.get("d_initial") == 0:  # where d started does not matter any more
        kept.pop("d_initial")
    try:
        return VeraConfig(projection="peft", modules_to_save=values.get("modules_to_save") or [], **kept)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None


def check_numbers(path: Path, values: dict[str, Any]) -> None:
    """Raise CheckpointError unless a configuration has what decides the projections: a default may be another."""
    for name in ("r", "projection_prng_key"):
        if type(values.get(name)) is not int:
            raise CheckpointError(f"{path}: {name}={values.get(name)!r} is not an integer")


def sort_tensors(
    origin: str, config: VeraConfig, tensors: dict[str, Tensor], modules: Mapping[str, nn.Module]
) -> LoadedAdapter:
    """Sort a file's tensors into vectors, saved modules and biases, by looking up each whole name in the model."""
    saved_names = peft_saved(modules, config.modules_to_save or [])
    biases = bias_first_names(
        (name, module if isinstance(module, SavedModule) else unwrapped(module)) for name, module in modules.items()
    )
    vectors: dict[str, dict[str, Tensor]] = {}
    loaded = LoadedAdapter(origin, config, {})
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{origin}: {key!r} does not begin with {PREFIX!r}, as PEFT's names do")
        name = key.removeprefix(PREFIX)
        parent, _, last = name.rpartition(".")
        bias_name = name.removesuffix(".base_layer.bias") + ".bias" if name.endswith(".base_layer.bias") else name
        owner = next((module for module in saved_names if name.startswith(f"{module}.")), None)
        if last in ("vera_lambda_b", "vera_lambda_d"):
            vectors.setdefault(parent, {})[last] = tensor
        elif owner is not None:
            inside = name.removeprefix(f"{owner}.")
            # With bias="all" PEFT writes the biases of its own wrapper around a saved module as well.
            if not (config.bias == "all" and last == "bias" and inside.startswith(_WRAPPER_PARTS)):
                loaded.saved.setdefault(owner, {})[inside] = tensor
        elif bias_name in biases:
            loaded.biases[biases[bias_name]] = tensor
        else:
            raise CheckpointError(f"{origin}: {key!r} belongs to nothing that this {type(modules['']).__name__} has")
    for name, pair in vectors.items():
        if len(pair) != 2:
            raise CheckpointError(f"{origin}: {name} has one of its two vectors only")
        loaded.vectors[name] = (pair["vera_lambda_b"], pair["vera_lambda_d"])
    if not loaded.vectors:
        raise CheckpointError(f"{origin} adapts no layer")
    return loaded


def _check_shapes(origin: str, config: VeraConfig, targets: list[Target], a: Tensor, b: Tensor) -> None:
    """Raise CheckpointError for stored projections that are none for these layers."""
    max_in = max(target.in_features for target in targets)
    max_out = max(target.out_features for target in targets)
    fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] == config.r
    if not fits or a.shape[1] < max_in or b.shape[0] < max_out:
        raise CheckpointError(
            f"{origin}: its projections have the shapes {tuple(a.shape)} and {tuple(b.shape)}, but r is {config.r} and"
            f" the widest layers need ({config.r}, {max_in}) and ({max_out}, {config.r})"
        )
    if not a.dtype.is_floating_point or not b.dtype.is_floating_point:
        raise CheckpointError(f"{origin}: its projections are {a.dtype} and {b.dtype}, not floating")


def _stored_source(config: VeraConfig, targets: list[Target], a: Tensor, b: Tensor) -> Scheme:
    """Return the stored projections, or the drawn ones where those have the same bits."""
    stored = Stored.from_tensors(a, b)
    drawn = PeftShared(config.projection_prng_key, config.r, a.shape[1], b.shape[0])
    sides: tuple[tuple[Side, Tensor], ...] = (("A", stored.a), ("B", stored.b))
    same = drawn == make_scheme(config, targets) and all(
        torch.equal(drawn.draw(side, range(config.r), kept.shape[1], torch.device("cpu")), kept) for side, kept in sides
    )
    return drawn if same else stored


# Writing


def export_peft(host: AdaptedModel, adapter_name: str, directory: Path, *, save_projection: bool | None = None) -> None:
    """Write an adapter so that the `peft` package (`PeftModel.from_pretrained`) computes the same outputs.

    An adapter of the per_dimension scheme is written with projections: PEFT's one A and B are then the views of the
    same random matrix, and what the widths' scales differ by goes into each d. Layers of a smaller rank than the
    largest get zeros behind their d.

    Args:
        host: the model.
        adapter_name: which adapter.
        directory: where to; files there are replaced.
        save_projection: whether to write A and B; None takes them along where PEFT could not draw them again.

    Raises:
        ValueError: `save_projection` is False and PEFT could not draw the projections again.
    """
    config, scheme = host.peft_config[adapter_name], host.projection_scheme(adapter_name)
    drawable = scheme.drawn_by_peft
    if save_projection is None:
        save_projection = config.save_projection or not drawable
    if not save_projection and not drawable:
        raise ValueError(
            f"save_projection=False is not allowed here: PEFT cannot draw the projections of adapter {adapter_name!r}"
            f" (projection={config.projection!r}) from its key"
        )
    if scheme.scale_in_shared_pair(1, 1, 1, 1) is None:
        raise ValueError(
            f"PEFT's VeRA cannot hold projections of the scheme {scheme.name!r}: it has one A and one B for all layers."
            " Use export_lora, which is exact, or merge the adapter"
        )
    layers = {name: layer for name, layer in host.vera_layers().items() if adapter_name in layer.entries}
    for name, layer in layers.items():
        if not isinstance(layer, VeraLinear) or layer.entries[adapter_name].parts:
            raise ValueError(
                f"PEFT's VeRA cannot hold the adapter on {name} ({layer.kind}"
                f"{' in parts' if layer.entries[adapter_name].parts else ''}): it adapts whole linear layers only. Use"
                " export_lora, or merge the adapter"
            )
    check_called(host.base_model, layers, "PEFT's VeRA")
    shared = _shared_projections(scheme, layers, adapter_name)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        b, d = layer.vectors(adapter_name)
        tensors[f"{PREFIX}{name}.vera_lambda_b"] = b.float()
        tensors[f"{PREFIX}{name}.vera_lambda_d"] = _peft_d(d, scheme, layer, shared)
    if save_projection:
        tensors[A_KEY], tensors[B_KEY] = shared
    tensors |= other_tensors(host, adapter_name)
    values = common_values(host, adapter_name) | {
        "peft_type": PEFT_VERA,
        "r": shared[0].shape[0],
        "d_initial": config.d_initial,
        "vera_dropout": config.vera_dropout,
        "bias": config.bias,
        "projection_prng_key": config.projection_prng_key,
        "save_projection": save_projection,
        "init_weights": True,
    }
    write_pair(directory, tensors, values)


def _shared_projections(scheme: Scheme, layers: dict[str, VeraLayer], adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return PEFT's A (r, max_in) and B (max_out, r) that the layers' projections are views of, up to scales."""
    rank = max(layer.entries[adapter_name].rank for layer in layers.values())
    max_in = max(layer.in_features for layer in layers.values())
    max_out = max(layer.out_features for layer in layers.values())
    cpu = torch.device("cpu")
    a = scheme.draw("A", range(rank), scheme.storage_width("A", max_in), cpu)[:, :max_in]
    b = scheme.draw("B", range(rank), scheme.storage_width("B", max_out), cpu)[:, :max_out]
    return a.contiguous(), b.t().contiguous() * scheme.scale(rank)


def _peft_d(d: Tensor, scheme: Scheme, layer: VeraLayer, shared: tuple[Tensor, Tensor]) -> Tensor:
    """Return d for PEFT's A and B: times what this layer's projections differ from them by, zeros up to their rank."""
    rank, widest = shared[0].shape
    d = d.detach().double()
    scale = scheme.scale_in_shared_pair(layer.in_features, d.shape[0], widest, rank)
    assert scale is not None
    d = d * scale
    padded = torch.zeros(rank, dtype=torch.float64, device=d.device)
    padded[: d.shape[0]] = d
    return padded.float()


def other_tensors(host: AdaptedModel, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's saved modules and biases under PEFT's names.

    Raises:
        ValueError: PEFT would train a module in full that this adapter adapts.
    """
    state = host.adapter_state(adapter_name)
    modules = base_modules(host.base_model)
    adapted = {f"{name}.bias" if name else "bias": name for name in state.vectors}
    tensors: dict[str, Tensor] = {}
    for name in peft_saved(modules, list(state.saved)):
        within = [layer for layer in state.vectors if layer == name or layer.startswith(f"{name}.")]
        if within:
            raise ValueError(
                f"PEFT cannot hold this adapter: it would train {name} in full, whose name ends like one of"
                f" modules_to_save={list(state.saved)}, but {within[0]} is adapted"
            )
        # A module that PEFT takes for a saved one goes along with the weights it has.
        module = modules[name]
        own = state.saved.get(name, module.original_module if isinstance(module, SavedModule) else module)
        for key, tensor in own.state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = tensor
    for name, bias in state.biases.items():
        layer = adapted.get(name)
        key = name if layer is None else f"{layer}.base_layer.bias" if layer else "base_layer.bias"
        tensors[PREFIX + key] = bias
    return tensors


def common_values(host: AdaptedModel, adapter_name: str, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Return the entries that PEFT's configurations of VeRA and of LoRA have in common.

    Args:
        host: the model.
        adapter_name: which adapter.
        leave_out: layers that target_modules does not name.
    """
    config = host.peft_config[adapter_name]
    layers = host.vera_layers()
    names = [
        name
        for name, layer in layers.items()
        if adapter_name in layer.entries and not isinstance(layer, VeraParameter) and name not in leave_out
    ]
    base = type(without_wrappers(host.base_model))
    return {
        "auto_mapping": {"base_model_class": base.__name__, "parent_library": base.__module__},
        "base_model_name_or_path": config.base_model_name_or_path,
        "fan_in_fan_out": any(is_conv1d(layers[name].base_layer) for name in names),
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": config.modules_to_save or None,
        "revision": config.revision,
        "target_modules": exact_targets(host.base_model, names, config.target_modules),
        "task_type": None if _adds_heads(host, config) else config.task_type,
    }


def _adds_heads(host: AdaptedModel, config: VeraConfig) -> bool:
    """Return whether PEFT would train a head in full for this task that the adapter does not save."""
    if config.task_type not in TASK_HEADS:
        return False
    heads = peft_saved(base_modules(host.base_model), TASK_HEADS[config.task_type])
    return not set(heads) <= set(peft_saved(base_modules(host.base_model), config.modules_to_save or []))


def exact_targets(model: nn.Module, names: list[str], own: list[str] | str | None) -> list[str] | str:
    """Return target_modules that name exactly these layers under PEFT's rules, the user's own where they do.

    Args:
        model: the model without a wrapper.
        names: the layers' names.
        own: the user's target_modules.
    """
    if not names:
        return []
    everything = [name for name in base_modules(model) if name]
    for listed in (own, names):
        if isinstance(listed, list) and list(filter(matcher(listed), everything)) == names:
            return listed
    # A layer's whole name may also be the end of another's; a regular expression matches whole names only.
    return "|".join(re.escape(name) for name in names)
