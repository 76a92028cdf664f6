"""Read VeRA files written by the `peft` package, with equal outputs."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veratune.adapters.adapted_model import AdaptedModel
from veratune.adapters.names import unwrapped
from veratune.adapters.plan import make_scheme
from veratune.adapters.target import Target
from veratune.adapters.targets import configured_names
from veratune.checkpoint.base import AdapterContents, AdapterFiles, Format
from veratune.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, CheckpointError
from veratune.checkpoint.peft_rules import A_KEY, B_KEY, PEFT_VERA, PREFIX, peft_saved
from veratune.checkpoint.peft_writing import export_peft
from veratune.checkpoint.validate import LoadedAdapter, ReadyAdapter, check_vectors, make_ready, targets_of
from veratune.config import VeraConfig
from veratune.config_fields import TASK_TYPES
from veratune.layers import SavedModule
from veratune.layers.biases import bias_first_names
from veratune.layers.entries import VECTOR_PREFIX
from veratune.projections.schemes import PeftShared, Scheme, Side, Stored
from veratune.utils.patterns import Budget, PatternError

# Regular expressions from a file are only matched to find missing layers; this many steps take about a second.
_STEPS_FOR_A_FILE = 3_000_000

_WRAPPER_PARTS = ("original_module.", "modules_to_save.")

# modules_to_save is read separately: null in PEFT's file means that no module is trained in full.
_SAME_FIELDS = {*VeraConfig.names_with(peft="vera"), "base_model_name_or_path", "revision"} - {"modules_to_save"}


# PEFT stores the task rather than the class, and the number of labels only in the shape of the last layer.
_HEADS = ("classifier.weight", "score.weight", "out_proj.weight", "qa_outputs.weight")


class PeftFiles(Format):
    """The two files that the `peft` package writes: tensors, and a configuration with the adapter type."""

    peft_type: ClassVar[str]

    def detect(self, files: AdapterFiles) -> bool:
        return bool(files.peft_type == self.peft_type)

    @abstractmethod
    def contents(self, files: AdapterFiles) -> AdapterContents: ...

    def base(self, files: AdapterFiles) -> dict[str, Any]:
        import transformers

        contents = self.contents(files)
        task = contents.config.get("task_type")
        known = TASK_TYPES.get(task) if isinstance(task, str) else None
        named = (None if known is None else known.model) or contents.base.get("class")
        if named is None or not hasattr(transformers, named):
            return {}
        rows = [
            tensor.shape[0] for name, tensor in contents.others.items() if name.endswith(_HEADS) and tensor.ndim == 2
        ]
        labels = {str(number): f"LABEL_{number}" for number in range(rows[-1])} if rows else {}
        return {"class": named, "id2label": labels}


class PeftFormat(PeftFiles):
    """PEFT's VeRA format."""

    name = "peft"
    peft_type = PEFT_VERA
    about = "a VeRA adapter in PEFT's format, which veratune loads; veratune convert writes it in veratune's format"

    def read(self, modules: Mapping[str, nn.Module], files: AdapterFiles) -> ReadyAdapter:
        config = _config(files.directory / CONFIG_NAME, files.config or {})
        return files.ready(
            lambda tensors, sizes_only: _ready(modules, files.directory, config, tensors, sizes_only=sizes_only)
        )

    def contents(self, files: AdapterFiles) -> AdapterContents:
        path, config, tensors = files.weights.path, files.config or {}, files.weights.tensors()
        projections = {key.rpartition("_")[2]: tensors.pop(key) for key in (A_KEY, B_KEY) if key in tensors}
        vectors: dict[str, dict[str, Tensor]] = {}
        others: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            layer, _, last = key.removeprefix(PREFIX).rpartition(".")
            if last.startswith(VECTOR_PREFIX):
                vectors.setdefault(layer, {})[last.removeprefix(VECTOR_PREFIX)] = tensor
            else:
                others[key.removeprefix(PREFIX)] = tensor
        check_vectors(str(path), vectors)
        return AdapterContents(path, self.name, config, vectors, others, projections, base=named_class(config))

    def write(self, host: AdaptedModel, adapter_name: str, directory: Path) -> None:
        export_peft(host, adapter_name, directory)


def named_class(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base model's class, which PEFT stores in a configuration without a task."""
    mapping = config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return {"class": named} if isinstance(named, str) and named else {}


def _ready(
    modules: Mapping[str, nn.Module],
    directory: Path,
    config: VeraConfig,
    tensors: dict[str, Tensor],
    *,
    sizes_only: bool,
) -> ReadyAdapter:
    """Check an adapter against its configuration and a model; with `sizes_only`, only its names and shapes."""
    path = directory / WEIGHTS_NAME
    tensors = dict(tensors)
    a, b = tensors.pop(A_KEY, None), tensors.pop(B_KEY, None)
    if (a is None) != (b is None):
        raise CheckpointError(f"{path} has only one of {A_KEY} and {B_KEY}")
    if config.save_projection and a is None:
        raise CheckpointError(f"{path}: save_projection is true in {CONFIG_NAME}, but the file has no projections")
    loaded = _sort_tensors(str(path), config, tensors, modules)
    targets = targets_of(modules, loaded)
    _check_complete(loaded, modules)
    for target in targets:
        if target.r != config.r:
            raise CheckpointError(f"{path}: d of {target.name} has {target.r} elements, but r is {config.r}")
    scheme = make_scheme(config, targets)
    if a is not None and b is not None:
        _check_shapes(str(path), config, targets, a, b)
        if not sizes_only:
            scheme = _stored_scheme(config, targets, a, b)
    return make_ready(modules, loaded, targets, scheme)


def _check_complete(loaded: LoadedAdapter, modules: Mapping[str, nn.Module]) -> None:
    """Raise CheckpointError if layers or saved modules that the configuration names are missing from the file.

    If projections are redrawn, a missing layer may change the shapes of all other layers' projections.
    """
    config = loaded.config
    if config.target_modules not in (None, "all-linear"):
        try:
            named = configured_names(modules, config, Budget(_STEPS_FOR_A_FILE))
        except PatternError as error:
            raise CheckpointError(
                f"{loaded.origin}: target_modules={config.target_modules!r} cannot be checked against the file: {error}"
            ) from None
        missing = [name for name in named if name not in loaded.vectors]
        missing = [name for name in missing if not any(f"{name}.".startswith(f"{top}.") for top in loaded.saved)]
        if missing:
            raise CheckpointError(
                f"{loaded.origin} has no vectors for {missing[0]} (one of {len(missing)} such layers), which"
                f" target_modules={config.target_modules!r} selects"
            )
    for name in peft_saved(modules, config.modules_to_save or []):
        if name not in loaded.saved and next(modules[name].parameters(), None) is not None:
            raise CheckpointError(f"{loaded.origin} has no weights for {name}, which modules_to_save names")


def _config(path: Path, values: dict[str, Any]) -> VeraConfig:
    kept = {name: values[name] for name in _SAME_FIELDS if values.get(name) is not None}
    _check_numbers(path, values)
    for name, allowed in (("task_type", str), ("modules_to_save", list)):
        if not isinstance(values.get(name), allowed | None):
            raise CheckpointError(f"{path}: {name}={values[name]!r} is not {allowed.__name__} or null")
    if values.get("task_type") is not None:
        kept["task_type"] = values["task_type"]
    # VeraConfig rejects layers_to_transform together with a regular expression. The adapted layers are read from the
    # tensors, so this can be dropped.
    if isinstance(kept.get("target_modules"), str) and "layers_to_transform" in kept:
        kept.pop("layers_to_transform")
        kept.pop("layers_pattern", None)
    if kept.get("d_initial") == 0:  # d's initial value no longer matters
        kept.pop("d_initial")
    try:
        return VeraConfig(projection="peft", modules_to_save=values.get("modules_to_save") or [], **kept)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None


def _check_numbers(path: Path, values: dict[str, Any]) -> None:
    """Raise CheckpointError unless the configuration states r and the key: defaults may differ."""
    for name in ("r", "projection_prng_key"):
        if type(values.get(name)) is not int:
            raise CheckpointError(f"{path}: {name}={values.get(name)!r} is not an integer")


def _sort_tensors(
    origin: str, config: VeraConfig, tensors: dict[str, Tensor], modules: Mapping[str, nn.Module]
) -> LoadedAdapter:
    """Sort a file's tensors into vectors, saved modules and biases, by looking up each full name in the model."""
    saved_names = peft_saved(modules, config.modules_to_save or [])
    biases = bias_first_names(
        (name, module if isinstance(module, SavedModule) else unwrapped(module)) for name, module in modules.items()
    )
    loaded = LoadedAdapter({}, origin=origin, config=config)
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{origin}: {key!r} does not start with {PREFIX!r}, as PEFT's names do")
        name = key.removeprefix(PREFIX)
        parent, _, last = name.rpartition(".")
        bias_name = name.removesuffix(".base_layer.bias") + ".bias" if name.endswith(".base_layer.bias") else name
        owner = next((module for module in saved_names if name.startswith(f"{module}.")), None)
        if last.startswith(VECTOR_PREFIX):
            loaded.vectors.setdefault(parent, {})[last.removeprefix(VECTOR_PREFIX)] = tensor
        elif owner is not None:
            inside = name.removeprefix(f"{owner}.")
            # With bias="all" PEFT also writes the biases of its wrapper around a saved module.
            if not (config.bias == "all" and last == "bias" and inside.startswith(_WRAPPER_PARTS)):
                loaded.saved.setdefault(owner, {})[inside] = tensor
        elif bias_name in biases:
            loaded.biases[biases[bias_name]] = tensor
        else:
            raise CheckpointError(
                f"{origin}: {key!r} matches no module or parameter of this {type(modules['']).__name__}"
            )
    check_vectors(origin, loaded.vectors)
    return loaded


def _check_shapes(origin: str, config: VeraConfig, targets: list[Target], a: Tensor, b: Tensor) -> None:
    """Raise CheckpointError for stored projections that do not fit these layers."""
    max_in = max(target.in_features for target in targets)
    max_out = max(target.out_features for target in targets)
    fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] == config.r
    if not fits or a.shape[1] < max_in or b.shape[0] < max_out:
        raise CheckpointError(
            f"{origin}: its projections have shapes {tuple(a.shape)} and {tuple(b.shape)}, but r is {config.r} and"
            f" the widest layers need ({config.r}, {max_in}) and ({max_out}, {config.r})"
        )
    if not a.dtype.is_floating_point or not b.dtype.is_floating_point:
        raise CheckpointError(f"{origin}: its projections are {a.dtype} and {b.dtype}, not floating-point")


def _stored_scheme(config: VeraConfig, targets: list[Target], a: Tensor, b: Tensor) -> Scheme:
    """Return the stored projections, or the scheme that draws them if it reproduces them bit for bit."""
    stored = Stored.from_tensors(a, b)
    drawn = PeftShared(config.projection_prng_key, config.r, a.shape[1], b.shape[0])
    sides: tuple[tuple[Side, Tensor], ...] = (("A", stored.a), ("B", stored.b))
    same = drawn == make_scheme(config, targets) and all(
        torch.equal(drawn.draw(side, range(config.r), kept.shape[1], torch.device("cpu")), kept) for side, kept in sides
    )
    return drawn if same else stored
