"""Saving and loading: seconds and bytes, with projections in the file and without, against PEFT.

    python benchmarks/files.py

An adapter on all linear layers of a Llama of 1B parameters in bfloat16, in the folder of temporary files. PEFT draws
its projections while loading, veratune at the first use, so that the first pass (one token) is told as well.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import veratune
from common import Benchmark, Case, Table, Target, new_case, progress, seconds_of
from models import LLAMA_1B, LLAMA_TINY, llama

LIBRARIES = ("peft", "veratune")
STAGES = ("save", "load", "load and first pass")


def adapt(library: str, base: nn.Module, r: int, save_projection: bool) -> Any:
    """Return a model with a new adapter."""
    settings = {"r": r, "target_modules": "all-linear", "save_projection": save_projection}
    if library == "peft":
        return peft.get_peft_model(base, peft.VeraConfig(**settings))
    return veratune.get_peft_model(base, veratune.VeraConfig(**settings))


def load(library: str, base: nn.Module, directory: Path) -> Any:
    """Return a model with a saved adapter."""
    kind = peft.PeftModel if library == "peft" else veratune.VeraModel
    return kind.from_pretrained(base, directory)


def save_and_load(library: str, base: nn.Module, r: int, save_projection: bool, case: Case) -> nn.Module:
    """Save and load a new adapter, note the figures, and return the bare model."""
    tokens = torch.ones(1, 1, dtype=torch.long)
    adapted = adapt(library, base, r, save_projection)
    adapted(input_ids=tokens)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save = seconds_of(partial(adapted.save_pretrained, directory))
        case["bytes"][library] = sum(file.stat().st_size for file in directory.rglob("*"))
        bare = adapted.unload()
        del adapted
        start = time.perf_counter()
        loaded = load(library, bare, directory)
        middle = time.perf_counter()
        loaded(input_ids=tokens)
        end = time.perf_counter()
    for stage, seconds in zip(STAGES, (save, middle - start, end - start), strict=True):
        case["seconds"][library][stage].append(seconds)
    return loaded.unload()


def measure(base: nn.Module, r: int, save_projection: bool, rounds: int) -> Case:
    """Save and load an adapter of either library in turn."""
    seconds = {library: {stage: [] for stage in STAGES} for library in LIBRARIES}
    case = new_case(f"save_projection={save_projection}, r={r}", seconds=seconds, bytes={})
    for _ in range(rounds + 1):
        for library in LIBRARIES:
            base = save_and_load(library, base, r, save_projection, case)
    for stages in seconds.values():
        for values in stages.values():
            del values[0]  # that of the first round, in which either library imports what it needs
    return case


def tables(cases: list[Case]) -> list[Table]:
    """Return one table."""
    rows = []
    for case in cases:
        for stage in STAGES:
            peft, ours = (statistics.median(case["seconds"][library][stage]) for library in LIBRARIES)
            rows.append((f"{case['key']}: {stage}, s", f"{peft:.3f}", f"{ours:.3f}", f"{ours / peft:.2f}"))
        peft, ours = (case["bytes"][library] for library in LIBRARIES)
        rows.append((f"{case['key']}: size, MB", f"{peft / 1e6:.3f}", f"{ours / 1e6:.3f}", f"{ours / peft:.2f}"))
    return [Table("Save and load", ("", "PEFT", "veratune", "of PEFT's"), rows)]


def targets(cases: list[Case]) -> list[Target]:
    """There is no target figure; it is to be no slower and no larger than PEFT's."""
    return [Target(f"{row[0]}: relative to PEFT", float(row[3]), 1.0) for row in tables(cases)[0].rows]


BENCHMARK = Benchmark("files", tables, targets)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--rounds", type=int, help="default: 5; quick: 1")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script out")
    options = BENCHMARK.parse(parser)
    rounds = options.rounds or (1 if options.quick else 5)
    dimensions = LLAMA_TINY if options.tiny else LLAMA_1B
    cases = []
    for save_projection in (False, True):
        progress(f"files: save_projection={save_projection}")
        cases.append(measure(llama(dimensions, "cpu"), options.rank, save_projection, rounds))
    BENCHMARK.finish(cases, options.output, keep=False)


if __name__ == "__main__":
    main()
