"""A table of the routes of an adapter's layers, with the costs of the alternatives."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from veratune.layers import VeraLayer
from veratune.layers.plan import are_wide
from veratune.ops.calibration import device_profile
from veratune.ops.costs import LayerShape
from veratune.ops.planning import Estimate, choose_route, estimate, possible_choices


@dataclass(frozen=True)
class LayerRoutes:
    """The routes of one layer for a number of tokens.

    Attributes:
        layer: its name.
        shape: its dimensions, the adapter's rank, and the tokens.
        chosen: the estimate of the route that the layer takes.
        alternatives: the estimates of all routes that its configuration allows, fastest first.
    """

    layer: str
    shape: LayerShape
    chosen: Estimate
    alternatives: list[Estimate]


class RouteTable(list[LayerRoutes]):
    """The routes of an adapter's layers. When printed, layers whose names differ only in numbers share a row."""

    def __str__(self) -> str:
        header = ("layer", "in", "out", "r", "tokens", "route", "GFLOP", "saved MB", "est. ms")
        rows: list[tuple[str, ...]] = [header]
        for name, routes in self._grouped():
            shape = routes.shape
            dimensions = (shape.in_features, shape.out_features, shape.r, shape.tokens)
            rows.append((name, *map(str, dimensions), *_cells(routes.chosen)))
            others = (e for e in routes.alternatives if e.choice != routes.chosen.choice)
            rows.extend(("", "", "", "", "", *_cells(other, mark="  or ")) for other in others)
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        left_aligned = (0, 5)
        lines = []
        for row in rows:
            padded = [
                cell.ljust(width) if i in left_aligned else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)

    def _grouped(self) -> list[tuple[str, LayerRoutes]]:
        """Return a name and one layer for each group of layers that differ only in the numbers in their names."""
        groups: dict[tuple[str, LayerShape, Estimate, tuple[Estimate, ...]], list[LayerRoutes]] = {}
        for routes in self:
            pattern = ".".join("*" if part.isdigit() else part for part in routes.layer.split("."))
            key = pattern, routes.shape, routes.chosen, tuple(routes.alternatives)
            groups.setdefault(key, []).append(routes)
        return [
            (members[0].layer if len(members) == 1 else f"{pattern} ({len(members)})", members[0])
            for (pattern, *_), members in groups.items()
        ]


def _cells(estimated: Estimate, mark: str = "") -> tuple[str, str, str, str]:
    return (
        f"{mark}{estimated.choice}",
        f"{estimated.flops / 1e9:.3f}",
        f"{estimated.saved_bytes / 1e6:.2f}",
        f"{estimated.seconds * 1e3:.3f}",
    )


def explain_routes(
    layers: Iterable[tuple[str, VeraLayer]],
    adapter_name: str,
    tokens: int,
    *,
    dtype: torch.dtype | None,
    device: torch.device | None,
    training: bool,
) -> RouteTable:
    """Return the routes of an adapter's layers.

    Args:
        layers: the adapted layers by name.
        adapter_name: the adapter's name.
        tokens: the product of an input's leading dimensions.
        dtype: the compute dtype; defaults to each layer's.
        device: the device; defaults to each layer's.
        training: whether the gradients of the vectors are needed.
    """
    table = RouteTable()
    for name, layer in layers:
        entry = layer.entries.get(adapter_name)
        if entry is None or entry.parts or not layer.chooses_route:
            continue  # the layer has only one route, or one for each part
        shape = replace(entry.shapes[0], tokens=tokens)
        weight_dtype = layer.base_weight.dtype
        plain = weight_dtype.is_floating_point and weight_dtype.itemsize > 1
        layer_dtype = weight_dtype if plain else layer.vectors(adapter_name)["b"].dtype
        profile = device_profile(device or layer.base_weight.device, dtype or layer_dtype)
        route, memory = entry.settings.route, entry.settings.memory
        readable = layer.weight_readable(adapter_name)
        choices = possible_choices(
            route,
            memory,
            shape,
            training=training,
            weight_readable=readable,
            profile=profile,
        )
        estimates = sorted(
            (estimate(choice, shape, profile, training=training) for choice in choices), key=lambda e: e.seconds
        )
        wide = are_wide(layer.vectors(adapter_name).values(), dtype or layer_dtype)
        chosen = choose_route(
            route, memory, shape, profile, training=training, weight_readable=readable, wide_vectors=wide
        )
        table.append(LayerRoutes(name, shape, estimate(chosen, shape, profile, training=training), estimates))
    return table
