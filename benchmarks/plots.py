"""Plots in colours that everybody can tell apart (Okabe and Ito), with markers that differ as well."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
GREY = "#999999"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
MARKERS = "osD^vX"

mpl.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
    }
)


def panels(count: int, width: float = 4.2, height: float = 3.4, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels side by side."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    flat = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in flat[count:]:
        unused.set_visible(False)
    return figure, flat[:count]


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], label: str = "{:.2f}") -> None:
    """Draw a horizontal bar for each variant from the top down, with its value."""
    drawn = axes.barh(range(len(names)), values, color=[colour_of(name) for name in names])
    axes.bar_label(drawn, [label.format(value) for value in values], padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.15)


def line(axes: Axes, index: int, xs: Sequence[float], ys: Sequence[float], label: str) -> None:
    """Draw one line in the colour and with the marker of its index."""
    axes.plot(xs, ys, color=CYCLE[index % 6], marker=MARKERS[index % 6], markersize=5, label=label)


def from_zero(axes: Axes) -> None:
    """Start the vertical axis at zero."""
    axes.set_ylim(0, 1.08 * axes.dataLim.y1)


def ticks(axes: Axes, xs: Sequence[float], label: str) -> None:
    """Give a logarithmic horizontal axis a tick for each measured value."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.set_xlabel(label)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=110)


def colour_of(variant: str) -> str:
    """Return the colour of a variant: veratune blue, PEFT's VeRA red, LoRA orange, all else grey."""
    if variant.startswith("veratune"):
        return BLUE if variant == "veratune" else SKY
    if "VeRA" in variant:
        return RED
    return ORANGE if "LoRA" in variant else GREY
