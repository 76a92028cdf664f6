"""veratune's own file format: one safetensors file with a complete adapter, and a JSON copy of its configuration.

`adapter_model.safetensors` has these tensors (names of layers and modules are those in the model without adapters):

    vera_lambda_b.<layer>              b, (out,)
    vera_lambda_d.<layer>              d, (r,)
    modules_to_save.<module>.<key>     a module trained in full
    bias.<parameter>                   a trained bias
    projection.A[.<width>]             A (r, width), only with save_projection or projections read from a file
    projection.B[.<width>]             B (width, r), likewise

and, in its metadata, the JSON object "veratune": format version, configuration, fingerprint of the projections, and a
SHA-256 of all of this and the tensors. The file holds everything needed for loading, so replacing it is one atomic
step. `adapter_config.json` is for humans and for programs that expect it, such as `peft`, which reads and writes the
same files with veratune's plug-in.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veratune.adapters.adapted_model import AdaptedModel
from veratune.adapters.adapter_state import AdapterState
from veratune.adapters.names import without_wrappers
from veratune.adapters.plan import make_scheme
from veratune.adapters.target import Target
from veratune.checkpoint.base import AdapterContents, AdapterFiles, Format, open_adapter
from veratune.checkpoint.base_model import check_labels, describe_base
from veratune.checkpoint.files import (
    CONFIG_NAME,
    LARGEST_CONFIG,
    WEIGHTS_NAME,
    CheckpointError,
    gathered,
    read_json,
    write_json,
    write_tensors,
)
from veratune.checkpoint.native_header import FORMAT_VERSION, METADATA_KEY, checked_header, digest_of
from veratune.checkpoint.validate import (
    LoadedAdapter,
    ReadyAdapter,
    check_vectors,
    make_ready,
    other_projections,
    targets_of,
)
from veratune.config import PEFT_TYPE, VeraConfig
from veratune.layers import VeraLayer
from veratune.layers.entries import VECTOR_PREFIX, VECTORS
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import Scheme, Side, Stored
from veratune.utils.tensors import is_finite
from veratune.utils.text import notify

# Fields that may differ between the two copies of the configuration without a warning: they do not affect the adapter.
_INFORMATIVE = {"peft_type", *VeraConfig.names_with(peft="any")}


class NativeFormat(Format):
    """veratune's own format."""

    name = "veratune"

    def detect(self, files: AdapterFiles) -> bool:
        # The tensors file is complete without the JSON file; PEFT's is not.
        return METADATA_KEY in files.weights.metadata or files.config is None or files.peft_type == PEFT_TYPE

    def read(self, modules: Mapping[str, nn.Module], files: AdapterFiles) -> ReadyAdapter:
        metadata = files.weights.metadata
        return files.ready(
            lambda tensors, sizes_only: _ready(modules, files.directory, tensors, metadata, sizes_only=sizes_only)
        )

    def contents(self, files: AdapterFiles) -> AdapterContents:
        loaded = _read(files)
        saved = {f"{module}.{key}": t for module, tensors in loaded.saved.items() for key, t in tensors.items()}
        return AdapterContents(
            path=files.weights.path,
            format=self.name,
            config=loaded.config.to_dict(),
            vectors=loaded.vectors,
            others=saved | loaded.biases,
            projections=loaded.projections,
            fingerprint=loaded.header["fingerprint"],
            base=loaded.header.get("base", {}),
            format_version=loaded.header["format_version"],
        )

    def write(self, host: AdaptedModel, adapter_name: str, directory: Path) -> None:
        save_native(host, adapter_name, directory)


def save_native(host: AdaptedModel, adapter_name: str, directory: Path, *, write: bool = True) -> None:
    """Write one adapter to a directory, replacing any adapter in it.

    Args:
        host: the model.
        adapter_name: the adapter's name.
        directory: the directory.
        write: if False, only take part in gathering sharded parameters, which all processes must do.
    """
    tensors = {name: gathered(tensor) for name, tensor in file_tensors(host.adapter_state(adapter_name)).items()}
    if write:
        layers = {name: layer for name, layer in host.vera_layers().items() if adapter_name in layer.entries}
        config, scheme = host.peft_config[adapter_name], host.projection_scheme(adapter_name)
        write_native(directory, adapter_name, host.base_model, config, scheme, layers, tensors)


def write_native(
    directory: Path,
    adapter_name: str,
    model: nn.Module,
    config: VeraConfig,
    scheme: Scheme,
    layers: Mapping[str, VeraLayer],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write one adapter's tensors to a directory, replacing any adapter in it.

    Args:
        directory: the directory.
        adapter_name: the adapter's name.
        model: the model without a wrapper.
        config: the adapter's configuration.
        scheme: its projections.
        layers: the layers that it adapts, by name.
        tensors: the result of `file_tensors`.
    """
    tensors = dict(tensors)
    if not all(map(is_finite, tensors.values())):
        notify(f"adapter {adapter_name!r} contains NaN or infinity because training diverged; it is saved as is")
    if config.save_projection or isinstance(scheme, Stored):
        tensors |= _projection_tensors(layers, adapter_name, scheme)
    config = config.replace(inference_mode=True)
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "fingerprint": scheme.fingerprint(),
        "base": describe_base(model),
        "inputs": {name: layer.in_features for name, layer in layers.items() if not layer.one_hot},
    }
    header["sha256"] = digest_of(header, tensors)
    metadata = {"format": "pt", METADATA_KEY: json.dumps(header)}
    write_tensors(directory / WEIGHTS_NAME, tensors, metadata)
    base = type(without_wrappers(model))
    shown = {
        "fingerprint": scheme.fingerprint(),
        "base": header["base"],
        # For PEFT's AutoPeftModel.
        "auto_mapping": {"base_model_class": base.__name__, "parent_library": base.__module__},
    }
    write_json(directory / CONFIG_NAME, {**config.to_dict(), **shown})


def file_tensors(state: AdapterState) -> dict[str, Tensor]:
    """Return an adapter's tensors by their names in a file, without projections."""
    tensors: dict[str, Tensor] = {}
    for name, own in state.vectors.items():
        tensors |= {f"{VECTOR_PREFIX}{which}.{name}": vector for which, vector in own.items()}
    for name, saved in state.saved.items():
        tensors |= {f"modules_to_save.{name}.{key}": tensor for key, tensor in saved.items()}
    return tensors | {f"bias.{name}": bias for name, bias in state.biases.items()}


def _ready(
    modules: Mapping[str, nn.Module],
    directory: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    *,
    sizes_only: bool,
) -> ReadyAdapter:
    """Check an adapter against a model; with `sizes_only`, only its names and shapes."""
    loaded = _checked(directory, tensors, metadata, sizes_only=sizes_only)
    targets = native_targets(modules, loaded)
    scheme = make_scheme(loaded.config, targets) if sizes_only else native_scheme(loaded, targets)
    return make_ready(modules, loaded, targets, scheme)


def native_targets(modules: Mapping[str, nn.Module], loaded: LoadedAdapter) -> list[Target]:
    """Find the layers of an adapter from a file in a model, and check names and shapes.

    Raises:
        CheckpointError: the adapter is for another model.
    """
    inputs = loaded.header.get("inputs", {})
    targets = targets_of(modules, loaded)
    _check_ranks(loaded, targets)
    _check_shapes(loaded.origin, targets, loaded.projections)
    for target in targets:
        if inputs.get(target.name, target.in_features) != target.in_features:
            raise CheckpointError(
                f"{loaded.origin}: {target.name} had {inputs[target.name]} inputs when the adapter was trained, but"
                f" has {target.in_features} here: the adapter is for a model with other dimensions"
            )
    return targets


def native_scheme(loaded: LoadedAdapter, targets: list[Target]) -> Scheme:
    """Return the projections of an adapter from a file, after checking that it was trained with them.

    Raises:
        CheckpointError: it was trained with other projections.
    """
    config, fingerprint = loaded.config, loaded.header["fingerprint"]
    scheme = make_scheme(config, targets)
    if scheme.fingerprint() == fingerprint:
        _check_projections(loaded.origin, scheme, loaded.projections)
        return scheme
    if config.projection == "peft" and loaded.projections.keys() == {"A", "B"}:
        stored = Stored.from_tensors(loaded.projections["A"], loaded.projections["B"])
        if stored.fingerprint() == fingerprint:
            return stored
    raise other_projections(loaded.origin, config, fingerprint, scheme.fingerprint())


def read_native(directory: Path) -> LoadedAdapter:
    """Read an adapter's files without a model.

    Raises:
        CheckpointError: the files cannot be used.
    """
    with open_adapter(directory) as files:
        return _read(files)


def _read(files: AdapterFiles) -> LoadedAdapter:
    return _checked(files.directory, files.weights.tensors(), files.weights.metadata)


def _checked(
    directory: Path, tensors: dict[str, Tensor], metadata: dict[str, str], *, sizes_only: bool = False
) -> LoadedAdapter:
    path = directory / WEIGHTS_NAME
    header = checked_header(path, metadata, None if sizes_only else tensors)
    try:
        config = VeraConfig.from_dict(header["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has an invalid configuration: {error}") from None
    _compare_with_json(directory / CONFIG_NAME, config)
    groups = _grouped(path, tensors)
    vectors: dict[str, dict[str, Tensor]] = {}
    for which in VECTORS:
        for name, vector in groups[VECTOR_PREFIX + which].items():
            vectors.setdefault(name, {})[which] = vector
    check_vectors(str(path), vectors)
    saved: dict[str, dict[str, Tensor]] = {name: {} for name in config.modules_to_save or []}
    for name, tensor in groups["modules_to_save"].items():
        owner = next((name[:i] for i, letter in enumerate(name) if letter == "." and name[:i] in saved), None)
        if owner is None:
            raise CheckpointError(
                f"{path}: {name} does not belong to any of modules_to_save={config.modules_to_save!r}"
            )
        saved[owner][name.removeprefix(f"{owner}.")] = tensor
    labels = check_labels(str(path), header.get("base", {}).get("id2label", {}))
    return LoadedAdapter(
        vectors,
        saved,
        groups["bias"],
        origin=str(path),
        config=config,
        projections=groups["projection"],
        labels=labels,
        header=header,
    )


def _projection_tensors(layers: Mapping[str, VeraLayer], adapter_name: str, scheme: Scheme) -> dict[str, Tensor]:
    """Return an adapter's projections in float32, as drawn: A (r, width), and B (width, r) without its scale."""
    widths: dict[tuple[Side, int], int] = {}
    for layer in layers.values():
        views = layer.entries[adapter_name].views
        # An embedding draws individual columns of A, never the full matrix.
        for view in views[1:] if layer.one_hot else views:
            key = (view.projection.side, view.projection.width)
            widths[key] = max(widths.get(key, 0), view.rank)
    tensors: dict[str, Tensor] = {}
    for (side, width), rank in widths.items():
        name = f"projection.{side}.{width}" if not scheme.one_rank_linear_only else f"projection.{side}"
        drawn = projection_pool.view(scheme, side, rank, width).drawn()
        tensors[name] = drawn if side == "A" else drawn.t()
    return tensors


def _grouped(path: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by the prefix of their names. The rest of a name is data and is not parsed."""
    groups: dict[str, dict[str, Tensor]] = {
        kind: {} for kind in (*(VECTOR_PREFIX + which for which in VECTORS), "modules_to_save", "bias", "projection")
    }
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind not in groups:
            raise CheckpointError(f"{path}: {key!r} has no known prefix; a key must start with one of {sorted(groups)}")
        groups[kind][name] = tensor
    return groups


def _compare_with_json(path: Path, config: VeraConfig) -> None:
    if not path.exists():
        return
    shown = read_json(path, largest=LARGEST_CONFIG)
    differing = [
        name for name, own in vars(config).items() if name not in _INFORMATIVE and name in shown and shown[name] != own
    ]
    if differing:
        notify(
            f"{path} differs from the configuration inside {WEIGHTS_NAME} in {differing}; the latter is used. An"
            " interrupted save can cause this. To change settings, load the adapter, change them and save it again"
        )


def _check_ranks(loaded: LoadedAdapter, targets: list[Target]) -> None:
    if loaded.config.projection == "peft":
        for target in targets:
            if target.r != loaded.config.r:
                raise CheckpointError(
                    f"{loaded.origin}: d of {target.name} has {target.r} elements, but the configuration says"
                    f" r={loaded.config.r}"
                )


def _check_shapes(origin: str, targets: list[Target], projections: dict[str, Tensor]) -> None:
    """Raise CheckpointError for stored projections with shapes that do not match these layers."""
    most_rank = max(target.r for target in targets)
    sizes = {"A": {target.in_features for target in targets}, "B": {target.out_features for target in targets}}
    sizes["B"] |= {size for target in targets for size in target.parts}
    for name, stored in projections.items():
        side, _, width = name.partition(".")
        shape = tuple(stored.shape)
        rank_major = shape if side == "A" else shape[::-1]
        fits = side in sizes and stored.ndim == 2 and rank_major[0] <= most_rank and rank_major[1] >= 1
        if width:
            fits = fits and width == str(rank_major[1]) and rank_major[1] in sizes[side]
        elif fits:  # PEFT's A and B may come from a model with wider layers
            fits = rank_major[0] == most_rank and rank_major[1] >= max(sizes[side])
        if not fits or not stored.dtype.is_floating_point:
            raise CheckpointError(
                f"{origin}: its projection {name} is {stored.dtype} with shape {shape}, which does not match its layers"
            )


def _check_projections(origin: str, scheme: Scheme, projections: dict[str, Tensor]) -> None:
    for name, stored in projections.items():
        side: Side = "A" if name.startswith("A") else "B"
        rank_major = stored if side == "A" else stored.t()
        drawn = projection_pool.view(scheme, side, *rank_major.shape).drawn()
        if drawn.dtype != rank_major.dtype or not torch.equal(drawn, rank_major):
            raise CheckpointError(f"{origin}: its projection {name} differs from the one drawn from its key here")
