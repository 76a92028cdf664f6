"""Check adapters read from files of any format against a model, and add them to the model.

A format's reader returns a `LoadedAdapter`; `targets_of` and `make_ready` check every name and shape against the model.
Only a `ReadyAdapter` is added to a model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from veratune.adapters.adapted_model import AdaptedModel
from veratune.adapters.adapter_set import saved_copies
from veratune.adapters.adapter_state import AdapterState
from veratune.adapters.names import load_public_state, public_state, unwrapped
from veratune.adapters.plan import AdapterPlan, modules_with_biases
from veratune.adapters.target import Target, TargetError, above_largest_rank, parts_of
from veratune.adapters.target_errors import check_conflicts, check_scheme
from veratune.checkpoint.files import CheckpointError
from veratune.config import VeraConfig
from veratune.layers import Geometry, VeraLayer
from veratune.layers.biases import bias_owners
from veratune.layers.entries import VECTORS
from veratune.layers.registry import geometry, parameter_layout, weight_name, why_not_adaptable, why_not_parameter
from veratune.projections.schemes import Scheme, Stored
from veratune.utils.sharding import is_engines, shape_of
from veratune.utils.tensors import is_finite
from veratune.utils.text import closest, notify, some


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter(AdapterState):
    """The tensors of an adapter as read from files, and everything else in the files.

    Attributes:
        origin: the file, for messages.
        config: the adapter's configuration.
        projections: the tensors A and B by their names in the file, if it has them.
        labels: class index to class name; empty if the file has no class names.
        header: the JSON object in the metadata of veratune's own file; empty for other formats.
    """

    origin: str
    config: VeraConfig
    projections: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)


def check_vectors(origin: str, vectors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise CheckpointError unless there are layers, and each has all of its vectors and no others."""
    if not vectors:
        raise CheckpointError(f"{origin} adapts no layers")
    for name, found in vectors.items():
        if found.keys() != set(VECTORS):
            raise CheckpointError(f"{origin}: {name} has the vectors {sorted(found)}, not {list(VECTORS)}")


def targets_of(modules: Mapping[str, nn.Module], loaded: LoadedAdapter) -> list[Target]:
    """Find a loaded adapter's layers in a model, and check names and shapes.

    Args:
        modules: the result of `base_modules` for the model.
        loaded: the adapter, as returned by a format's reader.

    Raises:
        CheckpointError: a layer is missing from the model, has other dimensions, or cannot be adapted.
    """
    found = {name: _module_and_parameter(name, modules) for name in loaded.vectors}
    missing = [name for name, owner in found.items() if owner is None]
    if missing:
        raise CheckpointError(
            f"{loaded.origin} adapts {len(missing)} layers that this {type(modules['']).__name__} does not have: "
            + some(missing)
            + _closest(missing[0], modules)
        )
    targets: list[Target] = []
    names: dict[tuple[int, str | None], str] = {}
    for name, owner in found.items():
        assert owner is not None
        module, parameter = owner
        b, d = (loaded.vectors[name][which] for which in VECTORS)
        size = _geometry(loaded.origin, name, module, parameter)
        twin = names.setdefault((id(module), parameter), name)
        if twin != name:
            raise CheckpointError(f"{loaded.origin} adapts {twin} and {name}, which are the same module in this model")
        base = unwrapped(module)
        weight = base._parameters.get(parameter or weight_name(base))
        if weight is not None and weight.is_meta and not hasattr(base, "_hf_hook"):
            raise CheckpointError(f"{name} is on the meta device: load the model's weights before loading an adapter")
        if is_engines(base):
            raise CheckpointError(
                f"{loaded.origin} cannot be loaded here: {name} is sharded across processes by DeepSpeed's ZeRO-3. Load"
                " adapters before deepspeed.initialize"
            )
        parts: tuple[int, ...] = ()
        if parameter is None and d.ndim == 2:
            try:
                parts = parts_of(name, size, loaded.config)
            except TargetError as error:
                raise CheckpointError(f"{loaded.origin}: {error}") from None
        if b.shape != size.b_shape:
            raise CheckpointError(
                f"{loaded.origin}: b of {name} has shape {tuple(b.shape)}, but the layer has {size.out_features}"
                f" outputs here, which requires {size.b_shape}: the adapter is for a model with other dimensions"
            )
        r = d.shape[-1] if d.ndim else 0
        if not b.dtype.is_floating_point or not d.dtype.is_floating_point:
            raise CheckpointError(f"{loaded.origin}: vectors of {name} are {b.dtype} and {d.dtype}, not floating-point")
        if r < 1 or d.shape != size.d_shape(r, parts):
            *leading, _ = size.d_shape(r, parts)
            expected = f"({leading[0]}, r)" if leading else "(r,)"
            raise CheckpointError(f"{loaded.origin}: d of {name} has shape {tuple(d.shape)}, not {expected}")
        targets.append(Target(name, module, parameter, r, size, parts))
    _check_ranks(loaded.origin, targets)
    return targets


def _check_ranks(origin: str, targets: list[Target]) -> None:
    if (found := above_largest_rank(targets)) is not None:
        large, most = found
        raise CheckpointError(
            f"{origin}: d of {large.name} has {large.r:,} elements, but the maximum rank for layers of these sizes"
            f" is {most:,}: projections of a larger rank would take many times the memory of the layers"
        )


def _module_and_parameter(name: str, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, str | None] | None:
    """Return the module of this name and None, or the owner of the parameter of this name and its name in the owner."""
    if name in modules:
        return modules[name], None
    owner, _, own = name.rpartition(".")
    if owner in modules and own in unwrapped(modules[owner])._parameters:
        return modules[owner], own
    return None


def _geometry(origin: str, name: str, module: nn.Module, parameter: str | None) -> Geometry:
    """Return the dimensions of the weight to adapt, or raise CheckpointError if it cannot be adapted."""
    if isinstance(module, VeraLayer) and parameter is None:
        return module.geometry  # checked when it was first adapted
    base = unwrapped(module)
    reason = why_not_adaptable(base) if parameter is None else why_not_parameter(base, parameter)
    if reason is not None:
        raise CheckpointError(f"{origin} adapts {name}, which cannot be adapted in this model, because {reason}")
    return geometry(base) if parameter is None else parameter_layout(base, parameter)[0]


def make_ready(
    modules: Mapping[str, nn.Module], loaded: LoadedAdapter, targets: list[Target], scheme: Scheme
) -> "ReadyAdapter":
    """Check a loaded adapter's saved modules and biases against a model, and return the adapter with its plan.

    Args:
        modules: the result of `base_modules` for the model.
        loaded: the adapter, as returned by a format's reader.
        targets: the result of `targets_of` for this model.
        scheme: the adapter's projections.

    Raises:
        CheckpointError: saved modules or biases do not fit the model.
    """
    try:
        check_scheme(loaded.config.projection, targets)
    except TargetError as error:
        raise CheckpointError(f"{loaded.origin}: {error}") from None
    try:
        check_conflicts(
            modules, [name for name in loaded.saved if name in modules], [target.name for target in targets]
        )
    except TargetError as error:
        raise CheckpointError(f"{loaded.origin} conflicts with the adapters already in the model: {error}") from None
    for module_name, state in loaded.saved.items():
        _check_saved(loaded.origin, modules, module_name, state)
    config, saved = loaded.config, list(loaded.saved)
    if config.modules_to_save != saved:
        config = config.replace(modules_to_save=saved)
    owners = bias_owners(modules_with_biases(modules, config, {target.name for target in targets}))
    check_keys(f"{loaded.origin} with bias={config.bias!r}", owners, loaded.biases)
    for name, bias in loaded.biases.items():
        own = owners[name][0]._parameters["bias"]
        assert own is not None
        shape = shape_of(own)
        if bias.shape != shape or not bias.is_floating_point():
            raise CheckpointError(
                f"{loaded.origin}: {name} is {bias.dtype} with shape {tuple(bias.shape)}, but this model requires"
                f" a floating-point bias with shape {tuple(shape)}"
            )
    return ReadyAdapter(loaded, AdapterPlan(config, targets, scheme, owners))


@dataclass(frozen=True)
class ReadyAdapter:
    """A loaded adapter that fits a model."""

    loaded: LoadedAdapter
    plan: AdapterPlan

    def put_on(self, host: AdaptedModel, name: str, *, frozen: bool) -> None:
        """Add the adapter, under an unused name, to the model it was checked against; `frozen` means inference only."""
        plan = replace(self.plan, config=self.plan.config.replace(inference_mode=frozen))
        with host.undone_on_error():
            try:
                host.install_adapter(name, plan)
            except ValueError as error:
                raise CheckpointError(f"{self.loaded.origin}: {error}") from error
            self.copy_into(host, name)

    def _warn_of_values(self) -> None:
        tensors = self.loaded.described()
        if isinstance(self.plan.scheme, Stored):
            tensors |= {"its projection A": self.plan.scheme.a, "its projection B": self.plan.scheme.b}
        found = next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)
        if found is not None:
            notify(
                f"{self.loaded.origin} contains NaN or infinity ({found}), so outputs will be NaN: training diverged."
                " Load an older checkpoint"
            )

    def check_equal_to(self, host: AdaptedModel, name: str) -> None:
        """Raise CheckpointError unless a model's adapter has the same layers, ranks, projections and saved modules."""
        state, origin = host.adapter_state(name), self.loaded.origin
        check_keys(f"{origin}, compared with adapter {name!r},", state.vectors, self.loaded.vectors)
        check_keys(
            f"{origin}, compared with the modules that adapter {name!r} trains in full,", state.saved, self.loaded.saved
        )
        check_keys(f"{origin}, compared with the biases of adapter {name!r},", state.biases, self.loaded.biases)
        for layer, vectors in self.loaded.vectors.items():
            shapes = {which: tuple(vector.shape) for which, vector in state.vectors[layer].items()}
            if {which: tuple(vector.shape) for which, vector in vectors.items()} != shapes:
                raise CheckpointError(
                    f"{origin}: the vectors of {layer} do not have the shapes {shapes} that they have in this model"
                )
        if self.plan.scheme != host.projection_scheme(name):
            raise CheckpointError(f"{origin}: adapter {name!r} has different projections in this model")

    def copy_into(self, host: AdaptedModel, name: str) -> None:
        """Copy the values into an adapter with the same layers and ranks."""
        self._warn_of_values()
        state, copies = host.adapter_state(name), saved_copies(host.base_model, name)
        with torch.no_grad():
            for layer_name, vectors in self.loaded.vectors.items():
                for which, value in vectors.items():
                    own = state.vectors[layer_name][which]
                    own.copy_(_sharded_like(value, own))
            for module_name, tensors in self.loaded.saved.items():
                own_state = state.saved[module_name]
                load_public_state(
                    copies[module_name], {key: _sharded_like(tensor, own_state[key]) for key, tensor in tensors.items()}
                )
            for bias_name, bias in self.loaded.biases.items():
                own = state.biases[bias_name]
                own.copy_(_sharded_like(bias, own))


def other_projections(origin: str, config: VeraConfig, expected: str, found: str) -> CheckpointError:
    """Return the error for projections that differ from those that an adapter was trained with."""
    return CheckpointError(
        f"{origin} was trained with other projections: its fingerprint is {expected}, but"
        f" projection={config.projection!r} with projection_prng_key={config.projection_prng_key} gives {found} here."
        " The adapter's outputs would be wrong"
    )


def _check_saved(origin: str, modules: Mapping[str, nn.Module], name: str, state: dict[str, Tensor]) -> None:
    module = modules.get(name)
    if module is None:
        raise CheckpointError(
            f"{origin} contains the module {name!r} in full, but this model has no module of that name"
            + _closest(name, modules)
        )
    original = unwrapped(module)
    expected = public_state(original)  # parameters, whose full shapes are known if they are sharded
    check_keys(f"{origin}: saved module {name!r}", expected, state)
    for key, tensor in state.items():
        shape = shape_of(expected[key])
        if tensor.shape != shape:
            raise CheckpointError(
                f"{origin}: {name}.{key} has shape {tuple(tensor.shape)}, but {tuple(shape)} in this"
                " model: load the base model with the number of labels that it had in training"
            )
        if tensor.is_floating_point() != expected[key].is_floating_point() or tensor.is_complex():
            raise CheckpointError(f"{origin}: {name}.{key} is {tensor.dtype}, but {expected[key].dtype} in this model")


def check_keys(what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise CheckpointError unless the expected and the found names are equal."""
    expected, found = set(expected), set(found)
    problems = []
    if expected - found:
        problems.append("is missing " + some(sorted(expected - found)))
    if found - expected:
        problems.append("has unexpected names: " + some(sorted(found - expected)))
    if problems:
        raise CheckpointError(f"{what} {' and '.join(problems)}")


def _sharded_like(value: Tensor, own: Tensor) -> Tensor:
    """Return a value sharded like a parameter (FSDP2), or unchanged if the parameter is not sharded."""
    mesh = getattr(own, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(value.to(own.device, own.dtype), mesh, own.placements)


def _closest(name: str, modules: Mapping[str, nn.Module]) -> str:
    close = closest(name, modules)
    return f"; the closest names are {', '.join(close)}" if close else ""
