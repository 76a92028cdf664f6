"""The configuration of one adapter: validated when it is made, with PEFT's field names where PEFT has the field."""

import dataclasses
import difflib
import functools
import inspect
import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

from veratune.ops.planning import MEMORY_NAMES, ROUTE_NAMES, MemoryName, RouteName
from veratune.projections.schemes import SCHEMES
from veratune.utils.patterns import PatternError, pattern
from veratune.utils.text import clipped

PEFT_TYPE = "VERATUNE"

Bias = Literal["none", "all", "vera_only"]
TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")

_BIASES = ("none", "all", "vera_only")
_KEY_RANGE = range(-(1 << 63), 1 << 64)
_LARGEST_RANK = 1 << 20
_LARGEST_INDEX = (1 << 63) - 1
# float32's smallest normal and largest number.
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
_LONGEST_VALUE = 500

_Config = TypeVar("_Config")

# Settings of other adapters in PEFT, and what serves in their place.
_FOREIGN = {
    "lora_alpha": "VeRA has no alpha: the trained vectors scale each layer, and d_initial is where d starts",
    "alpha_pattern": "VeRA has no alpha: the trained vectors scale each layer",
    "lora_dropout": "use vera_dropout",
    "dropout": "use vera_dropout",
    "lora_rank": "use r, which is higher than LoRA's: 256 to 1024",
    "rank": "use r",
    "lora_bias": "use bias",
    "init_lora_weights": "leave it out: a new adapter changes nothing; init_weights=False is for tests",
    "use_rslora": "leave it out: VeRA has no alpha that the rank would divide",
    "use_dora": "leave it out: veratune has no counterpart of DoRA",
    "fan_in_fan_out": "leave it out: transformers' Conv1D is recognised by its class",
    "prng_key": "use projection_prng_key",
    "ensure_weight_tying": "leave it out: tied weights are found",
    "target_module": "use target_modules",
}
# What PEFT asks a configuration for, and this one cannot answer.
_ASKED_BY_PEFT = ("is_prompt_learning", "is_adaption_prompt", "auto_mapping", "peft_version", "runtime_config")


def foreign_field(name: str) -> str:
    """Return what serves in place of another adapter's setting; empty for a name that is none."""
    return _FOREIGN.get(name, "")


def explains_unknown_fields(config: type[_Config]) -> type[_Config]:
    """Decorate a dataclass so that a keyword which is none of its fields is refused with the remedy."""
    made = config.__init__
    known = list(inspect.signature(made).parameters)[1:]

    @functools.wraps(made)
    def init(self: object, *args: Any, **kwargs: Any) -> None:
        unknown = [f"{name!r}: {_remedy(name, known)}" for name in kwargs if name not in known]
        if unknown:
            # PEFT looks for these words where it reads a file of a later version.
            raise TypeError(f"{config.__name__} got an unexpected keyword argument {'; '.join(unknown)}")
        made(self, *args, **kwargs)

    config.__init__ = init  # type: ignore[method-assign]
    return config


def _remedy(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return foreign_field(name) or (f"do you mean {near[0]}?" if near else f"there are {', '.join(known)}")


def check_config(config: object) -> None:
    """Raise TypeError, with what to give instead, unless this is a `VeraConfig`."""
    if isinstance(config, VeraConfig):
        return
    kind, package = type(config).__qualname__, type(config).__module__.partition(".")[0]
    remedy = "make one with veratune.VeraConfig(r=256, target_modules=...)"
    if kind == "VeraConfig":
        remedy = "veratune.VeraConfig takes the same fields but fan_in_fan_out, which it has no need of"
    elif kind == "VeratuneConfig":
        remedy = "it is for peft.get_peft_model; veratune.VeraConfig takes the same fields"
    elif package == "peft":
        remedy += f", whose fields are not those of {kind}; peft.get_peft_model takes a {kind}"
    raise TypeError(f"the configuration must be a veratune.VeraConfig, not {type(config).__module__}.{kind}: {remedy}")


@explains_unknown_fields
@dataclass
class VeraConfig:
    """Settings of a VeRA adapter (Kopiczko, Blankevoort & Asano, ICLR 2024).

    Args:
        r: rank: the number of rows of A and of columns of B. VeRA's ranks are high (256 to 1024).
        target_modules: which linear layers to adapt. A list of names, each matching a module of that name or whose
            dotted name ends in it; a string, a regular expression that must match the whole dotted name (without
            backreferences, as it is matched in bounded time); "all-linear"
            for every linear layer but a language model's output head and what `modules_to_save` trains; None for a
            choice by `model.config.model_type`.
        target_parameters: which parameters to adapt that a module's own forward computes with, such as expert tensors:
            a list of names, each matching a parameter of that dotted name or whose dotted name ends in it. "all-linear"
            finds expert tensors and packed attention weights by itself.
        fused_parts: for a linear layer that stands for several side by side (query, key and value in one), the number
            of equal parts or the outputs of each, by the end of its name: {"c_attn": 3}, {"qkv_proj": [64, 32, 32]}.
            Each part has a d and a B of its own, as if they were separate layers.
        exclude_modules: layers not to adapt, as a list of names or a regular expression, matched the same way.
        layers_to_transform: indices of the layers of the stack to adapt; None for all.
        layers_pattern: name or names of the `nn.ModuleList` that `layers_to_transform` counts in; None for any.
        rank_pattern: rank for the layers whose dotted name ends in a match of the key (a regular expression), in
            place of `r`.
        modules_to_save: names of modules to train in full and save with the adapter. None chooses the new head of a
            classification model; an empty list is for none at all.
        d_initial: value at which each d starts (the paper's Table 6); b starts at zero.
        vera_dropout: probability of dropout on the adapter's input, in [0, 1).
        bias: which biases are trained: "none", "all", or those of the adapted layers ("vera_only").
        init_weights: False starts b at one and d at random, so that a new adapter changes the model. For tests.
        projection_prng_key: 64-bit key from which the frozen projections A and B are drawn.
        projection: "per_dimension", projections of their own for each width, or "peft", views of one pair as large
            as the widest layers, with PEFT's values.
        save_projection: write A and B into the adapter's file. Nothing needs them there: they are drawn again from
            the key.
        route: how layers are computed: "auto" (the cheapest for each shape), "factored" or "dense".
        memory: what is kept for the backward pass: "fast" keeps what saves work, "low" as little as possible,
            "balanced" what is small beside the model's own activations.
        task_type: one of SEQ_CLS, TOKEN_CLS, QUESTION_ANS, CAUSAL_LM, SEQ_2_SEQ_LM, FEATURE_EXTRACTION, or None.
        inference_mode: make the adapter frozen.
        base_model_name_or_path: where the base model is from; filled in by `get_peft_model`.
        revision: the base model's revision.

    Raises:
        TypeError, ValueError: a value, or two together, that cannot be; the message names the field, the value and
            what is allowed.
    """

    r: int = 256
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    fused_parts: dict[str, int | list[int]] = dataclasses.field(default_factory=dict)
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    modules_to_save: list[str] | None = None
    d_initial: float = 0.1
    vera_dropout: float = 0.0
    bias: Bias = "none"
    init_weights: bool = True
    projection_prng_key: int = 0
    projection: str = "per_dimension"
    save_projection: bool = False
    route: RouteName = "auto"
    memory: MemoryName = "balanced"
    task_type: str | None = None
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        self.target_modules = _names("target_modules", self.target_modules)
        self.target_parameters = _listed_names("target_parameters", self.target_parameters)
        self.fused_parts = _fused_parts(self.fused_parts)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        self.layers_pattern = _names("layers_pattern", self.layers_pattern, regex=False)
        for stack in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []:
            _check_regex("layers_pattern", stack, "(?:{})")
        self.modules_to_save = _listed_names("modules_to_save", self.modules_to_save)
        self.layers_to_transform = _layer_indices(self.layers_to_transform)
        self.rank_pattern = _rank_pattern(self.rank_pattern)
        _check_integer("r", self.r, range(1, _LARGEST_RANK + 1), f"an integer from 1 to {_LARGEST_RANK}")
        _check_integer("projection_prng_key", self.projection_prng_key, _KEY_RANGE, "an integer of 64 bits")
        self.d_initial = _finite("d_initial", self.d_initial)
        if not _SMALLEST <= abs(self.d_initial) <= _LARGEST:
            allowed = "a number other than 0 that float32 holds: with b = 0 as well nothing could ever learn"
            raise _bad("d_initial", self.d_initial, allowed)
        self.vera_dropout = _finite("vera_dropout", self.vera_dropout)
        if not 0.0 <= self.vera_dropout < 1.0:
            raise _bad("vera_dropout", self.vera_dropout, "a probability in [0, 1)")
        _check_choice("bias", self.bias, _BIASES)
        _check_choice("projection", self.projection, tuple(SCHEMES))
        _check_choice("route", self.route, ROUTE_NAMES)
        _check_choice("memory", self.memory, MEMORY_NAMES)
        self.task_type = _task_type(self.task_type)
        for name in ("init_weights", "save_projection", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "True or False", TypeError)
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise _bad(name, getattr(self, name), "a string or None", TypeError)
        self._check_combinations()

    def __getattr__(self, name: str) -> NoReturn:
        if name in _ASKED_BY_PEFT:
            raise AttributeError(
                f"a veratune.VeraConfig has no {name!r}: it is for veratune.get_peft_model. For PEFT's functions there"
                " is VeratuneConfig, with the same fields, in veratune.integrations.peft"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _check_combinations(self) -> None:
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} says where layers_to_transform counts, but"
                " layers_to_transform is None: give its indices, or leave layers_pattern out"
            )
        if self.layers_to_transform is not None and self._is_regex():
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be combined with the regular expression"
                f" target_modules={self.target_modules!r}: put the indices into the expression, or list names"
            )
        if self.route == "dense" and self.vera_dropout > 0.0:
            raise ValueError(
                f"route='dense' cannot be combined with vera_dropout={self.vera_dropout!r}: one weight for both parts"
                " of a layer cannot leave out inputs of the adapter's part alone; use route='auto', or vera_dropout=0.0"
            )
        if SCHEMES[self.projection].one_rank_linear_only and self.fused_parts:
            raise ValueError(
                f"fused_parts={self.fused_parts!r} cannot be combined with projection={self.projection!r}, which has"
                " one d for a layer: use projection='per_dimension', or leave fused_parts out"
            )
        if SCHEMES[self.projection].one_rank_linear_only and self.rank_pattern:
            raise ValueError(
                f"rank_pattern={self.rank_pattern!r} cannot be combined with projection={self.projection!r}, whose A"
                " and B have one rank for all layers: use projection='per_dimension', or leave rank_pattern out"
            )

    def _is_regex(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules != "all-linear"

    @property
    def peft_type(self) -> str:
        """The name under which files of this configuration are told from PEFT's own."""
        return PEFT_TYPE

    def names_only(self) -> bool:
        """Return whether nothing in this is a regular expression but names, or names joined by "|"."""
        texts = [self.target_modules, self.exclude_modules, *self.rank_pattern]
        stacks = self.layers_pattern
        texts += [stacks] if isinstance(stacks, str) else stacks or []
        return all(pattern(text).is_list for text in texts if isinstance(text, str))

    def rank_of(self, name: str) -> int:
        """Return the rank on the layer of this dotted name: that of the first fitting `rank_pattern`, or `r`."""
        return next((rank for key, rank in self.rank_pattern.items() if ends_in_match(name, key)), self.r)

    def replace(self, **changes: Any) -> "VeraConfig":
        """Return a copy with these fields changed, validated anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold, with `peft_type` first."""
        return {"peft_type": PEFT_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VeraConfig":
        """Make a configuration from what `to_dict` returned.

        Raises:
            ValueError: another `peft_type`, or a field that this version does not know.
        """
        values = dict(values)
        peft_type = values.pop("peft_type", PEFT_TYPE)
        if peft_type != PEFT_TYPE:
            raise ValueError(
                f"peft_type={clipped(repr(peft_type), _LONGEST_VALUE)} is not a veratune configuration, whose peft_type"
                f" is {PEFT_TYPE!r}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            shown = clipped(str(unknown), _LONGEST_VALUE)
            raise ValueError(f"unknown configuration fields {shown}: allowed are {sorted(known)}")
        return cls(**values)


VeRAConfig = VeraConfig


def ends_in_match(name: str, key: str) -> bool:
    """Return whether a dotted name, or its end behind some dot, matches a regular expression."""
    return pattern(key).matches_end(name)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = _SHORT.maxdict = 20


def shown(value: object) -> str:
    """Return a value for a message, of bounded length: a file may hold anything."""
    return _SHORT.repr(value)


def _bad(field: str, value: object, allowed: str, error: type[Exception] = ValueError) -> Exception:
    return error(f"{clipped(f'{field}={shown(value)}', _LONGEST_VALUE)} is not allowed: it must be {allowed}")


def _check_integer(field: str, value: object, allowed: range, description: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _bad(field, value, description, TypeError)
    if value not in allowed:
        raise _bad(field, value, description)


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise _bad(field, value, "one of " + ", ".join(map(repr, choices)))


def _finite(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad(field, value, "a number", TypeError)
    try:
        number = float(value)
    except OverflowError:
        raise _bad(field, "a huge integer", "a finite number") from None
    if not math.isfinite(number):
        raise _bad(field, value, "a finite number")
    return number


def _check_regex(field: str, text: str, around: str = "{}") -> None:
    try:
        pattern(around.format(text))
    except PatternError as error:
        shown = clipped(f"{field}={text!r}", _LONGEST_VALUE)
        raise ValueError(f"{shown} is not a regular expression that can be used here: {error}") from None


def _name_list(field: str, value: Iterable[object]) -> list[str]:
    # Sets come from PEFT's own configurations; sorting makes files of equal configurations equal.
    names = sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise _bad(field, value, "a list of non-empty names", TypeError)
    return list(dict.fromkeys(str(name) for name in names))


def _names(field: str, value: object, *, regex: bool = True) -> list[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not value:
            raise _bad(field, value, "a non-empty string, a list of names, or None")
        if regex and value != "all-linear":
            _check_regex(field, value)
        return value
    if not isinstance(value, list | tuple | set | frozenset):
        raise _bad(field, value, "a string, a list of names, or None", TypeError)
    if not value:
        raise _bad(field, value, "a non-empty list, a string, or None")
    return _name_list(field, value)


def _listed_names(field: str, value: object) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple | set | frozenset):
        raise _bad(field, value, "a list of names, or None", TypeError)
    return _name_list(field, value)


def _fused_parts(value: object) -> dict[str, int | list[int]]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad("fused_parts", value, "a dictionary of names to a number of parts or a list of sizes", TypeError)
    checked: dict[str, int | list[int]] = {}
    for name, parts in value.items():
        if not isinstance(name, str) or not name:
            raise _bad("fused_parts", value, "a dictionary whose keys are non-empty strings", TypeError)
        sizes = list(parts) if isinstance(parts, list | tuple) else [parts]
        if not sizes or any(type(size) is not int or not 1 <= size <= _LARGEST_INDEX for size in sizes):
            raise _bad(f"fused_parts[{name!r}]", parts, "a number of parts, or a list of their outputs", TypeError)
        if len(sizes) == 1 and (sizes[0] < 2 or isinstance(parts, list | tuple)):
            raise _bad(f"fused_parts[{name!r}]", parts, "at least two parts")
        checked[name] = sizes if isinstance(parts, list | tuple) else sizes[0]
    return checked


def _layer_indices(value: object) -> list[int] | int | None:
    if value is None:
        return None
    indices = [value] if isinstance(value, int) else value  # a boolean is refused below
    if not isinstance(indices, list | tuple | set | frozenset | range) or not indices:
        raise _bad("layers_to_transform", value, "an index, a non-empty list of indices, or None", TypeError)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise _bad("layers_to_transform", value, "made of integers", TypeError)
        if not 0 <= index <= _LARGEST_INDEX:
            raise _bad("layers_to_transform", value, "made of indices from 0 up")
    return value if isinstance(value, int) else sorted(set(indices))


def _rank_pattern(value: object) -> dict[str, int]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad("rank_pattern", value, "a dictionary of patterns to ranks", TypeError)
    for key, rank in value.items():
        if not isinstance(key, str) or not key:
            raise _bad("rank_pattern", value, "a dictionary whose keys are non-empty strings", TypeError)
        _check_regex("rank_pattern", key, "(?:{})")
        description = f"an integer from 1 to {_LARGEST_RANK}"
        _check_integer(f"rank_pattern[{key!r}]", rank, range(1, _LARGEST_RANK + 1), description)
    return dict(value)


def _task_type(value: object) -> str | None:
    if value is None:
        return None
    name = getattr(value, "value", value)  # PEFT's TaskType is an enum of strings
    if not isinstance(name, str) or name not in TASK_TYPES:
        raise _bad("task_type", value, "one of " + ", ".join(TASK_TYPES) + ", or None")
    return str(name)
