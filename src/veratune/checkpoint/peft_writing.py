"""Write VeRA files with which the `peft` package computes the same outputs."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veratune.adapters.adapted_model import AdaptedModel
from veratune.adapters.names import base_modules, public_state, without_wrappers
from veratune.checkpoint.files import write_pair
from veratune.checkpoint.peft_rules import (
    A_KEY,
    B_KEY,
    PEFT_VERA,
    PREFIX,
    check_called,
    check_places,
    exact_targets,
    peft_saved,
)
from veratune.config import VeraConfig
from veratune.config_fields import heads_of
from veratune.layers import SavedModule, VeraLayer
from veratune.layers.entries import VECTOR_PREFIX
from veratune.projections.schemes import Scheme


def export_peft(host: AdaptedModel, adapter_name: str, directory: Path, *, save_projection: bool | None = None) -> None:
    """Write an adapter so that the `peft` package (`PeftModel.from_pretrained`) computes the same outputs.

    An adapter with the per_dimension scheme is written with projections: PEFT's single A and B are then views of the
    same random matrix, and the ratio of the layers' scales is multiplied into each d. The d of layers with a smaller
    rank is padded with zeros.

    Args:
        host: the model.
        adapter_name: the adapter's name.
        directory: the directory; files there are replaced.
        save_projection: whether to write A and B; None to write them if the configuration says so, or if PEFT cannot
            redraw them.

    Raises:
        ValueError: PEFT cannot hold the adapter, or `save_projection` is False and PEFT cannot redraw the projections.
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
        if "peft" not in layer.exports or layer.entries[adapter_name].parts:
            raise ValueError(
                f"PEFT's VeRA cannot hold the adapter on {name} ({layer.kind}"
                f"{' in parts' if layer.entries[adapter_name].parts else ''}): it only adapts unfused linear layers."
                " Use export_lora, or merge the adapter"
            )
    check_called(host.base_model, layers, "PEFT's VeRA")
    check_places(host.base_model, layers, "PEFT's VeRA")
    shared = _shared_projections(scheme, layers, adapter_name)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        vectors = layer.vectors(adapter_name)
        own = {"b": vectors["b"].float(), "d": _peft_d(vectors["d"], scheme, layer, shared)}
        tensors |= {f"{PREFIX}{name}.{VECTOR_PREFIX}{which}": vector for which, vector in own.items()}
    if save_projection:
        tensors[A_KEY], tensors[B_KEY] = shared
    tensors |= other_tensors(host, adapter_name)
    same = {name: getattr(config, name) for name in VeraConfig.names_with(peft="vera", selects=False)}
    written = {"r": shared[0].shape[0], "save_projection": save_projection, "init_weights": True}
    values = common_values(host, adapter_name) | {"peft_type": PEFT_VERA, **same, **written}
    write_pair(directory, tensors, values)


def _shared_projections(scheme: Scheme, layers: dict[str, VeraLayer], adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return PEFT's A (r, max_in) and B (max_out, r), of which the layers' projections are views, up to a scale."""
    rank = max(layer.entries[adapter_name].r for layer in layers.values())
    max_in = max(layer.in_features for layer in layers.values())
    max_out = max(layer.out_features for layer in layers.values())
    cpu = torch.device("cpu")
    a = scheme.draw("A", range(rank), scheme.storage_width("A", max_in), cpu)[:, :max_in]
    b = scheme.draw("B", range(rank), scheme.storage_width("B", max_out), cpu)[:, :max_out]
    return a.contiguous(), b.t().contiguous() * scheme.scale(rank)


def _peft_d(d: Tensor, scheme: Scheme, layer: VeraLayer, shared: tuple[Tensor, Tensor]) -> Tensor:
    """Return d for PEFT's A and B: scaled by their ratio to this layer's projections, and padded to their rank."""
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
                f"PEFT cannot hold this adapter: it would train {name} in full, because its name ends in one of"
                f" modules_to_save={list(state.saved)}, but {within[0]} is adapted"
            )
        # If PEFT treats another module as saved, write its current weights.
        module = modules[name]
        saved = state.saved.get(name)
        if saved is None:
            saved = public_state(module.original_module if isinstance(module, SavedModule) else module)
        tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in saved.items()}
    for name, bias in state.biases.items():
        layer = adapted.get(name)
        key = name if layer is None else f"{layer}.base_layer.bias" if layer else "base_layer.bias"
        tensors[PREFIX + key] = bias
    return tensors


def common_values(host: AdaptedModel, adapter_name: str, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Return the entries that PEFT's VeRA and LoRA configurations have in common.

    Args:
        host: the model.
        adapter_name: the adapter's name.
        leave_out: layers to omit from target_modules.
    """
    config = host.peft_config[adapter_name]
    layers = host.vera_layers()
    names = [
        name
        for name, layer in layers.items()
        if adapter_name in layer.entries and not layer.of_parameter and name not in leave_out
    ]
    base = type(without_wrappers(host.base_model))
    return {
        "auto_mapping": {"base_model_class": base.__name__, "parent_library": base.__module__},
        "base_model_name_or_path": config.base_model_name_or_path,
        "fan_in_fan_out": any(layers[name].out_axis == 1 for name in names),
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": config.modules_to_save or None,
        "revision": config.revision,
        "target_modules": exact_targets(host.base_model, names, config.target_modules),
        "task_type": None if _adds_heads(host, config) else config.task_type,
    }


def _adds_heads(host: AdaptedModel, config: VeraConfig) -> bool:
    """Return whether PEFT would train a module in full for this task that the adapter does not save."""
    if not heads_of(config.task_type):
        return False
    heads = peft_saved(base_modules(host.base_model), heads_of(config.task_type))
    return not set(heads) <= set(peft_saved(base_modules(host.base_model), config.modules_to_save or []))
