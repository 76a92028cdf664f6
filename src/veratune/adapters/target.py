"""A target of an adapter, and the error for a configuration without valid targets."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from veratune.adapters.names import ends_in
from veratune.config import VeraConfig
from veratune.layers import Geometry
from veratune.utils.text import clipped


@dataclass(frozen=True)
class Target:
    """A layer to adapt, or a parameter to adapt that its module's forward reads directly.

    Attributes:
        name: its dotted name; the first one if a module is used several times.
        module: the module, or the `VeraLayer` or `VeraModule` that wraps it for another adapter.
        parameter: the parameter's name in its module; None for a layer.
        r: the adapter's rank on it.
        geometry: its dimensions.
        parts: the number of outputs of each part of a fused layer, such as one for query, key and value.
    """

    name: str
    module: nn.Module
    parameter: str | None
    r: int
    geometry: Geometry
    parts: tuple[int, ...] = ()

    @property
    def in_features(self) -> int:
        return self.geometry.in_features

    @property
    def out_features(self) -> int:
        return self.geometry.out_features


class TargetError(ValueError):
    """The configuration does not match this model: a target is missing or cannot be adapted as requested."""

    def __init__(self, message: str) -> None:
        super().__init__(clipped(message))


def above_largest_rank(targets: Sequence[Target]) -> tuple[Target, int] | None:
    """Return the first target whose rank exceeds the largest rank that any target allows, with that limit; or None."""
    most = max(target.geometry.largest_rank for target in targets)
    return next(((target, most) for target in targets if target.r > most), None)


def parts_of(name: str, size: Geometry, config: VeraConfig) -> tuple[int, ...]:
    """Return the number of outputs of each part of a layer from `fused_parts`; empty if the layer is not listed there.

    Raises:
        TargetError: the parts do not add up to the layer's outputs.
    """
    keys = [key for key in config.fused_parts if ends_in(name, key)]
    if not keys:
        return ()
    key = max(keys, key=len)  # the most specific one
    parts = config.fused_parts[key]
    if not isinstance(parts, int):
        sizes = parts
    else:  # the number may be huge: do not create a list of this length unchecked
        sizes = [size.out_features // parts] * parts if parts <= size.out_features else []
    if sum(sizes) != size.out_features or 0 in sizes:
        raise TargetError(
            f"fused_parts[{key!r}]={parts!r} does not fit {name}, which has {size.out_features} outputs: use a number"
            f" of parts that divides {size.out_features}, or a list of sizes that add up to it"
        )
    return tuple(sizes)
