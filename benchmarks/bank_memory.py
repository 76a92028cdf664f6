"""Resident memory by the number of adapters: the bank, PEFT's LoRA and PEFT's VeRA.

    python benchmarks/bank_memory.py

MiniLM's shape, all linear layers, VeRA of r = 256. Each way runs in a process of its own, which reads its resident
memory from the system before the first adapter and on the way; what counts is the slope, not the size of files.
PEFT's ways end at fewer adapters, as adding one takes longer the more there are.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import torch

import veratune
from bank_models import encoder, randomise
from common import Benchmark, Case, Table, Target, new_case, progress
from veratune.bank import AdapterBank

BANK_BF16, BANK_F32, PEFT_VERA = "veratune, bfloat16", "veratune, float32", "PEFT VeRA"
LORAS = {f"PEFT LoRA r={r}": r for r in (1, 4, 16)}
WAYS = (BANK_BF16, BANK_F32, PEFT_VERA, *LORAS)
R = 256
LARGEST = {BANK_BF16: 10_000, BANK_F32: 10_000}


def resident_bytes() -> int:
    """Return how much of this process's memory is resident."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def adder(way: str, capacity: int) -> Callable[[int], None]:
    """Return a function that adds another adapter with different values."""
    config = veratune.VeraConfig(r=R, target_modules="all-linear")
    if way in (BANK_BF16, BANK_F32):
        dtype = torch.bfloat16 if way == BANK_BF16 else torch.float32
        bank = AdapterBank(encoder(), config, capacity=capacity, dtype=dtype)
        source = veratune.get_peft_model(encoder(), config)
        vectors = list(source.adapter_state("default").parameters())
        inputs = torch.randn(1, 4, 384)

        def add(number: int) -> None:
            with torch.no_grad():
                for vector in vectors:
                    vector.normal_()  # equal adapters would share a row
                bank.add(f"customer {number}", source)
                if number == 0:  # draws the projections
                    bank.model(inputs_embeds=inputs, adapters=["customer 0"])

        return add
    if way == PEFT_VERA:
        theirs: peft.PeftConfig = peft.VeraConfig(r=R, target_modules="all-linear")
    else:
        theirs = peft.LoraConfig(r=LORAS[way], target_modules="all-linear")
    model = peft.get_peft_model(encoder(), theirs, adapter_name="customer0")

    def add_to_peft(number: int) -> None:
        if number:
            model.add_adapter(f"customer{number}", theirs)
        randomise(model, f"customer{number}", number)

    return add_to_peft


def measure_here(way: str, counts: list[int]) -> dict[str, int]:
    """Return the resident bytes after each of these numbers of adapters."""
    add = adder(way, max(counts))
    found = {}
    for number in range(max(counts)):
        add(number)
        if number + 1 in counts:
            gc.collect()
            found[str(number + 1)] = resident_bytes()
    return found


def measure(way: str, counts: list[int]) -> Case:
    """Measure one variant in a separate process."""
    progress(f"bank_memory: {way}, {max(counts)} adapters")
    case = new_case(f"{way}", way=way)
    command = [sys.executable, __file__, "--way", way, "--counts", *map(str, counts)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return case | {"resident": json.loads(output.splitlines()[-1])}


def slope(case: Case) -> float:
    """Return the bytes of one more adapter, from the first measured number to the last."""
    counts = sorted(map(int, case["resident"]))
    first, last = counts[0], counts[-1]
    return (case["resident"][str(last)] - case["resident"][str(first)]) / (last - first)


def tables(cases: list[Case]) -> list[Table]:
    """Return one table."""
    rows = []
    for case in cases:
        counts = sorted(map(int, case["resident"]))
        grown = case["resident"][str(counts[-1])] - case["resident"][str(counts[0])]
        rows.append(
            (
                case["way"],
                f"{counts[0]} to {counts[-1]}",
                f"{grown / 1e6:.1f}",
                f"{slope(case) / 1e3:.1f}",
                f"{slope(case) / 1e5:.2f}",
            )
        )
    header = ("", "adapters", "grown by, MB", "KB an adapter", "GB for 10,000")
    return [Table("Resident memory", header, rows)]


def targets(cases: list[Case]) -> list[Target]:
    """Return the target: 0.7 GB for 10,000 adapters in bfloat16."""
    return [
        Target(f"10,000 adapters, {case['way']}", slope(case) * 1e4 / 1e9, 0.7, unit=" GB")
        for case in cases
        if case["way"] == BANK_BF16
    ]


def plot(cases: list[Case], path: Path) -> None:
    """Draw the memory of one adapter, way by way."""
    import plots

    figure, (panel,) = plots.panels(1, width=6)
    plots.bars(panel, [case["way"] for case in cases], [slope(case) / 1e3 for case in cases], "{:.0f}")
    panel.set_xlabel("resident memory of one more adapter, KB")
    plots.save(figure, path)


BENCHMARK = Benchmark("bank_memory", tables, targets, plot)


def main() -> None:
    if "--way" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--way")
        parser.add_argument("--counts", type=int, nargs="+")
        options = parser.parse_args()
        print(json.dumps(measure_here(options.way, options.counts)))
        return
    options = BENCHMARK.parse(BENCHMARK.parser(__doc__))
    cases = []
    for way in WAYS:
        largest = LARGEST.get(way, 200)
        if options.quick:
            largest = min(largest, 500 if way in LARGEST else 10)
        cases.append(measure(way, sorted({1, 10, largest // 10, largest})))
    BENCHMARK.finish(cases, options.output)


if __name__ == "__main__":
    main()
