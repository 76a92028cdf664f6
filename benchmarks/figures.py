"""Draw the pictures of README and docs/performance.md from committed results.

    python benchmarks/figures.py           writes docs/figures/*.svg
    python benchmarks/figures.py --check   only says which of them show other figures, and exits with 1 if any does

Every picture holds the figures that it shows, as JSON in its description, so that checking one does not draw it.
"""

import argparse
import html
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import headline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTORY = headline.REPOSITORY / "docs" / "figures"
DESCRIPTION = re.compile(r"<dc:description>(.*?)</dc:description>", re.DOTALL)
METHODS = {
    "veratune": ("steps:veratune", "steps:frozen backbone", "memory:veratune"),
    "veratune, 16 blocks": ("steps:veratune, 16 blocks", "steps:frozen backbone", "memory:veratune, 16 blocks"),
    "PEFT VeRA": ("steps-all:PEFT VeRA", "steps-all:frozen backbone", "memory:PEFT VeRA"),
    "PEFT LoRA r=8": ("steps:PEFT LoRA r=8", "steps:frozen backbone", "memory:PEFT LoRA r=8"),
    "full fine-tuning": ("steps-all:full fine-tuning", "steps-all:frozen backbone", "memory:full fine-tuning"),
}
SERVED = ("veratune", "bmm LoRA r=8", "PEFT LoRA r=8", "PEFT VeRA, by adapter")
COUNTS = (1, 2, 4, 8, 16, 32, 64)

Data = dict[str, Any]


def _figure(expression: str) -> float:
    return float(f"{headline.figure(expression, headline.load()['sources']):.5g}")


# What the pictures show


def accuracy_size() -> Data:
    """Return the size of the file and the mean and standard deviation of the accuracy, for all methods of the demo."""
    return {
        key: [_figure(f"{key}:file_bytes"), _figure(f"{key}:accuracy"), _figure(f"{key}:deviation")]
        for key in ("vera", "vera-qv", "lora", "lora-qv", "head", "full")
    }


def step_memory() -> Data:
    """Return the time of a step relative to the frozen one, and the bytes that it adds to that one's peak."""
    return {
        name: [_figure(f"{step} over {frozen}"), _figure(f"{peak} minus memory:frozen backbone")]
        for name, (step, frozen, peak) in METHODS.items()
    }


def many_adapters() -> Data:
    """Return the time of a batch relative to the base model's, by the number of adapters in it."""
    return {
        kind: {
            way: [_figure(f"{kind}:{way}, {count} adapters over {kind}:base model") for count in COUNTS]
            for way in SERVED
        }
        for kind in ("forward", "decode")
    }


# Drawing


def draw_accuracy_size(data: Data) -> "Figure":
    import plots

    figure, (axes,) = plots.panels(1, width=7.6, height=3.4)
    styles = {
        "vera": ("VeRA, all linear layers", plots.BLUE, (8, 8), "left"),
        "vera-qv": ("VeRA, query and value", plots.SKY, (8, -18), "left"),
        "lora": ("LoRA r = 8, all linear layers", plots.RED, (9, -1), "left"),
        "lora-qv": ("LoRA r = 8, query and value", plots.ORANGE, (5, -25), "left"),
        "head": ("classification head only", plots.GREY, (8, -3), "left"),
        "full": ("full fine-tuning", plots.GREEN, (0, 10), "right"),
    }
    for key, (size, accuracy, deviation) in data.items():
        label, colour, offset, side = styles[key]
        axes.errorbar(size, accuracy, deviation, color=colour, marker="o", markersize=7, capsize=3)
        axes.annotate(label, (size, accuracy), offset, textcoords="offset points", color=colour, ha=side, weight="bold")
    axes.set_xscale("log")
    axes.set_xticks([1e4, 1e5, 1e6, 1e7, 1e8], ["10 KB", "100 KB", "1 MB", "10 MB", "100 MB"])
    axes.set(xlabel="size of the file", ylabel="test accuracy, %", ylim=(63, 83), xlim=(2e3, 1.6e8))
    return figure


def draw_step_memory(data: Data) -> "Figure":
    import plots

    figure, (steps, memory) = plots.panels(2, width=5.4, height=2.7)
    names = list(data)
    plots.bars(steps, names, [data[name][0] for name in names])
    steps.axvline(1, color="black", linewidth=1)
    steps.set_xlabel("training step, relative to the frozen model's")
    plots.bars(memory, names, [data[name][1] / 1e6 for name in names], label="{:.0f}")
    memory.set_xlabel("memory added to the frozen step's peak, MB")
    return figure


def draw_many_adapters(data: Data) -> "Figure":
    import plots

    labels = {"bmm LoRA r=8": "LoRA r = 8, gathered matrices", "PEFT VeRA, by adapter": "PEFT VeRA, adapter by adapter"}
    figure, panels = plots.panels(2, width=5.2, height=3.2)
    for axes, (kind, ways) in zip(panels, data.items(), strict=True):
        for index, (way, times) in enumerate(ways.items()):
            plots.line(axes, index, COUNTS, times, labels.get(way, way))
        axes.axhline(1, color="black", linewidth=1)
        plots.ticks(axes, COUNTS, "adapters in the batch of 64 sequences")
        axes.set(title={"forward": "forward pass", "decode": "decoding step"}[kind], ylim=(0, 10))
        axes.set_ylabel("time relative to the base model's")
    panels[0].legend(frameon=False)
    return figure


PICTURES: dict[str, tuple[Callable[[], Data], Callable[[Data], "Figure"]]] = {
    "accuracy-size": (accuracy_size, draw_accuracy_size),
    "step-memory": (step_memory, draw_step_memory),
    "many-adapters": (many_adapters, draw_many_adapters),
}


def shown(path: Path) -> Data | None:
    """Return the figures that a picture shows; None if there is no picture."""
    found = DESCRIPTION.search(path.read_text(encoding="utf-8")) if path.exists() else None
    return None if found is None else json.loads(html.unescape(found[1]))


def save(figure: "Figure", path: Path, data: Data) -> None:
    """Write a picture that is the same for the same figures, with a white background on dark pages as well."""
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)

    with mpl.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Description": json.dumps(data), "Date": None, "Creator": None})
    # matplotlib ends some lines with blanks
    path.write_text(re.sub(r" +$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="draw nothing")
    options = parser.parse_args()
    differing = []
    for name, (collect, draw) in PICTURES.items():
        path, data = DIRECTORY / f"{name}.svg", collect()
        if shown(path) == data:
            continue
        differing.append(name)
        print(f"{path.relative_to(headline.REPOSITORY)} {'differs' if options.check else 'written'}")
        if not options.check:
            save(draw(data), path, data)
    sys.exit(1 if options.check and differing else 0)


if __name__ == "__main__":
    main()
