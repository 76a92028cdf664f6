"""Which modules of a model an adapter applies to, found without changing anything."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from veratune.config import VeraConfig, ends_in_match
from veratune.layers import Geometry, SavedModule, VeraLayer, VeraModule
from veratune.layers.registry import (
    adaptable_parameters,
    geometry,
    has_own_forward,
    is_linear,
    is_out_proj,
    parameter_layout,
    why_not_adaptable,
    why_not_parameter,
)
from veratune.projections.schemes import SCHEMES
from veratune.utils.patterns import Budget, pattern
from veratune.utils.sharding import describe_sharding, is_emptied, is_engines
from veratune.utils.text import clipped
from veratune.utils.torch_private import in_state_dict, name_in_wrapper

# The attention's query and value projections, as in the paper's experiments, under their names in transformers.
_QUERY_AND_VALUE = {
    ("query", "value"): "bert camembert data2vec-text deit electra ernie layoutlm longformer roberta vit xlm-roberta",
    ("q_proj", "v_proj"): (
        "bart blenderbot clip codegen cohere dinov2 gemma gemma2 gemma3 gemma3_text gpt_neo gptj granite llama llama4"
        " m2m_100 marian mbart mistral mixtral olmo olmo2 opt pegasus phi qwen2 qwen2_moe qwen3 qwen3_moe siglip"
        " smollm3 stablelm starcoder2 vit whisper"
    ),
    ("c_attn",): "gpt2 gpt_bigcode",
    ("query_key_value",): "bloom falcon gpt_neox",
    ("qkv_proj",): "phi3",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("q", "v"): "mt5 t5 umt5",
    ("q_lin", "v_lin"): "distilbert xlm flaubert",
    ("Wqkv",): "mpt modernbert",
}

_NEW_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_NEW_HEAD_CLASS = re.compile(r"For\w*(Classification|MultipleChoice|QuestionAnswering)$")
_USUAL_HEADS = ("classifier", "score", "qa_outputs")


@dataclass(frozen=True)
class Target:
    """A layer, or a parameter that its module reads itself, to which an adapter will be added.

    Attributes:
        name: its dotted name; where a module stands in several places, the first.
        module: the module, or the `VeraLayer` or `VeraModule` that another adapter has made of it.
        parameter: the parameter's name in its module; None for a layer.
        rank: the adapter's rank there.
        geometry: its dimensions.
        parts: the outputs of each part, where it stands for several layers side by side.
    """

    name: str
    module: nn.Module
    parameter: str | None
    rank: int
    geometry: Geometry
    parts: tuple[int, ...] = ()

    @property
    def in_features(self) -> int:
        return self.geometry.in_features

    @property
    def out_features(self) -> int:
        return self.geometry.out_features


class TargetError(ValueError):
    """The configuration names nothing in this model that can be adapted."""

    def __init__(self, message: str) -> None:
        super().__init__(clipped(message))


def matcher(patterns: list[str] | str, budget: Budget | None = None) -> Callable[[str], bool]:
    """Return whether a dotted module name is meant by a list of names or by a regular expression, as a function.

    The function raises PatternError where an expression takes more than the budget.
    """
    if isinstance(patterns, str):
        expression = pattern(patterns)
        return lambda name: expression.matches(name, budget)
    ends = frozenset(patterns)

    def is_listed(name: str) -> bool:
        return name in ends or any(name[i + 1 :] in ends for i, letter in enumerate(name) if letter == ".")

    return is_listed


def _ends_in(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules by dotted name, as if it had no adapters and no wrappers of torch's.

    A module that stands in several places has several names. Adapted layers and saved modules stand under the names
    of what they wrap, and nothing inside them is listed but the saved module's original.
    """
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> None:
        module = without_wrappers(module)
        found[name] = module
        if isinstance(module, VeraLayer):
            return
        for child_name, child in unwrapped(module)._modules.items():
            if child is not None:
                visit(child, joined(name, child_name))

    visit(model, "")
    return found


def without_wrappers(module: nn.Module) -> nn.Module:
    """Return the module inside torch's wrappers: torch.compile, checkpoint_wrapper, DataParallel, FSDP 1."""
    while (name := name_in_wrapper(module)) is not None:
        inside = module._modules[name]
        assert inside is not None
        module = inside
    return module


class ModuleName(NamedTuple):
    """The names of one module.

    Attributes:
        public: without torch's wrappers; the only one for files, targets and messages. A wrapper has the same as
            the module inside.
        state: what its keys in a state dict begin with, where some wrappers show and some do not.
        wrapper: whether it is a wrapper.
    """

    public: str
    state: str
    wrapper: bool


def module_names(model: nn.Module) -> dict[str, ModuleName]:
    """Return the names of all modules, adapters and wrappers included, by those that `named_modules` gives.

    A module that stands in several places has several names.
    """
    found: dict[str, ModuleName] = {}

    def visit(module: nn.Module, name: str, public: str, state: str) -> None:
        held = name_in_wrapper(module)
        found[name] = ModuleName(public, state, held is not None)
        for child_name, child in module._modules.items():
            if child is not None:
                hidden = child_name == held
                shown = not hidden or in_state_dict(child_name)
                visit(
                    child,
                    joined(name, child_name),
                    public if hidden else joined(public, child_name),
                    joined(state, child_name) if shown else state,
                )

    visit(model, "", "", "")
    return found


def public_key(key: str, names: Mapping[str, str]) -> str:
    """Return a key of a state dict without torch's wrappers.

    Args:
        key: the key.
        names: what modules' keys begin with, to the modules' public names.
    """
    owner, rest = key, ""
    while owner and owner not in names:
        owner, _, last = owner.rpartition(".")
        rest = joined(last, rest) if rest else last
    public = names.get(owner, owner)
    return joined(public, rest) if rest else public


def adapted_layers(model: nn.Module) -> dict[str, VeraLayer]:
    """Return what adapters are on, by name in the model without them, each once: layers, and parameters of modules."""
    found: dict[int, tuple[str, VeraLayer]] = {}
    for name, module in base_modules(model).items():
        if isinstance(module, VeraLayer):
            found.setdefault(id(module), (name, module))
        elif isinstance(module, VeraModule):
            for parameter, layer in module.parameter_layers().items():
                found.setdefault(id(layer), (joined(name, parameter), layer))
    return dict(found.values())


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model's own module that one of veratune's holds, or the module itself, without torch's wrappers."""
    module = without_wrappers(module)
    if isinstance(module, VeraLayer | VeraModule):
        return without_wrappers(module.base_layer)
    return without_wrappers(module.original_module) if isinstance(module, SavedModule) else module


def joined(module_name: str, name: str) -> str:
    """Return the dotted name of something in a module."""
    return f"{module_name}.{name}" if module_name else name


def resolve_config(model: nn.Module, config: VeraConfig, notify: Callable[[str], None]) -> VeraConfig:
    """Return the configuration with what it leaves to the model filled in: targets, the head to save, the model's name.

    Args:
        model: the model without a wrapper.
        config: what the user asked for; not changed.
        notify: called with a sentence where a choice may surprise.
    """
    changes: dict[str, object] = {}
    model = without_wrappers(model)
    model_config = getattr(model, "config", None)
    if config.target_modules is None and config.target_parameters is None:
        model_type = getattr(model_config, "model_type", None)
        chosen = _query_and_value(model, str(model_type))
        if chosen is None:
            notify(
                f"target_modules is None and there is no built-in choice for model_type={model_type!r}: adapting all"
                " linear layers (target_modules='all-linear')"
            )
        changes["target_modules"] = "all-linear" if chosen is None else list(chosen)
    changes["modules_to_save"] = _modules_to_save(model, config)
    if config.base_model_name_or_path is None:
        changes["base_model_name_or_path"] = getattr(model_config, "_name_or_path", None) or None
    return config.replace(**changes)


def _query_and_value(model: nn.Module, model_type: str) -> tuple[str, ...] | None:
    modules = base_modules(model)
    for names, model_types in _QUERY_AND_VALUE.items():
        # An architecture's names differ between versions of transformers, so the model is asked as well.
        if model_type in model_types.split() and all(any(_ends_in(name, end) for name in modules) for end in names):
            return names
    return None


def _modules_to_save(model: nn.Module, config: VeraConfig) -> list[str]:
    """Return the full names of the modules to save: those the configuration names, or the model's new head."""
    modules = base_modules(model)
    if config.modules_to_save is None:
        return _new_head(model, config)
    found: list[str] = []
    for suffix in config.modules_to_save:
        names = [name for name in modules if name and _ends_in(name, suffix)]
        if not names:
            raise TargetError(
                f"modules_to_save={config.modules_to_save!r}: no module is called {suffix!r}."
                + _closest([suffix], {name: type(module).__name__ for name, module in modules.items() if name})
            )
        found += names
    # What is saved with a module around it is not saved once more, and a module under two names once.
    outermost = [name for name in dict.fromkeys(found) if not any(name.startswith(f"{other}.") for other in found)]
    return list({id(modules[name]): name for name in reversed(outermost)}.values())[::-1]


def _new_head(model: nn.Module, config: VeraConfig) -> list[str]:
    """Return the names of a classification model's head, which is random at first and useless if not trained."""
    prefix = getattr(model, "base_model_prefix", None)
    children = {name: child for name, child in model.named_children() if next(child.parameters(), None) is not None}
    by_class = _NEW_HEAD_CLASS.search(type(model).__name__) is not None
    if prefix in children and (by_class or config.task_type in _NEW_HEAD_TASKS):
        return [name for name in children if name != prefix]
    if config.task_type in _NEW_HEAD_TASKS:
        return [name for name in _USUAL_HEADS if name in children]
    return []


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
    considered = _narrowed([name for name in matched if name not in inside_saved], config)
    _check_narrowing(modules, config, [*matched, *read] if considered or read else [], notify)
    places = [place for name in considered for place in _places(name, modules)]
    places += [place for name, place in read.items() if place.module_name not in inside_saved]
    kept = set(_narrowed([place.name for place in places], config))
    places = list({place.name: place for place in places if place.name in kept}.values())
    if not places:
        raise TargetError(_nothing_to_adapt(config, matched, considered, inside_saved, modules))
    if config.target_modules != "all-linear":
        for name in considered:
            reason = _reason(modules[name])
            own = unwrapped(modules[name])
            has_weights = bool(own._parameters) or "parametrizations" in own._modules
            if reason is not None and has_weights and not adaptable_parameters(own):
                notify(f"{name} is left as it is, because {reason}. exclude_modules=[{name!r}] says so without a word")
    _check_rank_pattern(config, [place.name for place in places])
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
    _tell_of_ties(model, targets, notify)
    return targets


def parameter_targets(model: nn.Module, config: VeraConfig) -> list[Target]:
    """Return the parameters that `target_parameters` means, but for excluded ones.

    Raises:
        TargetError: a name that is no parameter's, or only those of parameters that cannot be adapted.
    """
    places = _matched_parameters(base_modules(model), config)
    return [_target(places[name], config) for name in _narrowed(list(places), config)]


class _Place(NamedTuple):
    """Something that can be adapted: a module, or a parameter of a module."""

    name: str
    module_name: str
    module: nn.Module
    parameter: str | None


def _places(name: str, modules: dict[str, nn.Module]) -> list[_Place]:
    """Return what is adapted where a module is named: the layer itself, or the weights that the module reads."""
    module = modules[name]
    if _reason(module) is None:
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
        output = _output_layers(model)
        trained = [name for name, module in modules.items() if isinstance(module, SavedModule)]
        return [
            name
            for name, module in modules.items()
            if (is_linear(unwrapped(module)) or adaptable_parameters(unwrapped(module)))
            and id(unwrapped(module)) not in output
            and name not in inside_saved
            and not any(name == top or name.startswith(f"{top}.") for top in trained)
        ]
    meant = matcher(wanted)
    matched = [name for name in modules if name and meant(name)]
    _check_each_pattern(wanted, matched, inside_saved, modules)
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
        own = {name: place for name, place in there.items() if _ends_in(name, wanted)}
        reasons = {
            name: why_not_parameter(unwrapped(place.module), place.parameter or "") for name, place in own.items()
        }
        usable = {name: place for name, place in own.items() if reasons[name] is None}
        if not own:
            types = {name: type(unwrapped(place.module)).__name__ for name, place in there.items()}
            raise TargetError(
                f"target_parameters={config.target_parameters!r}: no parameter is called {wanted!r}."
                + _closest([wanted], types)
            )
        if not usable:
            name = next(iter(own))
            raise TargetError(
                f"target_parameters={config.target_parameters!r}: {wanted!r} matches only parameters that cannot be"
                f" adapted, such as {name}: {reasons[name]}"
            )
        found |= usable
    return found


def _check_narrowing(
    modules: dict[str, nn.Module], config: VeraConfig, matched: list[str], notify: Callable[[str], None]
) -> None:
    """Tell of an exclusion that excludes nothing, and refuse an index that no layer has."""
    names = [*modules, *(joined(name, own) for name, m in modules.items() for own in unwrapped(m)._parameters)]
    if config.exclude_modules is not None and not any(map(matcher(config.exclude_modules), names)):
        types = {name: type(unwrapped(module)).__name__ for name, module in modules.items() if name}
        wanted_out = [config.exclude_modules] if isinstance(config.exclude_modules, str) else config.exclude_modules
        notify(
            f"exclude_modules={config.exclude_modules!r} matches no module of this model." + _closest(wanted_out, types)
        )
    if config.layers_to_transform is not None and matched:
        there = {_layer_index(name, config) for name in matched}
        absent = [index for index in _indices(config) if index not in there]
        if absent:
            present = sorted(index for index in there if index is not None)
            raise TargetError(
                f"layers_to_transform={config.layers_to_transform!r}: there is no layer {absent[0]} among what"
                f" target_modules={config.target_modules!r} matches, only {present}"
            )


def _target(place: _Place, config: VeraConfig) -> Target:
    module, rank = place.module, config.rank_of(place.name)
    if place.parameter is not None:
        size, _ = parameter_layout(unwrapped(module), place.parameter)
        return Target(place.name, module, place.parameter, rank, size)
    size = geometry(unwrapped(module))
    return Target(place.name, module, None, rank, size, parts_of(place.name, size, config))


def parts_of(name: str, size: Geometry, config: VeraConfig) -> tuple[int, ...]:
    """Return the outputs of each part of a layer, by a configuration's `fused_parts`; empty where it is not named.

    Raises:
        TargetError: the parts do not add up to the layer's outputs.
    """
    keys = [key for key in config.fused_parts if _ends_in(name, key)]
    if not keys:
        return ()
    key = max(keys, key=len)  # the one that says most
    parts = config.fused_parts[key]
    if not isinstance(parts, int):
        sizes = parts
    else:  # no list of what may be a huge number
        sizes = [size.out_features // parts] * parts if parts <= size.out_features else []
    if sum(sizes) != size.out_features or 0 in sizes:
        raise TargetError(
            f"fused_parts[{key!r}]={parts!r} does not fit {name}, which has {size.out_features} outputs: give a number"
            " that divides them, or a list that adds up to them"
        )
    return tuple(sizes)


def largest_rank(targets: Iterable[Target]) -> int:
    """Return the largest rank that an adapter of these targets may have on any of them."""
    return max(target.geometry.largest_rank for target in targets)


def check_settings(config: VeraConfig, targets: list[Target]) -> None:
    """Raise TargetError for a setting that some of the targets cannot have."""
    most = largest_rank(targets)
    large = next((target for target in targets if target.rank > most), None)
    if large is not None:
        raise TargetError(
            f"a rank of {large.rank} is not allowed on {large.name}: {most} is the most for layers of these sizes, and"
            " 256 to 1024 are usual"
        )
    for key in config.fused_parts:
        if not any(_ends_in(target.name, key) for target in targets):
            raise TargetError(
                f"fused_parts={config.fused_parts!r}: {key!r} is the end of no adapted layer's name."
                + _closest([key], dict.fromkeys([target.name for target in targets], "adapted"))
            )
    for target in targets:
        module = unwrapped(target.module)
        if target.parts and not is_linear(module):
            raise TargetError(f"fused_parts: {target.name} is no linear layer, and is not made of parts")
        read = target.parameter is not None or is_out_proj(module) or has_own_forward(module)
        if config.vera_dropout > 0.0 and (read or isinstance(module, nn.Embedding)):
            raise TargetError(
                f"vera_dropout={config.vera_dropout!r} cannot be had for {target.name}: there is no input of the"
                " adapter's own to drop from. Use vera_dropout=0.0, or name it in exclude_modules"
            )
        whole_linear = target.parameter is None and not isinstance(module, nn.Embedding)
        if SCHEMES[config.projection].one_rank_linear_only and not whole_linear:
            raise TargetError(
                f"projection={config.projection!r} cannot adapt {target.name}, which is not a linear layer: use"
                " projection='per_dimension', or name it in exclude_modules"
            )


def check_not_sharded(targets: list[Target]) -> None:
    """Raise TargetError if a target's weight is spread over processes, where each has some of its rows or columns."""
    for target in targets:
        base = unwrapped(target.module)
        weight = base._parameters.get(target.parameter or "weight")
        spread = describe_sharding(weight)
        if is_emptied(weight) and not is_engines(base):
            continue  # loaded for ZeRO-3, and the engine has not seen it yet
        if spread is not None:
            raise TargetError(
                f"{target.name} cannot be adapted, because its weight is spread over processes ({spread}): load the"
                " base model without tensor parallelism (tp_plan), and put adapters on before fully_shard (FSDP2) or"
                " deepspeed.initialize (ZeRO-3)"
            )


def _tell_of_ties(model: nn.Module, targets: list[Target], notify: Callable[[str], None]) -> None:
    """Tell the user of adapted weights that other modules hold as well, since those stay as they are."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in base_modules(model).items():
        for own, parameter in unwrapped(module)._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((joined(name, own), module))
    for target in targets:
        weight = unwrapped(target.module)._parameters.get(target.parameter or "weight")
        others = [name for name, module in holders.get(id(weight), []) if module is not target.module]
        if others:
            notify(
                f"{target.name} shares its weight with {', '.join(others)}: the adapter changes what {target.name}"
                " computes and nothing else, and merging it unties the weights"
            )


def check_conflicts(modules: Mapping[str, nn.Module], saved: list[str], adapted: list[str]) -> None:
    """Raise TargetError where one adapter would train in full what another adapts, or cannot be copied or saved.

    Args:
        modules: what `base_modules` returns for the model.
        saved: names of the modules that the new adapter trains in full.
        adapted: names of the layers that it adapts.
    """
    for name in saved:
        module = modules[name]
        inside = [other for other in modules if other == name or other.startswith(f"{name}.")]
        layer = next((other for other in inside if isinstance(modules[other], VeraLayer | VeraModule)), None)
        if layer is not None:
            raise TargetError(
                f"modules_to_save: {name} cannot be trained in full, because another adapter adapts {layer}: leave it"
                " out (modules_to_save=[] trains nothing in full), or delete that adapter first"
            )
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise TargetError(
                f"modules_to_save: {name} is a {type(module).__name__}, which computes nothing itself: name what is"
                " in it"
            )
        original = unwrapped(module)
        if not all(isinstance(value, Tensor) for value in original.state_dict().values()):
            raise TargetError(f"modules_to_save: {name} has a state that is not made of tensors and cannot be saved")
    wrapped = [name for name, module in modules.items() if isinstance(module, SavedModule)]
    for name in adapted:
        top = next((other for other in wrapped if name == other or name.startswith(f"{other}.")), None)
        if top is not None:
            raise TargetError(
                f"{name} cannot be adapted, because another adapter trains {top} in full: exclude it, or delete that"
                " adapter first"
            )


def _reason(module: nn.Module) -> str | None:
    return why_not_adaptable(unwrapped(module))


def _usable(module: nn.Module) -> bool:
    return _reason(module) is None or bool(adaptable_parameters(unwrapped(module)))


def _narrowed(names: list[str], config: VeraConfig, budget: Budget | None = None) -> list[str]:
    if config.exclude_modules is not None:
        excluded = matcher(config.exclude_modules, budget)
        names = [name for name in names if not excluded(name)]
    if config.layers_to_transform is not None:
        indices = set(_indices(config))
        names = [name for name in names if _layer_index(name, config, budget) in indices]
    return names


def configured_names(modules: Mapping[str, nn.Module], config: VeraConfig, budget: Budget) -> list[str]:
    """Return the adaptable modules that a file's configuration is for, each under its first name.

    Nothing is complained about: this is for checking a file against its own configuration.

    Raises:
        PatternError: its expressions take more than the budget.
    """
    wanted = config.target_modules
    assert wanted is not None
    meant = matcher(wanted, budget)
    names = _narrowed([name for name in modules if name and meant(name)], config, budget)
    first_names = {id(modules[name]): name for name in reversed(names) if _reason(modules[name]) is None}
    return [name for name in names if first_names.get(id(modules[name])) == name]


def configured_parameters(modules: Mapping[str, nn.Module], config: VeraConfig, budget: Budget) -> list[str]:
    """Return the names of the parameters that a file's configuration is for.

    Raises:
        TargetError: a name that is no parameter's, or only those of parameters that cannot be adapted.
        PatternError: its expressions take more than the budget.
    """
    return _narrowed(list(_matched_parameters(dict(modules), config)), config, budget)


def _output_layers(model: nn.Module) -> set[int]:
    """Return the ids of the layers that "all-linear" leaves alone: the output head, and what shares embeddings."""
    getter = getattr(model, "get_output_embeddings", None)
    head = None
    if callable(getter):
        try:
            head = getter()
        except (AttributeError, NotImplementedError):
            head = None
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tied = {
        id(module)
        for module in model.modules()
        if not isinstance(module, nn.Embedding | VeraLayer) and id(module._parameters.get("weight")) in embeddings
    }
    return tied | ({id(unwrapped(head))} if isinstance(head, nn.Module) else set())


def _check_each_pattern(
    wanted: list[str] | str, matched: list[str], inside_saved: set[str], modules: dict[str, nn.Module]
) -> None:
    """Raise TargetError for a pattern that matches nothing, and for a name in a list that adapts nothing."""
    types = {name: type(unwrapped(module)).__name__ for name, module in modules.items() if name}
    if isinstance(wanted, str):
        if not matched:
            raise TargetError(
                f"target_modules={wanted!r}: this regular expression matches no module's whole name."
                + _meant_otherwise(wanted, modules)
                + _closest([re.split(r"[.*\\()|$^?+]+", wanted.rstrip("$"))[-1]], types)
            )
        return
    missing = [name for name in wanted if not any(_ends_in(match, name) for match in matched)]
    if missing:
        raise TargetError(
            f"target_modules={wanted!r}: no module is called {' or '.join(map(repr, missing))}."
            + _closest(missing, types)
        )
    for suffix in wanted:
        own = [name for name in matched if _ends_in(name, suffix)]
        outside = [name for name in own if name not in inside_saved]
        if len(wanted) > 1 and not outside:
            raise TargetError(
                f"target_modules={wanted!r}: {suffix!r} matches only modules that are trained in full, such as {own[0]}"
                " (modules_to_save): leave it out of one of the two; modules_to_save=[] trains none in full"
            )
        if len(wanted) > 1 and not any(_usable(modules[name]) for name in outside):
            raise TargetError(
                f"target_modules={wanted!r}: {suffix!r} matches only modules that cannot be adapted, such as"
                f" {outside[0]}: {_reason(modules[outside[0]])}. Leave {suffix!r} out" + _adaptable_names(modules)
            )


def _meant_otherwise(wanted: str, modules: dict[str, nn.Module]) -> str:
    """Return a hint for a string that was perhaps not meant as a regular expression."""
    if wanted.lower().replace("_", "-").replace(" ", "-") == "all-linear":
        return ' Did you mean "all-linear"?'
    if any(_ends_in(name, wanted) for name in modules):
        return f" A list names the ends of modules' names: [{wanted!r}]."
    return ""


def _nothing_to_adapt(
    config: VeraConfig,
    matched: list[str],
    considered: list[str],
    inside_saved: set[str],
    modules: dict[str, nn.Module],
) -> str:
    start = f"target_modules={config.target_modules!r}"
    if considered:
        shown = "".join(f"\n  {name}: {_reason(modules[name])}" for name in considered[:10])
        rest = f"\n  and {len(considered) - 10} more" if len(considered) > 10 else ""
        return (
            f"{start} matches only modules that cannot be adapted:{shown}{rest}\nLeave them out, or name them in"
            " exclude_modules." + _adaptable_names(modules)
        )
    if matched and all(name in inside_saved for name in matched):
        return (
            f"{start} matches only modules that are trained in full (modules_to_save={config.modules_to_save!r}): "
            "leave them out of one of the two; modules_to_save=[] trains none in full"
        )
    if matched:
        narrowing = {
            field: getattr(config, field)
            for field in ("exclude_modules", "layers_to_transform", "layers_pattern")
            if getattr(config, field) is not None
        }
        found = sorted({index for name in matched if (index := _layer_index(name, config)) is not None})
        stacks = sorted({name.rsplit(".", 1)[-1] for name, m in modules.items() if isinstance(m, nn.ModuleList)})
        counted = ""
        if config.layers_to_transform is not None:
            counted = f"; the layer indices there are {found}, the model's stacks are called {stacks}"
        return (
            f"{start} matches {len(matched)} modules, such as {matched[0]!r}, but none is left after "
            + ", ".join(f"{field}={value!r}" for field, value in narrowing.items())
            + counted
        )
    return f"{start} finds no linear layer in this {type(modules['']).__name__}" + _adaptable_names(modules)


def _closest(wanted: Iterable[str], types: dict[str, str]) -> str:
    """Return a sentence that lists the model's names most like the wanted ones, with their types."""
    last_parts = {name.rsplit(".", 1)[-1]: kind for name, kind in types.items()}
    last_parts = {name: kind for name, kind in last_parts.items() if not name.isdigit()}
    kinds = {**types, **last_parts}
    close: dict[str, str] = {}
    for name in wanted:
        close |= {match: kinds[match] for match in difflib.get_close_matches(name, kinds, n=5, cutoff=0.5)}
    if close:
        return " The closest names in the model: " + ", ".join(f"{name} ({kind})" for name, kind in close.items())
    listed = list(last_parts.items())[:20]
    return " The model has modules called: " + ", ".join(f"{name} ({kind})" for name, kind in listed)


def _adaptable_names(modules: dict[str, nn.Module]) -> str:
    last_parts = {
        name.rsplit(".", 1)[-1]: type(unwrapped(module)).__name__
        for name, module in modules.items()
        if name and _usable(module)
    }
    if not last_parts:
        return "\nThe model has no layer that VeRA can adapt"
    listed = list(last_parts.items())[:20]
    return "\nThe model's adaptable layers are called: " + ", ".join(f"{name} ({kind})" for name, kind in listed)


def _indices(config: VeraConfig) -> list[int]:
    indices = config.layers_to_transform
    assert indices is not None
    return [indices] if isinstance(indices, int) else indices


def _layer_index(name: str, config: VeraConfig, budget: Budget | None = None) -> int | None:
    """Return the index of a module's layer in its stack: the last number that follows `layers_pattern` in its name."""
    wanted = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    parts = name.split(".")
    numbers = [place for place in range(len(parts) - 2, 0, -1) if parts[place].isdecimal()]
    if wanted is None:
        return next((int(parts[place]) for place in numbers if parts[place - 1]), None)
    for stack in wanted:
        for place in numbers:
            if pattern(stack).matches_end(".".join(parts[:place]), budget):
                return int(parts[place])
    return None


def _check_rank_pattern(config: VeraConfig, names: list[str]) -> None:
    for key in config.rank_pattern:
        if not any(ends_in_match(name, key) for name in names):
            raise TargetError(
                f"rank_pattern={config.rank_pattern!r}: {key!r} matches the end of no adapted layer's name."
                + _closest([key], dict.fromkeys(names, "adapted"))
            )
