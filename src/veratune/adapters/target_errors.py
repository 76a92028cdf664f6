"""Check an adapter's targets; error messages list names in the model."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from veratune.adapters.matching import layer_index, layer_indices, matcher
from veratune.adapters.names import base_modules, ends_in, joined, unwrapped
from veratune.adapters.target import Target, TargetError, above_largest_rank
from veratune.config import VeraConfig, ends_in_match
from veratune.layers import SavedModule, VeraLayer, VeraModule
from veratune.layers.registry import (
    adaptable_parameters,
    layer_class,
    weight_name,
    why_not_adaptable,
)
from veratune.projections.schemes import SCHEMES
from veratune.utils.sharding import describe_sharding, is_emptied, is_engines
from veratune.utils.text import closest

# Look for similar names for at most this many names, because each search takes milliseconds in a large model.
_MOST_COMPARED = 8


def check_settings(config: VeraConfig, targets: list[Target]) -> None:
    """Raise TargetError for a setting that a target does not support."""
    if (found := above_largest_rank(targets)) is not None:
        large, most = found
        raise TargetError(
            f"rank {large.r} is not allowed on {large.name}: the largest rank for layers of these sizes is {most},"
            " and 256 to 1024 is typical"
        )
    for key in config.fused_parts:
        if not any(ends_in(target.name, key) for target in targets):
            raise TargetError(
                f"fused_parts={config.fused_parts!r}: no adapted layer's name ends in {key!r}."
                + closest_in_model([key], dict.fromkeys([target.name for target in targets], "adapted"))
            )
    for target in targets:
        module = unwrapped(target.module)
        kind = layer_class(module, target.parameter)
        if target.parts and not kind.supports_parts:
            raise TargetError(f"fused_parts: {target.name} ({kind.kind}) cannot be split into parts: remove its key")
        if config.vera_dropout > 0.0 and not kind.supports_dropout(module):
            raise TargetError(
                f"vera_dropout={config.vera_dropout!r} is not supported on {target.name}: its adapter has no separate"
                " input to apply dropout to. Use vera_dropout=0.0, or add the layer to exclude_modules"
            )
    check_scheme(config.projection, targets)


def check_scheme(name: str, targets: list[Target]) -> None:
    """Raise TargetError if projections of a scheme cannot adapt one of the targets."""
    scheme = SCHEMES[name]
    for target in targets:
        kind = layer_class(unwrapped(target.module), target.parameter)
        if (scheme.one_rank_linear_only and not kind.supports_one_rank_schemes) or (
            kind.one_hot and not scheme.has_columns
        ):
            raise TargetError(
                f"projection={name!r} cannot adapt {target.name} ({kind.kind}): use projection='per_dimension', or add"
                " the layer to exclude_modules"
            )


def check_not_sharded(targets: list[Target]) -> None:
    """Raise TargetError if a target's weight is sharded across processes."""
    for target in targets:
        base = unwrapped(target.module)
        weight = base._parameters.get(target.parameter or weight_name(base))
        sharding = describe_sharding(weight)
        if is_emptied(weight) and not is_engines(base):
            continue  # loaded for ZeRO-3, before deepspeed.initialize
        if sharding is not None:
            raise TargetError(
                f"{target.name} cannot be adapted, because its weight is sharded across processes ({sharding}): load"
                " the base model without tensor parallelism (tp_plan), and add adapters before fully_shard (FSDP2) or"
                " deepspeed.initialize (ZeRO-3)"
            )


def check_conflicts(modules: Mapping[str, nn.Module], saved: list[str], adapted: list[str]) -> None:
    """Raise TargetError if an adapter cannot train these modules in full or cannot adapt these layers.

    A module cannot be adapted by one adapter and trained in full by another, and some modules cannot be saved.

    Args:
        modules: the result of `base_modules` for the model.
        saved: names of the modules that the new adapter trains in full.
        adapted: names of the layers that it adapts.
    """
    for name in saved:
        module = modules[name]
        inside = [other for other in modules if other == name or other.startswith(f"{name}.")]
        layer = next((other for other in inside if isinstance(modules[other], VeraLayer | VeraModule)), None)
        if layer is not None:
            raise TargetError(
                f"modules_to_save: {name} cannot be trained in full, because another adapter adapts {layer}: remove it"
                " (modules_to_save=[] trains no module in full), or delete that adapter first"
            )
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise TargetError(
                f"modules_to_save: {name} is a {type(module).__name__}, which has no forward: list the modules in it"
            )
        original = unwrapped(module)
        if not all(isinstance(value, Tensor) for value in original.state_dict().values()):
            raise TargetError(f"modules_to_save: {name} has state that is not a tensor and cannot be saved")
    wrapped = [name for name, module in modules.items() if isinstance(module, SavedModule)]
    for name in adapted:
        top = next((other for other in wrapped if name == other or name.startswith(f"{other}.")), None)
        if top is not None:
            raise TargetError(
                f"{name} cannot be adapted, because another adapter trains {top} in full: add it to exclude_modules, or"
                " delete that adapter first"
            )


def warn_of_ties(model: nn.Module, targets: list[Target], notify: Callable[[str], None]) -> None:
    """Warn about adapted weights that are shared with other modules, which the adapter does not affect."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in base_modules(model).items():
        for parameter_name, parameter in unwrapped(module)._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((joined(name, parameter_name), module))
    for target in targets:
        base = unwrapped(target.module)
        weight = base._parameters.get(target.parameter or weight_name(base))
        others = [name for name, module in holders.get(id(weight), []) if module is not target.module]
        if others:
            notify(
                f"{target.name} shares its weight with {', '.join(others)}: the adapter affects only"
                f" {target.name}, and merging it unties the weights"
            )


def check_narrowing(
    modules: dict[str, nn.Module], config: VeraConfig, matched: list[str], notify: Callable[[str], None]
) -> None:
    """Warn if `exclude_modules` matches nothing, and raise TargetError for an index that no layer has."""
    parameters = [joined(name, p) for name, module in modules.items() for p in unwrapped(module)._parameters]
    names = [*modules, *parameters]
    if config.exclude_modules is not None and not any(map(matcher(config.exclude_modules), names)):
        types = {name: type(unwrapped(module)).__name__ for name, module in modules.items() if name}
        wanted_out = [config.exclude_modules] if isinstance(config.exclude_modules, str) else config.exclude_modules
        notify(
            f"exclude_modules={config.exclude_modules!r} matches no module of this model."
            + closest_in_model(wanted_out, types)
        )
    if config.layers_to_transform is not None and matched:
        indices = {layer_index(name, config) for name in matched}
        absent = [index for index in layer_indices(config) if index not in indices]
        if absent:
            present = sorted(index for index in indices if index is not None)
            raise TargetError(
                f"layers_to_transform={config.layers_to_transform!r}: target_modules={config.target_modules!r} matches"
                f" no module in layer {absent[0]}, only in {present}"
            )


def check_rank_pattern(config: VeraConfig, names: list[str]) -> None:
    """Raise TargetError for a `rank_pattern` that matches no adapted layer."""
    for key in config.rank_pattern:
        if not any(ends_in_match(name, key) for name in names):
            raise TargetError(
                f"rank_pattern={config.rank_pattern!r}: no adapted layer's name ends in a match of {key!r}."
                + closest_in_model([key], dict.fromkeys(names, "adapted"))
            )


def check_each_pattern(
    wanted: list[str] | str, matched: list[str], inside_saved: set[str], modules: dict[str, nn.Module]
) -> None:
    """Raise TargetError for a pattern that matches nothing, or a listed name that matches no adaptable module."""
    types = {name: type(unwrapped(module)).__name__ for name, module in modules.items() if name}
    if isinstance(wanted, str):
        if not matched:
            raise TargetError(
                f"target_modules={wanted!r}: this regular expression matches no module's full name."
                + _meant_otherwise(wanted, modules)
                + closest_in_model([re.split(r"[.*\\()|$^?+]+", wanted.rstrip("$"))[-1]], types)
            )
        return
    missing = [name for name in wanted if not any(ends_in(match, name) for match in matched)]
    if missing:
        raise TargetError(
            f"target_modules={wanted!r}: no module is called {' or '.join(map(repr, missing))}."
            + closest_in_model(missing, types)
        )
    for suffix in wanted:
        matching = [name for name in matched if ends_in(name, suffix)]
        outside = [name for name in matching if name not in inside_saved]
        if len(wanted) > 1 and not outside:
            raise TargetError(
                f"target_modules={wanted!r}: {suffix!r} matches only modules that are trained in full, such as"
                f" {matching[0]} (modules_to_save): remove it from target_modules or modules_to_save;"
                " modules_to_save=[] trains no module in full"
            )
        if len(wanted) > 1 and not any(_usable(modules[name]) for name in outside):
            raise TargetError(
                f"target_modules={wanted!r}: {suffix!r} matches only modules that cannot be adapted, such as"
                f" {outside[0]}: {reason_against(modules[outside[0]])}. Remove {suffix!r}" + _adaptable_names(modules)
            )


def _meant_otherwise(wanted: str, modules: dict[str, nn.Module]) -> str:
    """Return a hint for a string that may not be meant as a regular expression."""
    if wanted.lower().replace("_", "-").replace(" ", "-") == "all-linear":
        return ' Did you mean "all-linear"?'
    if any(ends_in(name, wanted) for name in modules):
        return f" To match the ends of module names, pass a list: [{wanted!r}]."
    return ""


def nothing_to_adapt(
    config: VeraConfig,
    matched: list[str],
    considered: list[str],
    inside_saved: set[str],
    modules: dict[str, nn.Module],
) -> str:
    start = f"target_modules={config.target_modules!r}"
    if considered:
        shown = "".join(f"\n  {name}: {reason_against(modules[name])}" for name in considered[:10])
        rest = f"\n  and {len(considered) - 10} more" if len(considered) > 10 else ""
        return (
            f"{start} matches only modules that cannot be adapted:{shown}{rest}\nRemove them, or add them to"
            " exclude_modules." + _adaptable_names(modules)
        )
    if matched and all(name in inside_saved for name in matched):
        return (
            f"{start} matches only modules that are trained in full (modules_to_save={config.modules_to_save!r}): "
            "remove them from target_modules or modules_to_save; modules_to_save=[] trains no module in full"
        )
    if matched:
        narrowing = {
            field: getattr(config, field)
            for field in ("exclude_modules", "layers_to_transform", "layers_pattern")
            if getattr(config, field) is not None
        }
        found = sorted({index for name in matched if (index := layer_index(name, config)) is not None})
        stacks = sorted({name.rsplit(".", 1)[-1] for name, m in modules.items() if isinstance(m, nn.ModuleList)})
        counted = ""
        if config.layers_to_transform is not None:
            counted = f"; the layer indices of these modules are {found}, and the model's stacks are called {stacks}"
        return (
            f"{start} matches {len(matched)} modules, such as {matched[0]!r}, but no module remains after "
            + ", ".join(f"{field}={value!r}" for field, value in narrowing.items())
            + counted
        )
    return f"{start} matches no linear layer in this {type(modules['']).__name__}" + _adaptable_names(modules)


def closest_in_model(wanted: Iterable[str], types: dict[str, str]) -> str:
    """Return a sentence with the closest names in the model, and their classes."""
    last_parts = {name.rsplit(".", 1)[-1]: module_type for name, module_type in types.items()}
    last_parts = {name: module_type for name, module_type in last_parts.items() if not name.isdigit()}
    all_names = {**types, **last_parts}
    close: dict[str, str] = {}
    for name in itertools.islice(wanted, _MOST_COMPARED):
        close |= {match: all_names[match] for match in closest(name, all_names, 5)}
    if close:
        return " The closest names in the model: " + ", ".join(f"{name} ({found})" for name, found in close.items())
    listed = list(last_parts.items())[:20]
    return " The model has modules called: " + ", ".join(f"{name} ({found})" for name, found in listed)


def _adaptable_names(modules: dict[str, nn.Module]) -> str:
    last_parts = {
        name.rsplit(".", 1)[-1]: type(unwrapped(module)).__name__
        for name, module in modules.items()
        if name and _usable(module)
    }
    if not last_parts:
        return "\nThe model has no layer that VeRA can adapt"
    listed = list(last_parts.items())[:20]
    return "\nThe model's adaptable layers are called: " + ", ".join(f"{name} ({found})" for name, found in listed)


def reason_against(module: nn.Module) -> str | None:
    return why_not_adaptable(unwrapped(module))


def _usable(module: nn.Module) -> bool:
    return reason_against(module) is None or bool(adaptable_parameters(unwrapped(module)))
