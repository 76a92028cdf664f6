"""Startup cost: the import, adding adapters to a model, and the first step, against PEFT.

    python benchmarks/startup.py

Imports are timed as whole processes, and each model is adapted in a process of its own, since what has been loaded or
drawn once is there. Models are a Llama of 7B parameters on the meta device, and a real one of 1B in bfloat16; the first
step there has 16 tokens, and includes drawing the projections if they are lazy.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from common import Benchmark, Case, Table, Target, new_case, progress, seconds_of

LIBRARIES = ("peft", "veratune")
# Of veratune, all public names: they are imported when they are first used.
IMPORTS = {"torch": "import torch", "peft": "import peft", "veratune": "from veratune import *"}
RANK = 256


def time_imports(rounds: int) -> Case:
    """Time `python -c "import ..."`, each in turn."""
    case = new_case("import", kind="import", seconds={name: [] for name in IMPORTS})
    for turn in range(rounds + 1):
        for name, code in IMPORTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            if turn:  # the first one fills the disk cache
                case["seconds"][name].append(time.perf_counter() - start)
    return case


def time_model(model: str, rounds: int, threads: int) -> Case:
    """Run the timings of `child` in separate processes."""
    case = new_case(model, kind="model", seconds={library: {} for library in LIBRARIES})
    for _ in range(rounds):
        for library in LIBRARIES:
            progress(f"startup: {model}, {library}")
            command = [sys.executable, __file__, "--child", library, model, "--threads", str(threads)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for what, seconds in json.loads(printed.splitlines()[-1]).items():
                case["seconds"][library].setdefault(what, []).append(seconds)
    return case


def child(library: str, model_name: str) -> None:
    """Put adapters on a model and take two steps with it, unless it is on the meta device; print the seconds."""
    import peft
    import torch

    from models import LLAMA_1B, LLAMA_7B, LLAMA_TINY, llama
    from veratune import VeraConfig, get_peft_model

    dimensions = {"7B, meta": LLAMA_7B, "1B, bfloat16": LLAMA_1B, "tiny": LLAMA_TINY}[model_name]
    base = llama(dimensions, "meta" if "meta" in model_name else "cpu")
    seconds = {}

    def adapt() -> torch.nn.Module:
        if library == "peft":
            return peft.get_peft_model(base, peft.VeraConfig(r=RANK, target_modules="all-linear"))
        return get_peft_model(base, VeraConfig(r=RANK, target_modules="all-linear"))

    def timed(what: str, work: object) -> None:
        seconds[what] = seconds_of(work)

    adapted: list[torch.nn.Module] = []
    timed("get_peft_model", lambda: adapted.append(adapt()))
    if "meta" not in model_name:
        tokens = torch.ones(1, 16, dtype=torch.long)
        timed("first step", lambda: adapted[0](input_ids=tokens).logits.sum().backward())
        timed("second step", lambda: adapted[0](input_ids=tokens).logits.sum().backward())
        seconds["get_peft_model and first step"] = seconds["get_peft_model"] + seconds["first step"]
    print(json.dumps(seconds))


def tables(cases: list[Case]) -> list[Table]:
    """Return one table."""
    rows = []
    for case in cases:
        if case["kind"] == "import":
            peft, ours = (statistics.median(case["seconds"][name]) for name in LIBRARIES)
            rows.append(_row("import", peft, ours))
            rows.append(("import torch alone", "-", f"{statistics.median(case['seconds']['torch']):.3f}", "-"))
        else:
            for what, theirs in case["seconds"]["peft"].items():
                medians = statistics.median(theirs), statistics.median(case["seconds"]["veratune"][what])
                rows.append(_row(f"{case['key']}: {what}", *medians))
    return [Table(f"Seconds, r = {RANK}, all linear layers", ("", "PEFT", "veratune", "of PEFT's"), rows)]


def _row(what: str, peft: float, ours: float) -> tuple[str, str, str, str]:
    return what, f"{peft:.3f}", f"{ours:.3f}", f"{ours / peft:.2f}"


def targets(cases: list[Case]) -> list[Target]:
    """There is no target figure; it is to be no slower than PEFT."""
    found = []
    for table in tables(cases):
        found += [Target(f"{row[0]}, relative to PEFT", float(row[3]), 1.0) for row in table.rows if row[3] != "-"]
    return found


BENCHMARK = Benchmark("startup", tables, targets)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--rounds", type=int, help="default: 3; quick: 1")
    parser.add_argument("--models", nargs="+", default=("7B, meta", "1B, bfloat16"), help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = BENCHMARK.parse(parser)
    if options.child:
        child(*options.child)
        return
    rounds = options.rounds or (1 if options.quick else 3)
    progress("startup: imports")
    cases = [time_imports(rounds)]
    cases += [time_model(model, rounds, options.threads) for model in options.models]
    BENCHMARK.finish(cases, options.output)


if __name__ == "__main__":
    main()
