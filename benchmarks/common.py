"""Shared by the benchmarks: interleaved timing, tables, targets, and results as JSON.

Timings are only compared within one process and one run: every variant runs once to warm up, then each round runs every
variant in turn, and a variant's figure is the median over the rounds of its ratio to the baseline of the same round.
What else the machine does then falls on all of them, and a round in which it did much is repeated.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# The built-in constants are measured, not those that this machine's user may have calibrated.
os.environ["VERATUNE_CACHE"] = str(Path(tempfile.gettempdir()) / f"veratune-benchmark-{os.getpid()}")
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message="Specified to not (save|load) vera_A and vera_B")

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
QUICK_RESULTS = ROOT.parent / "runs" / "benchmarks"

QUIET = 0.05
"""A round is quiet if other processes used no more than this share of the machine."""

Work = Callable[[], object]
Times = dict[str, list[float]]
Case = dict[str, Any]
"""One measured configuration: a `key`, its settings, figures and raw times, all of them values that JSON can hold."""


# Timing


def interleave(
    variants: dict[str, Work],
    rounds: int,
    *,
    least_seconds: float = 0.0,
    worth_repeating: Callable[[dict[str, float]], set[str]] | None = None,
) -> Times:
    """Return the seconds of one call of each variant, round by round.

    Args:
        variants: what to run, by name.
        rounds: how often, after a call to warm up. Every round starts with another variant than the one before. Of at
            most twice as many, those count in which other processes used the least of the machine.
        least_seconds: repeat a short call within a round until so much time has passed, and divide.
        worth_repeating: given the seconds of a second call to warm up, returns the variants to go on with; the others
            keep that one time.
    """
    for work in variants.values():
        work()
    repeats = dict.fromkeys(variants, 1)
    times: Times = {name: [] for name in variants}
    names = list(variants)
    if least_seconds or worth_repeating:
        second = {name: _seconds(work, 1) for name, work in variants.items()}
        repeats = {name: max(1, round(least_seconds / seconds)) for name, seconds in second.items()}
        if worth_repeating:
            going_on = worth_repeating(second)
            times |= {name: [second[name]] for name in names if name not in going_on}
            names = [name for name in names if name in going_on]
    for measured in _quiet_rounds(lambda turn: _one_round(variants, names, repeats, turn), rounds):
        for name in names:
            times[name].append(measured[name])
    return times


def _one_round(variants: dict[str, Work], names: list[str], repeats: dict[str, int], turn: int) -> dict[str, float]:
    start = turn % len(names)
    return {name: _seconds(variants[name], repeats[name]) for name in names[start:] + names[:start]}


def _quiet_rounds(run: Callable[[int], dict[str, float]], rounds: int) -> list[dict[str, float]]:
    """Return the measurements of the quietest rounds, running up to twice as many rounds to find enough."""
    found: list[tuple[float, dict[str, float]]] = []
    for turn in range(2 * rounds):
        start, others = time.perf_counter(), _others_cpu_seconds()
        measured = run(turn)
        capacity = (time.perf_counter() - start) * (os.cpu_count() or 1)
        # The system counts in hundredths of a second.
        share = max(0.0, _others_cpu_seconds() - others - 0.03) / capacity
        found.append((share, measured))
        if share > QUIET:
            progress(f"others used {100 * share:.0f} % of the machine in round {turn + 1}")
        if sum(share <= QUIET for share, _ in found) == rounds:
            break
    chosen = sorted(range(len(found)), key=lambda turn: found[turn][0])[:rounds]
    return [found[turn][1] for turn in sorted(chosen)]


def _others_cpu_seconds() -> float:
    """Return the CPU time of all other processes since boot; 0 if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system


def _seconds(work: Work, repeats: int) -> float:
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed / repeats


def seconds_of(work: Work) -> float:
    """Return the seconds of one call without warm-up, for work that happens once."""
    return _seconds(work, 1)


@dataclass(frozen=True)
class Figure:
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        if len(values) < 2:
            return cls(*[values[0]] * 3)
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


def ratios(times: Times, name: str, baseline: str) -> list[float]:
    """Return a variant's times relative to the baseline's, round by round."""
    return [own / base for own, base in zip(times[name], times[baseline], strict=True)]


def median_ratio(times: Times, name: str, baseline: str) -> float:
    """Return the median over the rounds of a variant's time relative to the baseline's."""
    return statistics.median(ratios(times, name, baseline))


# Reporting


@dataclass(frozen=True)
class Table:
    """A table of text: the first column is aligned left, the others right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        for line, unpadded in zip(padded, lines, strict=True):
            line[0] = unpadded[0].ljust(widths[0])
        return "\n".join([self.title, *("  ".join(line).rstrip() for line in padded)])


@dataclass(frozen=True)
class Target:
    """A measured figure and its target.

    Attributes:
        what: what the figure is of.
        figure: the figure as measured; None where it was not.
        limit: the bound.
        at_least: whether the bound is a lower one.
        unit: what stands behind both numbers.
    """

    what: str
    figure: float | None
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        reached = self.figure >= self.limit if self.at_least else self.figure <= self.limit
        return "reached" if reached else "NOT reached"

    def cells(self) -> tuple[str, str, str, str]:
        figure = "-" if self.figure is None else f"{self.figure:.3g}{self.unit}"
        return self.what, figure, f"{'≥' if self.at_least else '≤'} {self.limit:g}{self.unit}", self.verdict


def targets_table(targets: Sequence[Target]) -> Table:
    """Return the table of targets."""
    return Table("Targets", ("", "measured", "target", ""), [target.cells() for target in targets])


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's name and how its cases become tables, targets and a plot.

    Attributes:
        name: the name of its files.
        tables: makes the tables of all cases.
        targets: makes the targets.
        plot: draws the cases into a file.
    """

    name: str
    tables: Callable[[list[Case]], list[Table]]
    targets: Callable[[list[Case]], list[Target]] = lambda _: []
    plot: Callable[[list[Case], Path], None] | None = None

    def parser(self, description: str | None) -> argparse.ArgumentParser:
        """Return a parser with the options that all benchmarks have."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="a small version, kept apart from the full results")
        parser.add_argument("--output", type=Path, help=f"the JSON file (default: {RESULTS / self.name}.json)")
        parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
        return parser

    def parse(self, parser: argparse.ArgumentParser) -> argparse.Namespace:
        """Parse the command line and set the number of threads."""
        options = parser.parse_args()
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        gc.collect()
        gc.freeze()  # so that collecting between timings need not look at what was imported
        if options.output is None:
            options.output = (QUICK_RESULTS if options.quick else RESULTS) / f"{self.name}.json"
        return options

    def finish(self, cases: list[Case], output: Path, *, keep: bool = True) -> None:
        """Print the figures of these cases, and merge them into the result file.

        Args:
            cases: what was measured.
            output: the JSON file; the plot stands beside it.
            keep: whether the file's cases of other keys stay.
        """
        everything = {case["key"]: case for case in _read_cases(output)} if keep else {}
        everything |= {case["key"]: case for case in cases}
        merged = list(everything.values())
        tables, targets = self.tables(merged), self.targets(merged)
        for table in ([targets_table(targets)] if targets else []) + self.tables(cases):
            print(f"\n{table}")
        output.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "benchmark": self.name,
            "machine": machine(),
            "targets": [asdict(target) for target in targets],
            "tables": [asdict(table) for table in tables],
            "cases": [_rounded(case) for case in merged],
        }
        output.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\n{output}")
        if self.plot is not None:
            self.plot(merged, output.with_suffix(".png"))


def new_case(key: str, **settings: Any) -> Case:
    """Return a case with the moment and the machine's load at which it is measured."""
    return {"key": key, "date": datetime.now().isoformat(timespec="seconds"), "load": os.getloadavg()[0], **settings}


def progress(message: str) -> None:
    """Print to stderr which case is being measured."""
    print(f"[{datetime.now():%H:%M:%S}, load {os.getloadavg()[0]:.2f}] {message}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Describe the machine and the versions."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "date": datetime.now().strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _read_cases(path: Path) -> list[Case]:
    return json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else []


def _rounded(value: Any) -> Any:
    """Return a value with every float at five digits, which is more than any timing holds."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
