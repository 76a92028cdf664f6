"""Complete training steps: the frozen backbone, full fine-tuning, PEFT's VeRA and LoRA, and veratune in all settings.

    python benchmarks/steps.py --shape MiniLM --ranks 256

Every linear layer is adapted. Times are relative to the frozen backbone's step, forward and backward to the inputs,
below which no fine-tuning of all layers can come.
"""

from pathlib import Path

from common import Benchmark, Case, Figure, Table, Target, interleave, median_ratio, new_case, progress, ratios
from models import (
    FROZEN,
    FULL,
    LORA_8,
    OURS,
    OURS_BLOCKS_8,
    OURS_BLOCKS_16,
    PEFT_VERA,
    SHAPES,
    VARIANTS,
    Shape,
    Step,
    make_variant,
)

MAIN_VARIANTS = (FROZEN, FULL, PEFT_VERA, LORA_8, OURS)


def measure(name: str, shape: Shape, r: int, variants: list[str], rounds: int) -> Case:
    """Time the steps of some variants at one rank."""
    case = new_case(f"{name} r={r}", shape=name, r=r, batch=[shape.batch, shape.length])
    base = shape.build()
    steps = {variant: Step(make_variant(variant, base, r), shape) for variant in variants}
    return case | {"seconds": interleave(dict(steps), rounds)}


def tables(cases: list[Case]) -> list[Table]:
    """Return a table for each shape and rank."""
    return [_table(case) for case in cases]


def _table(case: Case) -> Table:
    times = case["seconds"]
    rows = []
    for variant in times:
        ratio = Figure.of(ratios(times, variant, FROZEN))
        seconds = Figure.of(times[variant]).median
        to_peft = median_ratio(times, PEFT_VERA, variant) if PEFT_VERA in times else float("nan")
        quartiles = f"{ratio.low:.2f}-{ratio.high:.2f}"
        fastest = min(times[variant])
        rows.append((variant, f"{seconds:.3f}", f"{ratio.median:.2f}", quartiles, f"{to_peft:.2f}", f"{fastest:.3f}"))
    batch, length = case["batch"]
    title = (
        f"{case['shape']}, r = {case['r']}, batch {batch} x {length}, {len(times[FROZEN])} rounds"
        f" (load {case['load']:.2f} at the start)"
    )
    return Table(title, ("", "seconds", "x frozen", "quartiles", "x faster than PEFT VeRA", "fastest round, s"), rows)


# rank: (ratio to the frozen step at most, times faster than PEFT's VeRA at least)
LIMITS = {256: (1.45, 2.0), 1024: (1.65, 2.8)}
# (shape, rank): ratio to the frozen step at most, of the faster number of blocks
BLOCK_LIMITS = {
    ("MiniLM", 256): 1.12,
    ("MiniLM", 1024): 1.28,
    ("DistilBERT", 256): 1.13,
    ("T5-small", 256): 1.13,
    ("small Llama", 256): 1.13,
    ("BERT-base", 256): 1.06,
    ("BERT-base", 1024): 1.25,
}


def targets(cases: list[Case]) -> list[Target]:
    """Return the targets on MiniLM's shapes, and those of projections in blocks."""
    measured = {case["r"]: case["seconds"] for case in cases if case["shape"] == "MiniLM"}

    def ratio(r: int, name: str, baseline: str) -> float | None:
        times = measured.get(r, {})
        return median_ratio(times, name, baseline) if name in times and baseline in times else None

    found = []
    for r, (over_frozen, over_peft) in LIMITS.items():
        where = f"MiniLM, r = {r}: "
        found.append(Target(f"{where}step, relative to the frozen backbone's", ratio(r, OURS, FROZEN), over_frozen))
        found.append(Target(f"{where}times faster than PEFT VeRA", ratio(r, PEFT_VERA, OURS), over_peft, at_least=True))
        if r == 256:
            found.append(Target(f"{where}step, relative to PEFT LoRA r=8", ratio(r, OURS, LORA_8), 1.0))
    found += [
        Target(f"MiniLM, r = {r}: step, relative to full fine-tuning", ratio(r, OURS, FULL), 1.0)
        for r in (64, 256, 1024)
    ]
    return found + _block_targets(cases)


def _block_targets(cases: list[Case]) -> list[Target]:
    found = []
    for (shape, r), limit in BLOCK_LIMITS.items():
        times = next((case["seconds"] for case in cases if (case["shape"], case["r"]) == (shape, r)), {})
        measured = [name for name in (OURS_BLOCKS_8, OURS_BLOCKS_16) if name in times]
        for baseline, most in ((FROZEN, limit), (LORA_8, 1.0)):
            ratio = min((median_ratio(times, name, baseline) for name in measured), default=None)
            what = f"{shape}, r = {r}, blocks: step, relative to {baseline}"
            found.append(Target(what, ratio if baseline in times else None, most))
    return found


def plot(cases: list[Case], path: Path) -> None:
    """Draw a panel of bars for each shape and rank."""
    import plots

    figure, axes = plots.panels(len(cases), width=5.2)
    for panel, case in zip(axes, cases, strict=True):
        names = list(case["seconds"])
        values = [median_ratio(case["seconds"], name, FROZEN) for name in names]
        plots.bars(panel, names, values)
        panel.set_title(f"{case['shape']}, r = {case['r']}")
        panel.set_xlabel("training step, relative to the frozen backbone's")
    plots.save(figure, path)


BENCHMARK = Benchmark("steps", tables, targets, plot)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="MiniLM")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 64 256 1024; quick: 256 1024")
    parser.add_argument("--rounds", type=int, help="default: 7; quick: 3")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all; quick: the five main ones")
    options = BENCHMARK.parse(parser)
    ranks = options.ranks or ([256, 1024] if options.quick else [64, 256, 1024])
    rounds = options.rounds or (3 if options.quick else 7)
    variants = options.variants or list(MAIN_VARIANTS if options.quick else VARIANTS)
    for r in ranks:
        progress(f"steps: {options.shape}, r = {r}")
        case = measure(options.shape, SHAPES[options.shape], r, variants, rounds)
        BENCHMARK.finish([case], options.output)


if __name__ == "__main__":
    main()
