"""Which modules of a model an adapter applies to, found without changing anything."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from veratune.adapters.default_targets import output_layers
from veratune.adapters.matching import matcher, narrowed
from veratune.adapters.names import base_modules, ends_in, joined, unwrapped, without_wrappers
from veratune.adapters.target import Target, TargetError, parts_of
from veratune.adapters.target_errors import (
    check_each_pattern,
    check_narrowing,
    check_rank_pattern,
    check_settings,
    closest,
    nothing_to_adapt,
    reason_against,
    tell_of_ties,
)
from veratune.config import VeraConfig
from veratune.layers import SavedModule
from veratune.layers.registry import (
    adaptable_parameters,
    geometry,
    in_all_linear,
    parameter_layout,
    why_not_parameter,
)
from veratune.utils.patterns import Budget


def find_targets(model: nn.Module, config: VeraConfig, notify: Callable[[str], None]) -> list[Target]:
    """Return what a resolved configuration adapts, in the model's order.

    Args:
        model: the model without a wrapper; it may have adapters.
        config: what `resolve_config` returned.
        notify: called with a sentence where a choice may surprise.

    Raises:
        TargetError: a name or pattern that matches nothing, or nothing that can be adapted, or something that cannot
            be adapted in this way; the message lists what the model does have.
    """
    model = without_wrappers(model)
    modules = base_modules(model)
    saved = config.modules_to_save or []
    inside_saved = {name for name in modules if any(name == top or name.startswith(f"{top}.") for top in saved)}
    matched = _matched_modules(model, modules, config, inside_saved)
    read = _matched_parameters(modules, config)
    considered = narrowed([name for name in matched if name not in inside_saved], config)
    check_narrowing(modules, config, [*matched, *read] if considered or read else [], notify)
    places = [place for name in considered for place in _places(name, modules)]
    places += [place for name, place in read.items() if place.module_name not in inside_saved]
    kept = set(narrowed([place.name for place in places], config))
    places = list({place.name: place for place in places if place.name in kept}.values())
    if not places:
        raise TargetError(nothing_to_adapt(config, matched, considered, inside_saved, modules))
    if config.target_modules != "all-linear":
        for name in considered:
            reason = reason_against(modules[name])
            own = unwrapped(modules[name])
            has_weights = bool(own._parameters) or "parametrizations" in own._modules
            if reason is not None and has_weights and not adaptable_parameters(own):
                notify(f"{name} is left as it is, because {reason}. exclude_modules=[{name!r}] says so without a word")
    check_rank_pattern(config, [place.name for place in places])
    order = {name: position for position, name in enumerate(modules)}
    places.sort(key=lambda place: order[place.module_name])
    # The same module may stand under several names (ALBERT's layers, a module listed twice): it is one target.
    first_names: dict[tuple[int, str | None], str] = {}
    for place in places:
        first_names.setdefault((id(place.module), place.parameter), place.name)
    targets = [
        _target(place, config) for place in places if first_names[(id(place.module), place.parameter)] == place.name
    ]
    check_settings(config, targets)
    tell_of_ties(model, targets, notify)
    return targets


def parameter_targets(model: nn.Module, config: VeraConfig) -> list[Target]:
    """Return the parameters that `target_parameters` means, but for excluded ones.

    Raises:
        TargetError: a name that is no parameter's, or only those of parameters that cannot be adapted.
    """
    places = _matched_parameters(base_modules(model), config)
    return [_target(places[name], config) for name in narrowed(list(places), config)]


def configured_names(modules: Mapping[str, nn.Module], config: VeraConfig, budget: Budget) -> list[str]:
    """Return the adaptable modules that a file's configuration is for, each under its first name.

    Nothing is complained about: this is for checking a file against its own configuration.

    Raises:
        PatternError: its expressions take more than the budget.
    """
    wanted = config.target_modules
    assert wanted is not None
    meant = matcher(wanted, budget)
    names = narrowed([name for name in modules if name and meant(name)], config, budget)
    first_names = {id(modules[name]): name for name in reversed(names) if reason_against(modules[name]) is None}
    return [name for name in names if first_names.get(id(modules[name])) == name]


def configured_parameters(modules: Mapping[str, nn.Module], config: VeraConfig, budget: Budget) -> list[str]:
    """Return the names of the parameters that a file's configuration is for.

    Raises:
        TargetError: a name that is no parameter's, or only those of parameters that cannot be adapted.
        PatternError: its expressions take more than the budget.
    """
    return narrowed(list(_matched_parameters(dict(modules), config)), config, budget)


class _Place(NamedTuple):
    """Something that can be adapted: a module, or a parameter of a module."""

    name: str
    module_name: str
    module: nn.Module
    parameter: str | None


def _places(name: str, modules: dict[str, nn.Module]) -> list[_Place]:
    """Return what is adapted where a module is named: the layer itself, or the weights that the module reads."""
    module = modules[name]
    if reason_against(module) is None:
        return [_Place(name, name, module, None)]
    places = [_Place(joined(name, own), name, module, own) for own in adaptable_parameters(unwrapped(module))]
    if isinstance(unwrapped(module), nn.MultiheadAttention):
        output = joined(name, "out_proj")
        places.append(_Place(output, output, modules[output], None))
    return places


def _matched_modules(
    model: nn.Module, modules: dict[str, nn.Module], config: VeraConfig, inside_saved: set[str]
) -> list[str]:
    """Return the names of the modules that target_modules means."""
    wanted = config.target_modules
    if wanted is None:
        return []
    if wanted == "all-linear":
        output = output_layers(model)
        trained = [name for name, module in modules.items() if isinstance(module, SavedModule)]
        return [
            name
            for name, module in modules.items()
            if (in_all_linear(unwrapped(module)) or adaptable_parameters(unwrapped(module)))
            and id(unwrapped(module)) not in output
            and name not in inside_saved
            and not any(name == top or name.startswith(f"{top}.") for top in trained)
        ]
    meant = matcher(wanted)
    matched = [name for name in modules if name and meant(name)]
    check_each_pattern(wanted, matched, inside_saved, modules)
    return matched


def _matched_parameters(modules: dict[str, nn.Module], config: VeraConfig) -> dict[str, _Place]:
    """Return the parameters that target_parameters means, by name."""
    there = {
        joined(name, own): _Place(joined(name, own), name, module, own)
        for name, module in modules.items()
        if not isinstance(module, SavedModule)
        for own in unwrapped(module)._parameters
    }
    found: dict[str, _Place] = {}
    for wanted in config.target_parameters or []:
        own = {name: place for name, place in there.items() if ends_in(name, wanted)}
        reasons = {
            name: why_not_parameter(unwrapped(place.module), place.parameter or "") for name, place in own.items()
        }
        usable = {name: place for name, place in own.items() if reasons[name] is None}
        if not own:
            types = {name: type(unwrapped(place.module)).__name__ for name, place in there.items()}
            raise TargetError(
                f"target_parameters={config.target_parameters!r}: no parameter is called {wanted!r}."
                + closest([wanted], types)
            )
        if not usable:
            name = next(iter(own))
            raise TargetError(
                f"target_parameters={config.target_parameters!r}: {wanted!r} matches only parameters that cannot be"
                f" adapted, such as {name}: {reasons[name]}"
            )
        found |= usable
    return found


def _target(place: _Place, config: VeraConfig) -> Target:
    module, r = place.module, config.rank_of(place.name)
    if place.parameter is not None:
        size, _ = parameter_layout(unwrapped(module), place.parameter)
        return Target(place.name, module, place.parameter, r, size)
    size = geometry(unwrapped(module))
    return Target(place.name, module, None, r, size, parts_of(place.name, size, config))
