"""A batch with a different adapter for each sequence: a forward pass and one decoding step, by the number of adapters.

    python benchmarks/bank_mixed.py --ranks 64 256

64 rows on MiniLM's shape, all linear layers adapted; 32 tokens a row, or one after a prompt of 32. Times are relative
to the base model's; the floor is a model into which one adapter is merged. Rows of one adapter stand together. Of
PEFT's ways, LoRA takes `adapter_names`; its VeRA ignores them, and goes through the batch adapter by adapter.
"""

from pathlib import Path

from bank_models import (
    BASE,
    LORA_8,
    LORA_16,
    LORA_BMM,
    MERGED,
    OURS,
    OURS_BLOCKS,
    OURS_FACTORED,
    WAYS,
    Batch,
    decoder,
    encoder,
    serve,
)
from common import Benchmark, Case, Table, Target, interleave, median_ratio, new_case, progress

ROWS, TOKENS = 64, 32
COUNTS = (1, 2, 4, 8, 16, 32, 64)
KINDS = ("forward", "decode")


def key_of(way: str, count: int) -> str:
    """Return a variant's name."""
    return way if way == BASE else f"{way}, {count} adapters"


def measure(kind: str, r: int, counts: tuple[int, ...], ways: tuple[str, ...], rounds: int) -> Case:
    """Time ways of serving with all numbers of adapters."""
    case = new_case(f"{kind} r={r}", kind=kind, r=r, counts=list(counts), rows=ROWS, tokens=TOKENS)
    base = (decoder if kind == "decode" else encoder)()
    names = [f"customer{number}" for number in range(max(counts))]
    variants = {}
    for way in (BASE, *ways):
        progress(f"bank_mixed: {kind}, r = {r}: making {way}")
        batch = Batch(base, ROWS, TOKENS, decode=kind == "decode")
        served = serve(way, base, names, r, batch)
        for count in counts[:1] if way in (BASE, MERGED) else counts:
            rows = [names[row * count // ROWS] for row in range(ROWS)]
            variants[key_of(way, count)] = lambda served=served, rows=rows: served(rows)
    return case | {"seconds": interleave(variants, rounds, least_seconds=0.01)}


def relative(case: Case, way: str, count: int) -> float:
    """Return a way's time relative to the base model's."""
    return median_ratio(case["seconds"], key_of(way, count), BASE)


def tables(cases: list[Case]) -> list[Table]:
    """Return a table for each kind and rank."""
    found = []
    for case in cases:
        rows = [
            [
                way,
                *(f"{relative(case, way, n):.2f}" if key_of(way, n) in case["seconds"] else "" for n in case["counts"]),
            ]
            for way in WAYS
            if key_of(way, case["counts"][0]) in case["seconds"]
        ]
        milliseconds = 1e3 * sorted(case["seconds"][BASE])[len(case["seconds"][BASE]) // 2]
        title = f"{case['kind']}, VeRA of r = {case['r']}, relative to the base model's {milliseconds:.1f} ms"
        found.append(Table(title, ("adapters in the batch", *map(str, case["counts"])), rows))
    return found


def targets(cases: list[Case]) -> list[Target]:
    """Return the targets: flat, and faster than PEFT's loop from eight adapters on."""
    found = []
    for case in cases:
        last = max(case["counts"])
        where = f"{case['kind']}, r = {case['r']}: "
        measured = [way for way in (OURS_FACTORED, OURS, OURS_BLOCKS) if key_of(way, last) in case["seconds"]]
        for way in measured:
            growth = relative(case, way, last) / relative(case, way, 1)
            found.append(Target(f"{where}{way}: {last} adapters relative to 1", growth, 1.10))
        for lora in (LORA_8, LORA_16):
            counts = [n for n in case["counts"] if n >= 8 and key_of(lora, n) in case["seconds"]]
            ratios = [relative(case, OURS, n) / relative(case, lora, n) for n in counts]
            if ratios:
                what = f"{where}{OURS} relative to {lora} with 8 adapters and more, at worst"
                found.append(Target(what, max(ratios), 1.0))
        if case["r"] == 256 and OURS_BLOCKS in measured:
            blocks = relative(case, OURS_BLOCKS, last)
            found.append(Target(f"{where}{OURS_BLOCKS}, {last} adapters, relative to the base model", blocks, 1.30))
            to_bmm = blocks / relative(case, LORA_BMM, last)
            found.append(Target(f"{where}{OURS_BLOCKS}, {last} adapters, relative to {LORA_BMM}", to_bmm, 1.0))
    return found


def plot(cases: list[Case], path: Path) -> None:
    """Draw a panel for each kind and rank."""
    import plots

    figure, axes = plots.panels(len(cases), columns=2, width=5)
    for panel, case in zip(axes, cases, strict=True):
        for index, way in enumerate(WAYS):
            counts = [n for n in case["counts"] if key_of(way, n) in case["seconds"]]
            plots.line(panel, index, counts, [relative(case, way, n) for n in counts], way)
        panel.axhline(1, color="black", linewidth=1)
        panel.set(title=f"{case['kind']}, VeRA of r = {case['r']}", ylabel="time relative to the base model's")
        plots.ticks(panel, case["counts"], "adapters in the batch of 64 rows")
        panel.set_ylim(0, min(10, 1.05 * panel.dataLim.y1))
    axes[0].legend()
    plots.save(figure, path)


BENCHMARK = Benchmark("bank_mixed", tables, targets, plot)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 64 256; quick: 256")
    parser.add_argument("--counts", type=int, nargs="+", help="default: 1 to 64; quick: 1 8 64")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, help="default: 7; quick: 3")
    options = BENCHMARK.parse(parser)
    for kind in options.kinds:
        for r in options.ranks or ([256] if options.quick else [64, 256]):
            counts = tuple(options.counts or ((1, 8, 64) if options.quick else COUNTS))
            case = measure(kind, r, counts, tuple(options.ways), options.rounds or (3 if options.quick else 7))
            BENCHMARK.finish([case], options.output)


if __name__ == "__main__":
    main()
