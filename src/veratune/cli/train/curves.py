"""Plot the losses and metrics of a training run."""

from pathlib import Path
from typing import Any

from veratune.cli.train.metrics import evaluated

# The window of the training loss's moving average, as a share of the steps so far.
_WINDOW = 0.05


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Plot the training loss and the evaluations over the steps, if matplotlib is installed.

    Args:
        history: a trainer's log.
        path: the PNG file.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return
    trained = [(entry["step"], float(entry["loss"])) for entry in history if "loss" in entry]
    evaluations = [(entry["step"], evaluated(entry)) for entry in history if "eval_loss" in entry]
    names = sorted({name for _, values in evaluations for name in values} - {"loss"})
    figure = Figure(figsize=(9 if names else 5, 3.5), layout="constrained")
    panels = figure.subplots(1, 2 if names else 1, squeeze=False)[0]
    if trained:
        steps, losses = zip(*trained, strict=True)
        panels[0].plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
        panels[0].plot(steps, _smooth(losses), color="C0", label="training (running mean)")
    points = [(step, values["loss"]) for step, values in evaluations if "loss" in values]
    if points:
        panels[0].plot(*zip(*points, strict=True), color="C1", label="evaluation", marker="o")
    panels[0].set(title="loss", xlabel="step")
    if trained or points:
        panels[0].legend()
    if names:
        for name in names:
            points = [(step, values[name]) for step, values in evaluations if name in values]
            panels[1].plot(*zip(*points, strict=True), label=name, marker="o")
        panels[1].set(title="evaluation", xlabel="step")
        panels[1].legend()
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Return the moving average of values."""
    width = max(1, round(_WINDOW * len(values)))
    parts = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]
