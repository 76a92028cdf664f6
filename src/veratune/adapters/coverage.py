"""A table of all weights of a model that shows which of them VeRA can adapt."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from veratune.adapters.default_targets import resolve_config
from veratune.adapters.names import base_modules, joined, unwrapped
from veratune.adapters.target import TargetError
from veratune.adapters.targets import find_targets
from veratune.config import VeraConfig
from veratune.layers.registry import (
    adaptable_parameters,
    find_layer_class,
    geometry,
    layer_class,
    weight_name,
    why_not_adaptable,
    why_not_parameter,
)

By = Literal["all-linear", "target_modules", "target_parameters", "bias", ""]


@dataclass(frozen=True)
class WeightInfo:
    """One weight of a model.

    Attributes:
        name: its dotted name; the layer's name if the weight is not a plain parameter.
        kind: the layer kind ("linear", "convolution", "embedding"), "parameter" (read by its module's forward) or
            "vector".
        module: the class of the module that holds it.
        shape: its shape; for a quantized layer, that of the dequantized matrix.
        by: the setting that adapts it: "all-linear"; "target_modules" or "target_parameters", if it must be listed
            there; "bias", which trains it in full; or "" if it cannot be adapted.
        why_not: the reason why it cannot be adapted.
    """

    name: str
    kind: str
    module: str
    shape: tuple[int, ...]
    by: By
    why_not: str = ""

    @property
    def adaptable(self) -> bool:
        """Whether VeRA can adapt it."""
        return self.by not in ("bias", "")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class SupportTable(list[WeightInfo]):
    """All weights of a model; printed as a table."""

    def coverage(self, by: tuple[By, ...] = ("all-linear", "target_modules", "target_parameters")) -> float:
        """Return the fraction of the elements of all matrices (not vectors) that these settings adapt."""
        matrices = [info for info in self if info.kind != "vector"]
        return sum(info.size for info in matrices if info.by in by) / max(1, sum(info.size for info in matrices))

    def __str__(self) -> str:
        rows = [("weight", "kind", "module", "shape", "adapted by")]
        rows += [
            (info.name, info.kind, info.module, "x".join(map(str, info.shape)), info.by or f"nothing: {info.why_not}")
            for info in self
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        return "\n".join(lines)


def supported(model: nn.Module) -> SupportTable:
    """Return all weights of a model, each with the setting that adapts it or the reason why it cannot be adapted.

    Args:
        model: any module, with or without adapters on it.
    """
    reached = _reached(model)
    table = SupportTable()
    seen: set[int] = set()
    computed: list[str] = []
    for name, module in base_modules(model).items():
        base = unwrapped(module)
        if any(name.startswith(f"{layer}.parametrizations") for layer in computed):
            continue  # already listed with the weight computed from it
        if why_not_adaptable(base) is None and base._parameters.get(weight_name(base)) is None and id(base) not in seen:
            size = geometry(base)
            by: By = "all-linear" if name in reached else "target_modules"
            shape = (size.out_features, size.in_features)
            table.append(WeightInfo(name, layer_class(base).kind, type(base).__name__, shape, by))
            computed.append(name)
        seen.add(id(base))
        for parameter_name, parameter in base._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                table.append(_info(name, base, parameter_name, parameter, reached))
    return table


def _reached(model: nn.Module) -> set[str]:
    """Return the names that "all-linear" adapts."""
    try:
        config = resolve_config(model, VeraConfig(r=1, target_modules="all-linear"), lambda _: None)
        return {target.name for target in find_targets(model, config, lambda _: None)}
    except TargetError:
        return set()


def _info(name: str, module: nn.Module, parameter_name: str, parameter: nn.Parameter, reached: set[str]) -> WeightInfo:
    full, class_name = joined(name, parameter_name), type(module).__name__
    shape = () if nn.parameter.is_lazy(parameter) else tuple(parameter.shape)
    is_weight = parameter_name == weight_name(module)
    if is_weight and why_not_adaptable(module) is None:
        by: By = "all-linear" if name in reached else "target_modules"
        size = geometry(module)
        if math.prod(shape) != size.in_features * size.out_features:  # quantized
            shape = (size.out_features, size.in_features)
        return WeightInfo(full, layer_class(module).kind, class_name, shape, by)
    if nn.parameter.is_lazy(parameter):
        return WeightInfo(full, "parameter", class_name, (), "", "it is a lazy parameter, which has no shape yet")
    if parameter.ndim < 2:
        trained: By = "bias" if parameter_name == "bias" else ""
        return WeightInfo(full, "vector", class_name, shape, trained, "" if trained else "it is not a matrix")
    if parameter_name in adaptable_parameters(module):
        return WeightInfo(full, "parameter", class_name, shape, "all-linear" if full in reached else "target_modules")
    reason = why_not_adaptable(module) if is_weight and find_layer_class(module) is not None else None
    reason = reason or why_not_parameter(module, parameter_name)
    return WeightInfo(full, "parameter", class_name, shape, "" if reason else "target_parameters", reason or "")
