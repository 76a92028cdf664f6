"""Find the modules and parameters that an adapter applies to."""

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
    closest_in_model,
    nothing_to_adapt,
    reason_against,
    warn_of_ties,
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
    """Return the targets of a resolved configuration, in the model's order.

    Args:
        model: the model without a wrapper; it may have adapters.
        config: the result of `resolve_config`.
        notify: called with a message if a choice may be surprising.

    Raises:
        TargetError: a name or pattern matches nothing, no adaptable layer, or a layer that does not support the
            configuration. The message lists names in the model.
    """
    model = without_wrappers(model)
    modules = base_modules(model)
    saved = config.modules_to_save or []
    inside_saved = {name for name in modules if any(name == top or name.startswith(f"{top}.") for top in saved)}
    matched = _matched_modules(model, modules, config, inside_saved)
    read = _matched_parameters(modules, config)
    considered = narrowed([name for name in matched if name not in inside_saved], config)
    check_narrowing(modules, config, [*matched, *read] if considered or read else [], notify)
    candidates = [candidate for name in considered for candidate in _candidates(name, modules)]
    candidates += [candidate for name, candidate in read.items() if candidate.module_name not in inside_saved]
    kept = set(narrowed([candidate.name for candidate in candidates], config))
    candidates = list({candidate.name: candidate for candidate in candidates if candidate.name in kept}.values())
    if not candidates:
        raise TargetError(nothing_to_adapt(config, matched, considered, inside_saved, modules))
    if config.target_modules != "all-linear":
        for name in considered:
            reason = reason_against(modules[name])
            base = unwrapped(modules[name])
            has_weights = bool(base._parameters) or "parametrizations" in base._modules
            if reason is not None and has_weights and not adaptable_parameters(base):
                notify(f"skipping {name}: {reason}. Add {name!r} to exclude_modules to silence this warning")
    check_rank_pattern(config, [candidate.name for candidate in candidates])
    order = {name: position for position, name in enumerate(modules)}
    candidates.sort(key=lambda candidate: order[candidate.module_name])
    # A module may have several names (ALBERT's layers, a module listed twice), but it is one target.
    first_names: dict[tuple[int, str | None], str] = {}
    for candidate in candidates:
        first_names.setdefault((id(candidate.module), candidate.parameter), candidate.name)
    targets = [
        _target(candidate, config)
        for candidate in candidates
        if first_names[(id(candidate.module), candidate.parameter)] == candidate.name
    ]
    check_settings(config, targets)
    warn_of_ties(model, targets, notify)
    return targets


def parameter_targets(model: nn.Module, config: VeraConfig) -> list[Target]:
    """Return the parameters that match `target_parameters` and are not excluded.

    Raises:
        TargetError: a name matches no parameter, or only parameters that cannot be adapted.
    """
    candidates = _matched_parameters(base_modules(model), config)
    return [_target(candidates[name], config) for name in narrowed(list(candidates), config)]


def configured_names(modules: Mapping[str, nn.Module], config: VeraConfig, budget: Budget) -> list[str]:
    """Return the adaptable modules that the configuration in a file matches, each under its first name.

    No warnings are issued, because this serves to check a file against its configuration.

    Raises:
        PatternError: the configuration's expressions exceed the budget.
    """
    wanted = config.target_modules
    assert wanted is not None
    matches = matcher(wanted, budget)
    names = narrowed([name for name in modules if name and matches(name)], config, budget)
    first_names = {id(modules[name]): name for name in reversed(names) if reason_against(modules[name]) is None}
    return [name for name in names if first_names.get(id(modules[name])) == name]


class _Candidate(NamedTuple):
    """A module, or a parameter of a module, that can be adapted."""

    name: str
    module_name: str
    module: nn.Module
    parameter: str | None


def _candidates(name: str, modules: dict[str, nn.Module]) -> list[_Candidate]:
    """Return the candidates for a matched module: the layer itself, or the weights that its forward reads."""
    module = modules[name]
    if reason_against(module) is None:
        return [_Candidate(name, name, module, None)]
    candidates = [_Candidate(joined(name, p), name, module, p) for p in adaptable_parameters(unwrapped(module))]
    if isinstance(unwrapped(module), nn.MultiheadAttention):
        output = joined(name, "out_proj")
        candidates.append(_Candidate(output, output, modules[output], None))
    return candidates


def _matched_modules(
    model: nn.Module, modules: dict[str, nn.Module], config: VeraConfig, inside_saved: set[str]
) -> list[str]:
    """Return the names of the modules that match `target_modules`."""
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
    matches = matcher(wanted)
    matched = [name for name in modules if name and matches(name)]
    check_each_pattern(wanted, matched, inside_saved, modules)
    return matched


def _matched_parameters(modules: dict[str, nn.Module], config: VeraConfig) -> dict[str, _Candidate]:
    """Return the parameters that match `target_parameters`, by name."""
    candidates = {
        joined(name, parameter): _Candidate(joined(name, parameter), name, module, parameter)
        for name, module in modules.items()
        if not isinstance(module, SavedModule)
        for parameter in unwrapped(module)._parameters
    }
    found: dict[str, _Candidate] = {}
    for wanted in config.target_parameters or []:
        matching = {name: candidate for name, candidate in candidates.items() if ends_in(name, wanted)}
        reasons = {
            name: why_not_parameter(unwrapped(candidate.module), candidate.parameter or "")
            for name, candidate in matching.items()
        }
        usable = {name: candidate for name, candidate in matching.items() if reasons[name] is None}
        if not matching:
            types = {name: type(unwrapped(candidate.module)).__name__ for name, candidate in candidates.items()}
            raise TargetError(
                f"target_parameters={config.target_parameters!r}: no parameter is called {wanted!r}."
                + closest_in_model([wanted], types)
            )
        if not usable:
            name = next(iter(matching))
            raise TargetError(
                f"target_parameters={config.target_parameters!r}: {wanted!r} matches only parameters that cannot be"
                f" adapted, such as {name}: {reasons[name]}"
            )
        found |= usable
    return found


def _target(candidate: _Candidate, config: VeraConfig) -> Target:
    module, r = candidate.module, config.rank_of(candidate.name)
    if candidate.parameter is not None:
        size, _ = parameter_layout(unwrapped(module), candidate.parameter)
        return Target(candidate.name, module, candidate.parameter, r, size)
    size = geometry(unwrapped(module))
    return Target(candidate.name, module, None, r, size, parts_of(candidate.name, size, config))
