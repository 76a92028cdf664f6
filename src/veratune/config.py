"""The configuration of one adapter, validated on construction. Fields that PEFT also has use PEFT's names."""

import dataclasses
import functools
import inspect
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

from veratune import config_fields as check
from veratune.config_fields import LONGEST_VALUE, setting, settings_of
from veratune.ops.planning import MEMORY_NAMES, ROUTE_NAMES, RouteName
from veratune.ops.routes import MemoryName
from veratune.projections.base import KEYS
from veratune.projections.blocks import MOST_BLOCKS
from veratune.projections.schemes import SCHEMES
from veratune.utils.patterns import pattern
from veratune.utils.text import clipped, closest

PEFT_TYPE = "VERATUNE"

Bias = Literal["none", "all", "vera_only"]

_BIASES = ("none", "all", "vera_only")

_Config = TypeVar("_Config")

# Settings of PEFT's other adapter types, and the VeRA setting to use instead.
_FOREIGN = {
    "lora_alpha": "VeRA has no alpha: the trained vectors scale each layer, and d_initial sets the initial d",
    "alpha_pattern": "VeRA has no alpha: the trained vectors scale each layer",
    "lora_dropout": "use vera_dropout",
    "dropout": "use vera_dropout",
    "lora_rank": "use r, which is higher than LoRA's rank: 256 to 1024",
    "rank": "use r",
    "lora_bias": "use bias",
    "init_lora_weights": "leave it out: a new adapter is a no-op; init_weights=False is for tests",
    "use_rslora": "leave it out: VeRA has no alpha to divide by the rank",
    "use_dora": "leave it out: veratune does not support DoRA",
    "fan_in_fan_out": "leave it out: transformers' Conv1D is recognized by its class",
    "prng_key": "use projection_prng_key",
    "ensure_weight_tying": "leave it out: tied weights are detected",
    "target_module": "use target_modules",
}
# Attributes that PEFT reads from its configurations but that `VeraConfig` does not have.
_ASKED_BY_PEFT = ("is_prompt_learning", "is_adaption_prompt", "auto_mapping", "peft_version", "runtime_config")


def foreign_field(name: str) -> str:
    """Return the remedy for a setting of another adapter type, or an empty string for other names."""
    return _FOREIGN.get(name, "")


def explains_unknown_fields(config: type[_Config]) -> type[_Config]:
    """Decorate a dataclass to raise TypeError, with a remedy, for keywords that are not fields."""
    made = config.__init__
    known = list(inspect.signature(made).parameters)[1:]

    @functools.wraps(made)
    def init(self: object, *args: Any, **kwargs: Any) -> None:
        unknown = [f"{name!r}: {_remedy(name, known)}" for name in kwargs if name not in known]
        if unknown:
            # PEFT looks for these words when it reads a file written by a newer version.
            raise TypeError(f"{config.__name__} got an unexpected keyword argument {'; '.join(unknown)}")
        made(self, *args, **kwargs)

    config.__init__ = init  # type: ignore[method-assign]
    return config


def _remedy(name: str, known: list[str]) -> str:
    near = closest(name, known)
    return foreign_field(name) or (f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}")


def check_config(config: object) -> None:
    """Raise TypeError, with a remedy, unless this is a `VeraConfig`."""
    if isinstance(config, VeraConfig):
        return
    class_name, package = type(config).__qualname__, type(config).__module__.partition(".")[0]
    remedy = "create one with veratune.VeraConfig(r=256, target_modules=...)"
    if class_name == "VeraConfig":
        remedy = "veratune.VeraConfig takes the same fields except fan_in_fan_out, which it does not need"
    elif class_name == "VeratuneConfig":
        remedy = "it is for peft.get_peft_model; veratune.VeraConfig takes the same fields"
    elif package == "peft":
        remedy += f", whose fields differ from those of {class_name}; peft.get_peft_model takes a {class_name}"
    raise TypeError(
        f"the configuration must be a veratune.VeraConfig, not {type(config).__module__}.{class_name}: {remedy}"
    )


@dataclass
class VeraFields:
    """The fields that `VeraConfig` and the PEFT plug-in's configuration have in common.

    Each field is defined once, here or in `VeraConfig`. Its metadata (`Setting`) contains its check and specifies where
    else the field is used.
    """

    r: int = setting(256, check.rank, peft="vera", card=True, train=False)
    target_modules: list[str] | str | None = setting(
        None, check.names_or_regex, peft="vera", card=True, train=False, selects=True
    )
    target_parameters: list[str] | None = setting(None, check.listed_names, selects=True)
    fused_parts: dict[str, int | list[int]] = setting(dict, check.parts)
    exclude_modules: list[str] | str | None = setting(None, check.names_or_regex, peft="vera", selects=True)
    layers_to_transform: list[int] | int | None = setting(None, check.layer_indices, peft="vera", selects=True)
    layers_pattern: list[str] | str | None = setting(None, check.stack_names, peft="vera", selects=True)
    rank_pattern: dict[str, int] = setting(dict, check.ranks_by_pattern)
    modules_to_save: list[str] | None = setting(None, check.listed_names, peft="vera", card=True, selects=True)
    d_initial: float = setting(0.1, check.initial_d, peft="vera", card=True, train=False)
    vera_dropout: float = setting(0.0, check.probability, peft="vera", card=True, train=False)
    bias: Bias = setting("none", check.choice(_BIASES), peft="vera", card=True)
    init_weights: bool = setting(True, check.boolean, peft="vera", train=False)
    projection_prng_key: int = setting(
        0, check.integer(KEYS, "an integer of 64 bits"), peft="vera", card=True, train=False
    )
    projection: str = setting("per_dimension", check.choice(SCHEMES), card=True)
    projection_blocks: int = setting(
        8, check.integer(range(1, MOST_BLOCKS + 1), f"an integer from 1 to {MOST_BLOCKS}"), card=True
    )
    route: RouteName = setting("auto", check.choice(ROUTE_NAMES))
    memory: MemoryName = setting("balanced", check.choice(MEMORY_NAMES))
    save_projection: bool = setting(False, check.boolean, peft="vera")


@explains_unknown_fields
@dataclass
class VeraConfig(VeraFields):
    """Settings of a VeRA adapter (Kopiczko, Blankevoort & Asano, ICLR 2024).

    Args:
        r: rank: the number of rows of A and of columns of B. VeRA's ranks are high (256 to 1024).
        target_modules: which layers to adapt: a list of names, each of which matches modules whose dotted name equals
            it or ends with it after a dot; a regular expression that must match the full dotted name (without
            backreferences, so that matching takes bounded time); "all-linear" for every linear layer except a language
            model's output head and `modules_to_save`; None to choose by `model.config.model_type`.
        target_parameters: which parameters to adapt that a module's forward reads directly, such as expert tensors: a
            list of names, matched in the same way. "all-linear" includes expert tensors and packed attention weights.
        fused_parts: for linear layers that fuse several layers (such as query, key and value), the number of equal
            parts, or the number of outputs of each part, keyed by the end of the layer's name: {"c_attn": 3},
            {"qkv_proj": [64, 32, 32]}. Each part has a separate d and B, as if it were a separate layer.
        exclude_modules: layers not to adapt: a list of names or a regular expression, matched in the same way.
        layers_to_transform: indices of the layers in the stack to adapt; None for all.
        layers_pattern: name or names of the `nn.ModuleList` that `layers_to_transform` indexes; None for any.
        rank_pattern: the rank to use instead of `r`, keyed by a regular expression, for layers whose dotted name ends
            in a match of it.
        modules_to_save: names of modules to train in full and save with the adapter. None selects the new head of a
            classification model; an empty list selects nothing.
        d_initial: initial value of each d (the paper's Table 6); b starts at zero.
        vera_dropout: probability of dropout on the adapter's input, in [0, 1).
        bias: which biases to train: "none", "all", or those of the adapted layers ("vera_only").
        init_weights: if False, b is initialized to ones and d randomly, so that a new adapter changes the model; for
            tests.
        projection_prng_key: 64-bit key from which the frozen projections A and B are drawn.
        projection: "per_dimension" for dense projections, drawn for each width; "blocks" for block-sparse ones, which
            are cheaper to compute with; or "peft" for slices of one pair, as wide as the widest layers, with the
            values that PEFT draws.
        projection_blocks: the number of blocks of projection="blocks", from 1 to 64 and at most r.
        save_projection: write A and B to the adapter's file. Loading does not need them, because they are drawn from
            the key.
        route: how to compute layers: "auto" (the cheapest way for each shape), "factored" or "dense".
        memory: which intermediate results to keep for the backward pass: "fast" keeps all that save time, "low" as few
            as possible, "balanced" those that are small compared with the model's activations.
        task_type: one of SEQ_CLS, TOKEN_CLS, QUESTION_ANS, CAUSAL_LM, SEQ_2_SEQ_LM, FEATURE_EXTRACTION, or None.
        inference_mode: freeze the adapter.
        base_model_name_or_path: name or path of the base model; filled in by `get_peft_model`.
        revision: the base model's revision.

    Raises:
        TypeError, ValueError: an invalid value or combination of values; the message names the field, the value and
            the allowed values.
    """

    task_type: str | None = setting(None, check.task_type, peft="any", train=False)
    inference_mode: bool = setting(False, check.boolean, peft="any", train=False)
    base_model_name_or_path: str | None = setting(None, check.text, peft="any", train=False)
    revision: str | None = setting(None, check.text, peft="any", train=False)

    def __post_init__(self) -> None:
        for name, known in settings_of(self).items():
            setattr(self, name, known.check(name, getattr(self, name)))
        self._check_combinations()

    @classmethod
    def names_with(cls, **roles: Any) -> list[str]:
        """Return the names of the fields whose metadata (`Setting`) has these values."""
        return [
            name
            for name, known in settings_of(cls).items()
            if all(getattr(known, role) == value for role, value in roles.items())
        ]

    def __getattr__(self, name: str) -> NoReturn:
        if name in _ASKED_BY_PEFT:
            raise AttributeError(
                f"a veratune.VeraConfig has no {name!r}: it only works with veratune.get_peft_model. For PEFT's"
                " functions, call install() of veratune.integrations.peft and use its VeratuneConfig, which has the"
                " same fields"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _check_combinations(self) -> None:
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} only applies to layers_to_transform, which is None:"
                " set layers_to_transform, or leave layers_pattern out"
            )
        if self.layers_to_transform is not None and self._is_regex():
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be combined with the regular expression"
                f" target_modules={self.target_modules!r}: put the indices into the expression, or use a list of names"
            )
        if self.route == "dense" and self.vera_dropout > 0.0:
            raise ValueError(
                f"route='dense' cannot be combined with vera_dropout={self.vera_dropout!r}: with one"
                " combined weight, dropout cannot act on the adapter's input alone. Use route='auto', or"
                " vera_dropout=0.0"
            )
        if SCHEMES[self.projection].one_rank_linear_only and self.fused_parts:
            raise ValueError(
                f"fused_parts={self.fused_parts!r} cannot be combined with projection={self.projection!r}, which has"
                " a single d per layer: use projection='per_dimension', or leave fused_parts out"
            )
        if SCHEMES[self.projection].one_rank_linear_only and self.rank_pattern:
            raise ValueError(
                f"rank_pattern={self.rank_pattern!r} cannot be combined with projection={self.projection!r}, whose A"
                " and B have a single rank for all layers: use projection='per_dimension', or leave rank_pattern out"
            )

        if "projection_blocks" not in SCHEMES[self.projection].settings:
            if self.projection_blocks != VeraConfig.projection_blocks:
                raise ValueError(
                    f"projection_blocks={self.projection_blocks!r} has no effect with projection={self.projection!r}:"
                    " use projection='blocks', or leave projection_blocks out"
                )
        elif self.projection_blocks > (rank := min([self.r, *self.rank_pattern.values()])):
            raise ValueError(
                f"projection_blocks={self.projection_blocks!r} needs a rank of at least this number, not {rank}: each"
                " rank reads and writes one block, so some blocks would have no rank. Use fewer blocks, or a higher"
                " rank"
            )

    def _is_regex(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules != "all-linear"

    @property
    def peft_type(self) -> str:
        """The type that distinguishes veratune's files from PEFT's."""
        return PEFT_TYPE

    def names_only(self) -> bool:
        """Return whether every expression in this configuration is a plain name, or names joined by "|"."""
        texts = [self.target_modules, self.exclude_modules, *self.rank_pattern]
        stacks = self.layers_pattern
        texts += [stacks] if isinstance(stacks, str) else stacks or []
        return all(pattern(text).is_list for text in texts if isinstance(text, str))

    def rank_of(self, name: str) -> int:
        """Return the rank for the layer with this dotted name: the first match in `rank_pattern`, or `r`."""
        return next((rank for key, rank in self.rank_pattern.items() if ends_in_match(name, key)), self.r)

    def replace(self, **changes: Any) -> "VeraConfig":
        """Return a validated copy with these fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-serializable values, with `peft_type` first."""
        return {"peft_type": PEFT_TYPE, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "VeraConfig":
        """Create a configuration from the result of `to_dict`.

        Raises:
            ValueError: a different `peft_type`, or an unknown field.
        """
        values = dict(values)
        peft_type = values.pop("peft_type", PEFT_TYPE)
        if peft_type != PEFT_TYPE:
            raise ValueError(
                f"peft_type={clipped(repr(peft_type), LONGEST_VALUE)} does not belong to a veratune configuration,"
                f" whose peft_type is {PEFT_TYPE!r}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            shown = clipped(str(unknown), LONGEST_VALUE)
            raise ValueError(f"unknown configuration fields {shown}: the allowed fields are {sorted(known)}")
        return cls(**values)


VeRAConfig = VeraConfig


def ends_in_match(name: str, key: str) -> bool:
    """Return whether a dotted name, or the part of it after any dot, matches a regular expression."""
    return pattern(key).matches_end(name)
