"""Measure veratune on a GPU in a few minutes, with nothing to install or to download.

    make gpu                                               # in the repository's root
    PYTHONPATH=src:benchmarks python3 -m gpu.run --minutes 8

The result is one JSON file, written after every case, so that a run that is cut short leaves what it has found. A case
that fails, or has no time left, says so there. `--rehearse` runs the same code on the CPU at toy sizes.
"""

import argparse
import faulthandler
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch

from common import QUICK_RESULTS, RESULTS, machine
from gpu import bank, bits, calibration, gpu_tests, gradients, graphs, precision, steps
from gpu.harness import GRACE, Report, Stage, StageOverrun, explained, interrupted_after, release_memory

MINUTES = 8.0
RESERVE = 20.0
"""Seconds of the time that are kept for starting and ending."""

# name: (what it does, its share of the time in seconds of eight minutes); what one does not use is the next ones'.
STAGES: dict[str, tuple[Callable[[Stage], None], float]] = {
    "bits": (bits.run, 24),
    "gradients": (gradients.run, 24),
    "tests": (gpu_tests.run, 70),
    "steps": (steps.run, 165),
    "calibration": (calibration.run, 40),
    "bank": (bank.run, 36),
    "precision": (precision.run, 11),
    "compiled": (steps.run_compiled, 60),
    "graphs": (graphs.run, 30),
}
MOST_BYTES = 68 * 2**30


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"the whole run's time (default: {MINUTES:g})")
    parser.add_argument("--output", type=Path, help=f"the JSON file (default: {RESULTS}/gpu_<device>.json)")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, at toy sizes")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all of them")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> Report:
    """Run the stages, each with an end of its own, and return the report that was written."""
    start = time.monotonic()
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    name = "rehearsal" if options.rehearse else torch.cuda.get_device_name(device)
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    directory = QUICK_RESULTS if options.rehearse else RESULTS
    path: Path = options.output or directory / f"gpu_{slug}.json"
    prepare(device)
    header = {
        "benchmark": "gpu",
        "device": name,
        "rehearsal": options.rehearse,
        "machine": machine() | device_facts(device),
        "date": datetime.now().isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "finished": False,
        "stages": {},
    }
    report = Report(path, header)
    report.save()
    seconds = 60 * options.minutes - RESERVE
    scale = seconds / sum(share for _, share in STAGES.values())
    end = start
    for stage_name in options.stages:
        work, share = STAGES[stage_name]
        end += share * scale
        stage = Stage(stage_name, device, options.rehearse, end, report)
        run_stage(stage, work, report)
    header["finished"] = True
    header["seconds"] = time.monotonic() - start
    report.save()
    return report


def run_stage(stage: Stage, work: Callable[[Stage], None], report: Report) -> None:
    """Run one stage; whatever happens to it, the others go on."""
    start = time.monotonic()
    values = {"cases": stage.cases, "skipped": stage.skipped, "state": "running"}
    report.values["stages"][stage.name] = values
    print(f"== {stage.name}: {stage.left:.0f} s", flush=True)
    try:
        with interrupted_after(stage.left + GRACE):
            work(stage)
        values["state"] = "done"
    except StageOverrun as overrun:
        values["state"] = str(overrun)
    except Exception as error:
        values["state"] = f"failed: {explained(error)}"
        del error
    verdicts = [case["passed"] for case in stage.cases if isinstance(case.get("passed"), bool)]
    values |= {
        "seconds": time.monotonic() - start,
        "checks": len(verdicts),
        "checks_passed": sum(verdicts),
        "failed": [case["key"] for case in stage.cases if case.get("passed") is False or "error" in case],
    }
    print(
        f"== {stage.name}: {values['state']}, {values['seconds']:.0f} s, {len(stage.cases)} cases, {sum(verdicts)} of"
        f" {len(verdicts)} checks passed, failed: {values['failed']}, skipped: {len(values['skipped'])}",
        flush=True,
    )
    report.save()
    release_memory(stage.device)


def prepare(device: torch.device) -> None:
    """Set what all stages rely on: float32 products in float32, and no more memory than is agreed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(0.9, MOST_BYTES / total), device)


def device_facts(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {}
    facts = torch.cuda.get_device_properties(device)
    return {
        "total_memory": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
    }


def main() -> None:
    options = options_of(None)
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use: `--rehearse` runs the same on the CPU at toy sizes")
    if options.rehearse:
        torch.set_num_threads(1)
    # A call that never comes back must not take the machine with it: the file holds what was found.
    limit = 60 * options.minutes + 2 * GRACE
    faulthandler.enable()

    def give_up() -> None:
        faulthandler.dump_traceback()
        print(f"gave up after {limit:.0f} s", flush=True)
        os._exit(3)

    watchdog = threading.Timer(limit, give_up)
    watchdog.daemon = True
    watchdog.start()
    report = measure(options)
    print(report.path, flush=True)
    stages = report.values["stages"].values()
    bad = any(stage["state"] != "done" or stage["failed"] for stage in stages)
    sys.stdout.flush()
    os._exit(1 if bad else 0)  # threads of compilers, say, may keep an ordinary end waiting


if __name__ == "__main__":
    main()
