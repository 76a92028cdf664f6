"""How a training step's time and memory grow with the number of layers, with the rank, and with distinct shapes.

    python benchmarks/scaling.py

The model is a chain of linear layers of 512 x 512, for 512 tokens. "Distinct shapes" gives 32 such layers 1 to 32
different widths around 512, so that the number of operations stays about what it is.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common import Benchmark, Case, Table, Target, interleave, median_ratio, new_case, progress
from models import FROZEN, OURS, PEFT_VERA, held_bytes, make_variant
from veratune.utils.timing import peak_bytes

TOKENS = 512
WIDTH = 512
VARIANTS = (FROZEN, PEFT_VERA, OURS)


@dataclass(frozen=True)
class Size:
    """One point of a sweep."""

    layers: int = 16
    r: int = 256
    distinct: int = 1

    def widths(self) -> list[int]:
        """Return the widths along the chain: as many different ones as wanted, 16 apart, around `WIDTH`."""
        first = WIDTH - 8 * (self.distinct - 1)
        return [first + 16 * (index % self.distinct) for index in range(self.layers + 1)]


SWEEPS = {
    "layers": [Size(layers=layers) for layers in (4, 8, 16, 32)],
    "rank": [Size(r=r) for r in (16, 64, 256, 1024)],
    "distinct shapes": [Size(layers=32, distinct=distinct) for distinct in (1, 2, 4, 8, 16, 32)],
}


class Block(nn.Module):
    """A linear layer in a separate parent, as layers with one parent may be assumed to read the same input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.projection = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)


class Step:
    """Run forward, and backward to the input and the trainable parameters."""

    def __init__(self, model: nn.Module, widths: list[int]) -> None:
        self.model = model
        self.x = torch.randn(TOKENS, widths[0]).requires_grad_()
        self.gradient = torch.randn(TOKENS, widths[-1])
        self.wanted = [self.x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def __call__(self) -> None:
        torch.autograd.grad(self.model(self.x), self.wanted, self.gradient)


def measure(sweep: str, size: Size, rounds: int) -> Case:
    """Time the steps at one point of a sweep, and record their peaks."""
    case = new_case(f"{sweep}: {size}", sweep=sweep, layers=size.layers, r=size.r, distinct=size.distinct)
    widths = size.widths()
    base = nn.Sequential(*map(Block, widths[:-1], widths[1:])).requires_grad_(False)
    steps = {name: Step(make_variant(name, base, size.r, ["projection"]), widths) for name in VARIANTS}
    case["seconds"] = interleave(dict(steps), rounds)
    case["peak"] = {name: peak_bytes(step) for name, step in steps.items()}
    case["held"] = {name: held_bytes(step.model) for name, step in steps.items()}
    return case


def added_milliseconds(case: Case, variant: str) -> float:
    """Return by how much a variant's step is longer than the frozen one, for one layer."""
    pairs = zip(case["seconds"][variant], case["seconds"][FROZEN], strict=True)
    return 1e3 * statistics.median(own - frozen for own, frozen in pairs) / case["layers"]


def added_megabytes(case: Case, variant: str, kind: str) -> float:
    """Return the increase over the frozen step's peak, or over the memory held between steps."""
    return (case[kind][variant] - case[kind][FROZEN]) / 1e6


def tables(cases: list[Case]) -> list[Table]:
    """Return a table for each sweep."""
    header = (
        "",
        *(f"{name}: {what}" for name in (PEFT_VERA, OURS) for what in ("x frozen", "added ms a layer")),
        *(f"{name}: added MB, {what}" for name in (PEFT_VERA, OURS) for what in ("peak", "held")),
    )
    return [
        Table(f"By {sweep}", header, [_row(case) for case in cases if case["sweep"] == sweep])
        for sweep in SWEEPS
        if any(case["sweep"] == sweep for case in cases)
    ]


def _row(case: Case) -> list[str]:
    cells = [f"{case['layers']} layers, r = {case['r']}, {case['distinct']} shapes"]
    for name in (PEFT_VERA, OURS):
        cells += [f"{median_ratio(case['seconds'], name, FROZEN):.2f}", f"{added_milliseconds(case, name):.2f}"]
    for name in (PEFT_VERA, OURS):
        cells += [f"{added_megabytes(case, name, kind):.1f}" for kind in ("peak", "held")]
    return cells


def targets(cases: list[Case]) -> list[Target]:
    """Return the targets: the cost of a layer does not grow with the number of distinct shapes."""
    sweep = {case["distinct"]: case for case in cases if case["sweep"] == "distinct shapes"}
    if len(sweep) < 2:
        return []
    few, many = sweep[min(sweep)], sweep[max(sweep)]
    growth = added_milliseconds(many, OURS) / added_milliseconds(few, OURS)
    what = f"added time a layer with {many['distinct']} distinct shapes, relative to {few['distinct']}"
    return [Target(f"{what} (1.1: no growth but for noise)", growth, 1.1)]


def plot(cases: list[Case], path: Path) -> None:
    """Draw a panel of times and one of memory for each sweep."""
    import plots

    fields = {"layers": "layers", "rank": "r", "distinct shapes": "distinct"}
    sweeps = [sweep for sweep in SWEEPS if any(case["sweep"] == sweep for case in cases)]
    figure, axes = plots.panels(2 * len(sweeps), columns=len(sweeps))
    for column, sweep in enumerate(sweeps):
        chosen = [case for case in cases if case["sweep"] == sweep]
        xs = [case[fields[sweep]] for case in chosen]
        times, memory = axes[column], axes[len(sweeps) + column]
        for index, name in enumerate((OURS, PEFT_VERA)):
            plots.line(times, index, xs, [added_milliseconds(case, name) for case in chosen], name)
            plots.line(memory, index, xs, [added_megabytes(case, name, "peak") for case in chosen], name)
        times.set(ylabel="added ms a layer")
        memory.set(ylabel="added to the peak, MB")
        for panel in (times, memory):
            plots.ticks(panel, xs, sweep)
            plots.from_zero(panel)
    axes[0].legend()
    plots.save(figure, path)


BENCHMARK = Benchmark("scaling", tables, targets, plot)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, help="default: 7; quick: 3, at the ends of the sweeps")
    options = BENCHMARK.parse(parser)
    cases = []
    for sweep in options.sweeps:
        sizes = SWEEPS[sweep]
        for size in (sizes[0], sizes[-1]) if options.quick else sizes:
            progress(f"scaling: {sweep}: {size}")
            cases.append(measure(sweep, size, options.rounds or (3 if options.quick else 7)))
    BENCHMARK.finish(cases, options.output)


if __name__ == "__main__":
    main()
