"""A table of the routes that an adapter's layers take, with what each alternative would have cost."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from veratune.layers import VeraLayer
from veratune.ops.calibration import device_profile
from veratune.ops.costs import LayerShape
from veratune.ops.planning import Estimate, choose_route, estimate, possible_choices


@dataclass(frozen=True)
class LayerRoutes:
    """One layer's routes for a number of tokens.

    Attributes:
        layer: its name.
        shape: its dimensions, the adapter's rank, and the tokens.
        chosen: the estimate of the plan that it takes.
        alternatives: the estimates of all plans that its configuration allows, the fastest first.
    """

    layer: str
    shape: LayerShape
    chosen: Estimate
    alternatives: list[Estimate]


class RouteTable(list[LayerRoutes]):
    """The routes of all layers of an adapter; printed as a table, where layers that differ in numbers share a row."""

    def __str__(self) -> str:
        header = ("layer", "in", "out", "r", "tokens", "route", "GFLOP", "saved MB", "est. ms")
        rows: list[tuple[str, ...]] = [header]
        for name, routes in self._grouped():
            shape = routes.shape
            dimensions = (shape.in_features, shape.out_features, shape.rank, shape.tokens)
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
        """Return a name for each group of layers that differ in nothing but numbers in their names, and one of them."""
        groups: dict[tuple[str, LayerShape, Estimate, tuple[Estimate, ...]], list[LayerRoutes]] = {}
        for routes in self:
            kind = ".".join("*" if part.isdigit() else part for part in routes.layer.split("."))
            key = kind, routes.shape, routes.chosen, tuple(routes.alternatives)
            groups.setdefault(key, []).append(routes)
        return [
            (own[0].layer if len(own) == 1 else f"{kind} ({len(own)})", own[0]) for (kind, *_), own in groups.items()
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
        adapter_name: which adapter.
        tokens: the product of an input's leading dimensions.
        dtype: the compute dtype; the layer's own where None.
        device: the device; the layer's own where None.
        training: whether the vectors' gradients are wanted.
    """
    table = RouteTable()
    for name, layer in layers:
        entry = layer.entries.get(adapter_name)
        if entry is None or entry.parts or not layer.chooses_route:
            continue  # there is one way only to compute it, or its module decides
        shape = replace(entry.shapes[0], tokens=tokens)
        own = layer.base_weight.dtype
        number = own if own.is_floating_point and own.itemsize > 1 else layer.vectors(adapter_name)[0].dtype
        profile = device_profile(device or layer.base_weight.device, dtype or number)
        route, memory = entry.settings.route, entry.settings.memory
        at_hand = layer.weight_readable(adapter_name)
        choices = possible_choices(
            route,
            memory,
            shape,
            training=training,
            weight_readable=at_hand,
            device_type=profile.device_type,
        )
        estimates = sorted(
            (estimate(choice, shape, profile, training=training) for choice in choices), key=lambda e: e.seconds
        )
        chosen = choose_route(route, memory, shape, profile, training=training, weight_readable=at_hand)
        table.append(LayerRoutes(name, shape, next(e for e in estimates if e.choice == chosen), estimates))
    return table
