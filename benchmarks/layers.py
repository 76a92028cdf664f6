"""Single layers of LLM shapes: the time of a forward pass, and of a training step, against PEFT's VeRA layer.

    python benchmarks/layers.py --tokens 1 16 128 --dtypes float32

Forward is inference without a graph; a step is forward and backward to the input and to the vectors. Both libraries
run in their default settings.
"""

import itertools
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import veratune
from common import Benchmark, Case, Table, Target, Work, interleave, median_ratio, new_case, progress

SHAPES = ((2048, 5632), (5632, 2048), (4096, 11008), (11008, 4096))
RANKS = (64, 256, 1024)
TOKENS = (1, 16, 128, 512, 2048, 4096)
DTYPES = ("float32", "bfloat16")
FROZEN, PEFT, OURS = "frozen layer", "PEFT VeRA", "veratune"
KINDS = ("forward", "step")


def adapted_layers(in_features: int, out_features: int, r: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return one frozen layer, alone and within either library's adapted one."""
    base = nn.Linear(in_features, out_features, bias=False).to(dtype).requires_grad_(False)
    theirs = peft.get_peft_model(nn.Sequential(base), peft.VeraConfig(r=r, target_modules=["0"]))
    ours = veratune.get_peft_model(nn.Sequential(base), veratune.VeraConfig(r=r, target_modules=["0"]))
    layers = {FROZEN: base, PEFT: theirs.base_model.model[0], OURS: ours.base_model[0]}
    for name in (PEFT, OURS):
        nn.init.constant_(layers[name].vera_lambda_b["default"], 0.01)
    return layers


def forward_of(layer: nn.Module, x: Tensor) -> Work:
    """Return a function that runs a layer without a graph."""
    constant = x.detach()

    def forward() -> None:
        with torch.no_grad():
            layer(constant)

    return forward


def step_of(layer: nn.Module, x: Tensor, gradient: Tensor) -> Work:
    """Return a function that runs a layer forward, and backward to its input and vectors."""
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, gradient)


def measure(shape: tuple[int, int], r: int, tokens: int, dtype_name: str, rounds: int) -> Case:
    """Time the three layers at one point of the grid."""
    n, m = shape
    case = new_case(f"{n}->{m} r={r} T={tokens} {dtype_name}", shape=shape, r=r, tokens=tokens, dtype=dtype_name)
    dtype = getattr(torch, dtype_name)
    layers = adapted_layers(n, m, r, dtype)
    x, gradient = torch.randn(tokens, n).to(dtype).requires_grad_(), torch.randn(tokens, m).to(dtype)
    forwards = {name: forward_of(layer, x) for name, layer in layers.items()}
    steps = {name: step_of(layer, x, gradient) for name, layer in layers.items()}
    return case | {
        "forward": interleave(forwards, rounds, least_seconds=0.01),
        "step": interleave(steps, rounds, least_seconds=0.01),
    }


def to_peft(case: Case, kind: str) -> float:
    """Return veratune's time relative to PEFT's."""
    return median_ratio(case[kind], OURS, PEFT)


def tables(cases: list[Case]) -> list[Table]:
    """Return a table for each dtype."""
    return [
        _table(dtype, [case for case in cases if case["dtype"] == dtype])
        for dtype in DTYPES
        if any(case["dtype"] == dtype for case in cases)
    ]


def _table(dtype: str, cases: list[Case]) -> Table:
    rows = []
    for case in sorted(cases, key=lambda case: (list(case["shape"]), case["r"], case["tokens"])):
        cells = [f"{case['shape'][0]} -> {case['shape'][1]}", str(case["r"]), str(case["tokens"])]
        for kind in KINDS:
            milliseconds = [1e3 * statistics.median(case[kind][name]) for name in (FROZEN, PEFT, OURS)]
            cells += [*(f"{value:.3g}" for value in milliseconds), f"{to_peft(case, kind):.2f}"]
        rows.append(cells)
    columns = [f"{kind}: {what}" for kind in KINDS for what in ("frozen ms", "PEFT ms", "veratune ms", "of PEFT's")]
    return Table(dtype, ("in -> out", "r", "T", *columns), rows)


def targets(cases: list[Case]) -> list[Target]:
    """Return the targets: never slower than PEFT."""
    found = []
    for kind in KINDS:
        worst = max(cases, key=lambda case: to_peft(case, kind))
        share = 100 * sum(to_peft(case, kind) <= 1 for case in cases) / len(cases)
        found.append(Target(f"{kind}: points of {len(cases)} not slower than PEFT", share, 100, True, " %"))
        found.append(Target(f"{kind}: the slowest point relative to PEFT, {worst['key']}", to_peft(worst, kind), 1.0))
    return found


def plot(cases: list[Case], path: Path) -> None:
    """Draw a panel for each kind and dtype: the range over the shapes and its median, against the tokens."""
    import plots

    panels = [(kind, dtype) for dtype in DTYPES for kind in KINDS if any(case["dtype"] == dtype for case in cases)]
    figure, axes = plots.panels(len(panels), columns=2)
    for panel, (kind, dtype) in zip(axes, panels, strict=True):
        for index, r in enumerate(sorted({case["r"] for case in cases})):
            found: dict[int, list[float]] = {}
            for case in cases:
                if case["dtype"] == dtype and case["r"] == r:
                    found.setdefault(case["tokens"], []).append(to_peft(case, kind))
            xs = sorted(found)
            plots.line(panel, index, xs, [statistics.median(found[x]) for x in xs], f"r = {r}")
            low, high = [min(found[x]) for x in xs], [max(found[x]) for x in xs]
            panel.fill_between(xs, low, high, color=plots.CYCLE[index % 6], alpha=0.15, linewidth=0)
        panel.axhline(1, color="black", linewidth=1)
        panel.set(title=f"{kind}, {dtype}", ylabel="time relative to PEFT VeRA's")
        plots.ticks(panel, sorted({case["tokens"] for case in cases}), "tokens")
        plots.from_zero(panel)
    axes[0].legend()
    plots.save(figure, path)


BENCHMARK = Benchmark("layers", tables, targets, plot)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--shapes", type=_shape, nargs="+", help="as 2048x5632; default: all four; quick: one")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 64 256 1024; quick: 256")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1 to 4096; quick: 1 16 128 512")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, help="default: 7; quick: 5")
    parser.add_argument("--budget", type=float, default=float("inf"), help="begin no point after so many seconds")
    options = BENCHMARK.parse(parser)
    shapes = options.shapes or (SHAPES[:1] if options.quick else SHAPES)
    ranks = options.ranks or ([256] if options.quick else RANKS)
    tokens = options.tokens or (TOKENS[:4] if options.quick else TOKENS)
    rounds = options.rounds or (5 if options.quick else 7)
    points = itertools.product(tokens, shapes, ranks, options.dtypes)
    BENCHMARK.finish(measure_within(options.budget, points, rounds), options.output)


def measure_within(budget: float, points: Iterable[tuple[int, tuple[int, int], int, str]], rounds: int) -> list[Case]:
    """Measure points until the time is spent."""
    end = time.monotonic() + budget
    cases = []
    for tokens, shape, r, dtype in points:
        if time.monotonic() > end:
            progress("layers: the time is spent")
            break
        cases.append(measure(shape, r, tokens, dtype, rounds))
        progress(
            f"layers: {cases[-1]['key']}: {', '.join(f'{k} {to_peft(cases[-1], k):.2f}' for k in KINDS)} of PEFT's"
        )
    return cases


def _shape(text: str) -> tuple[int, int]:
    n, m = text.split("x")
    return int(n), int(m)


if __name__ == "__main__":
    main()
