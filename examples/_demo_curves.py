"""The picture of the demo: training loss and test accuracy of all its methods."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from _demo_report import Run, Style, by_method
from _demo_training import History

SMOOTHING_STEPS = 20


def draw_curves(path: Path, runs: Sequence[Run], styles: Mapping[str, Style]) -> None:
    """Draw training loss and test accuracy over the steps, one line for each method, with the range of its seeds."""
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        loss_axes, accuracy_axes = figure.subplots(1, 2)
        loss_axes.set_title(f"Training loss, mean of the last {SMOOTHING_STEPS} steps")
        accuracy_axes.set_title("Test accuracy in percent")
        for method, same in by_method(runs).items():
            _draw_line(loss_axes, [_smoothed_losses(run.history) for run in same], method, styles[method])
            _draw_line(accuracy_axes, [_accuracies(run.history) for run in same], method, styles[method], marker="o")
        for axes in (loss_axes, accuracy_axes):
            axes.grid(alpha=0.25)
            axes.set_xlim(left=0)
            axes.set_xlabel("step")
        figure.legend(*loss_axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=150)


def _smoothed_losses(history: History) -> pd.Series:
    losses = pd.Series(history.losses, index=range(1, len(history.losses) + 1))
    return losses.rolling(min(SMOOTHING_STEPS, len(losses))).mean().dropna()


def _accuracies(history: History) -> pd.Series:
    steps, values = zip(*history.accuracies, strict=True)
    return pd.Series(values, index=steps)


def _draw_line(axes: Axes, curves: Sequence[pd.Series], label: str, style: Style, marker: str = "") -> None:
    """Draw the mean of the curves of several seeds, and a band from the lowest to the highest of them."""
    seeds = pd.concat(curves, axis="columns")
    mean, low, high = seeds.mean(axis="columns"), seeds.min(axis="columns"), seeds.max(axis="columns")
    axes.plot(mean.index, mean, style.line, color=style.color, marker=marker, markersize=4, label=label)
    axes.fill_between(mean.index, low, high, color=style.color, alpha=0.12, linewidth=0)
