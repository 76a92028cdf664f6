"""Plan an adapter: check everything before the model is changed."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from veratune.adapters.default_targets import resolve_config
from veratune.adapters.names import base_modules, unwrapped
from veratune.adapters.target import Target
from veratune.adapters.target_errors import check_conflicts
from veratune.adapters.targets import find_targets
from veratune.config import VeraConfig, check_config
from veratune.layers import InputGroup, SavedModule
from veratune.layers.biases import bias_owners
from veratune.layers.input_cache import InputCache
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import SCHEMES, Scheme
from veratune.utils.text import notify


@dataclass(frozen=True)
class AdapterPlan:
    """Everything needed to add an adapter to a model.

    Attributes:
        config: the configuration, with all values that depend on the model filled in.
        targets: the layers that the adapter adapts.
        scheme: its projections.
        bias_owners: the name of each bias that it trains, mapped to the modules that hold this bias.
    """

    config: VeraConfig
    targets: list[Target]
    scheme: Scheme
    bias_owners: dict[str, list[nn.Module]] = field(default_factory=dict)

    @cached_property
    def groups(self) -> dict[str, InputGroup]:
        """The input group of each target, by the target's name."""
        return input_groups(self.targets, self.scheme)


def plan_adapter(model: nn.Module, config: VeraConfig, scheme: Scheme | None = None) -> AdapterPlan:
    """Plan an adapter for a model, without changing the model. All errors in the configuration are raised here.

    Args:
        model: the model without a wrapper; it may already have adapters.
        config: the configuration; not changed.
        scheme: projections read from a file, instead of those that the configuration describes.

    Raises:
        TargetError: the configuration matches nothing in this model.
    """
    check_config(config)
    resolved = resolve_config(model, config, notify)
    targets = find_targets(model, resolved, notify)
    modules = base_modules(model)
    check_conflicts(modules, resolved.modules_to_save or [], [target.name for target in targets])
    owners = bias_owners(modules_with_biases(modules, resolved, {target.name for target in targets}))
    return AdapterPlan(resolved, targets, scheme or make_scheme(resolved, targets), owners)


def make_scheme(config: VeraConfig, targets: Sequence[Target]) -> Scheme:
    """Return the scheme that a configuration describes for these layers."""
    scheme = SCHEMES[config.projection]
    return scheme.for_layers(
        key=config.projection_prng_key,
        r=config.r,
        max_in=max(target.in_features for target in targets),
        max_out=max(target.out_features for target in targets),
        **{name: getattr(config, name) for name in scheme.settings},
    )


def modules_with_biases(
    modules: Mapping[str, nn.Module], config: VeraConfig, adapted: Collection[str]
) -> list[tuple[str, nn.Module]]:
    """Return the modules whose biases a configuration trains, by name.

    Args:
        modules: the result of `base_modules` for the model.
        config: the configuration.
        adapted: the names of the adapted layers.
    """
    saved = config.modules_to_save or []
    return [
        (name, module if isinstance(module, SavedModule) else unwrapped(module))
        for name, module in modules.items()
        if (config.bias == "all" or (config.bias == "vera_only" and name in adapted))
        and not any(name == top or name.startswith(f"{top}.") for top in saved)
    ]


def input_groups(targets: Sequence[Target], scheme: Scheme) -> dict[str, InputGroup]:
    """Return the input group of each target, shared by targets of one parent module with the same input width and rank.

    Layers of one parent module often read the same input (query, key, value). Correctness does not depend on this,
    because the shared cache compares inputs.
    """

    def key(target: Target) -> tuple[str, int, int]:
        return target.name.rpartition(".")[0], target.in_features, target.r

    sizes = Counter(key(target) for target in targets)
    groups: dict[tuple[str, int, int], InputGroup] = {}
    for target in targets:
        if key(target) not in groups:
            view = projection_pool.view(scheme, "A", target.r, target.in_features)
            groups[key(target)] = InputGroup(view, InputCache(), sizes[key(target)])
    return {target.name: groups[key(target)] for target in targets}


def vector_dtype(weight_dtype: torch.dtype, *, autocast: bool) -> torch.dtype:
    """Return the dtype of the vectors for a weight: that of the weight, or float32 if it is quantized.

    With `autocast`, also float32 if the weight is in half precision.
    """
    half = weight_dtype in (torch.float16, torch.bfloat16)
    wide = not weight_dtype.is_floating_point or weight_dtype.itemsize < 2 or (half and autocast)
    return torch.float32 if wide else weight_dtype
