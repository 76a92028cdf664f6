"""Peak memory of the same training steps: bytes of live tensors in addition to those held between steps.

    python benchmarks/memory.py --shape MiniLM --ranks 256

What an adapter adds is its step's peak less that of the frozen backbone's step. What it holds between steps, which are
its vectors and the projections, is told apart.
"""

from dataclasses import replace
from pathlib import Path

from common import Benchmark, Case, Table, Target, new_case, progress
from models import FROZEN, OURS, OURS_LOW, PEFT_VERA, SHAPES, VARIANTS, Shape, Step, held_bytes, make_variant
from veratune.utils.timing import peak_bytes

MAIN_VARIANTS = (FROZEN, PEFT_VERA, OURS, OURS_LOW)


def measure(name: str, shape: Shape, r: int, variants: list[str]) -> Case:
    """Record the peaks of some variants at one rank, after a small step that draws the projections."""
    case = new_case(f"{name} r={r}", shape=name, r=r, batch=[shape.batch, shape.length], peak={}, held={})
    base = shape.build()
    for variant in variants:
        step = Step(make_variant(variant, base, r), shape)
        Step(step.model, replace(shape, batch=1))()  # so that the projections are there
        step.clear()
        case["peak"][variant] = peak_bytes(step)
        case["held"][variant] = held_bytes(step.model)
    return case


def added(case: Case, variant: str) -> float | None:
    """Return the increase over the frozen backbone's peak, relative to that of PEFT's VeRA."""
    peak = case["peak"]
    if variant not in peak or PEFT_VERA not in peak:
        return None
    return (peak[variant] - peak[FROZEN]) / (peak[PEFT_VERA] - peak[FROZEN])


def tables(cases: list[Case]) -> list[Table]:
    """Return a table for each shape and rank."""
    return [_table(case) for case in cases]


def _table(case: Case) -> Table:
    peak, held = case["peak"], case["held"]
    rows = [
        (
            variant,
            f"{peak[variant] / 1e6:.1f}",
            f"{(peak[variant] - peak[FROZEN]) / 1e6:.1f}",
            "-" if added(case, variant) is None else f"{100 * added(case, variant):.0f} %",
            f"{(held[variant] - held[FROZEN]) / 1e6:.1f}",
        )
        for variant in peak
    ]
    title = f"{case['shape']}, r = {case['r']}, batch {case['batch'][0]} x {case['batch'][1]}"
    return Table(title, ("", "peak MB", "added MB", "of PEFT VeRA's", "held between steps, added MB"), rows)


def targets(cases: list[Case]) -> list[Target]:
    """Return the targets, at each shape and rank."""
    found = []
    for case in cases:
        for variant, limit in ((OURS, 35), (OURS_LOW, 12)):
            share = added(case, variant)
            figure = None if share is None else 100 * share
            what = f"{case['shape']}, r = {case['r']}: {variant}, added peak relative to PEFT VeRA's"
            found.append(Target(what, figure, limit, unit=" %"))
    return found


def plot(cases: list[Case], path: Path) -> None:
    """Draw a panel of bars for each shape and rank."""
    import plots

    figure, axes = plots.panels(len(cases), width=5.2)
    for panel, case in zip(axes, cases, strict=True):
        names = [name for name in case["peak"] if name != FROZEN]
        values = [(case["peak"][name] - case["peak"][FROZEN]) / 1e6 for name in names]
        plots.bars(panel, names, values, label="{:.1f}")
        panel.set_title(f"{case['shape']}, r = {case['r']}")
        panel.set_xlabel(f"MB added to the frozen step's peak of {case['peak'][FROZEN] / 1e6:.0f} MB")
    plots.save(figure, path)


BENCHMARK = Benchmark("memory", tables, targets, plot)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="MiniLM")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 64 256 1024; quick: 256")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all; quick: the four main ones")
    options = BENCHMARK.parse(parser)
    ranks = options.ranks or ([256] if options.quick else [64, 256, 1024])
    variants = options.variants or list(MAIN_VARIANTS if options.quick else VARIANTS)
    for r in ranks:
        progress(f"memory: {options.shape}, r = {r}")
        BENCHMARK.finish([measure(options.shape, SHAPES[options.shape], r, variants)], options.output)


if __name__ == "__main__":
    main()
