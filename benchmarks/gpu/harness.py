"""What the stages share: their time, their figures in one file, and interleaved timing on a device."""

import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import Figure, Times, Work
from veratune.utils.atomic import write_atomically

Figures = dict[str, Any]
LEAST_SECONDS_BETWEEN_WRITES = 1.0
GRACE = 12.0
"""Seconds after the end of its time at which a stage is interrupted."""


class StageOverrun(BaseException):
    """A stage has not noticed that its time is over; no `except Exception` on the way takes it."""


@dataclass
class Report:
    """The figures of all stages in one JSON file, which is complete and valid at any time."""

    path: Path
    values: dict[str, Any]
    written: float = 0.0

    def save(self, *, now: bool = True) -> None:
        """Write the file; unless `now`, at most once in a second."""
        moment = time.monotonic()
        if now or moment - self.written >= LEAST_SECONDS_BETWEEN_WRITES:
            self.written = moment
            text = json.dumps(rounded(self.values), indent=1, ensure_ascii=False)
            write_atomically(self.path, f"{text}\n".encode())


@dataclass
class Stage:
    """One stage while it runs.

    Attributes:
        name: its name in the file.
        device: the device to measure.
        toy: whether this is a rehearsal, at sizes that a CPU computes in a moment.
        end: the moment after which no case begins, as `time.monotonic` counts.
        report: where figures go.
        cases: what it has found.
        skipped: the keys of cases for which there was no time.
    """

    name: str
    device: torch.device
    toy: bool
    end: float
    report: Report
    cases: list[Figures] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the end of its time."""
        return self.end - time.monotonic()

    def case(self, key: str, work: Callable[[], Figures], *, seconds: float = 0.0) -> Figures | None:
        """Run one case and keep its figures, or the reason why there are none, which is returned as None.

        Args:
            key: its name.
            work: returns its figures; "line" is what is printed.
            seconds: how long it takes at least: it is left out if there is less time.
        """
        if self.left <= seconds:
            self.skipped.append(key)
            return None
        start = time.monotonic()
        try:
            found = work()
        except Exception as error:
            found = {"error": explained(error), "line": f"FAILED: {explained(error, 200)}"}
            del error
            release_memory(self.device)
        took = time.monotonic() - start
        line = found.pop("line", "done")
        print(f"[{self.name}] {key}: {line} ({took:.1f} s)", flush=True)
        self.cases.append({"key": key, **found, "took": took})
        self.report.save(now=False)
        return None if "error" in found else found


def explained(error: BaseException, length: int = 2000) -> str:
    """Return an error's kind, message and last frames."""
    short = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if length < 500:
        return short[:length]
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = "; ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{short[:length]} [{where}]"


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise `StageOverrun` in the main thread if this takes longer."""

    def interrupt(*_: object) -> None:
        raise StageOverrun(f"interrupted after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The device


def wait(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Free what nothing refers to any more; on a CPU that is not worth the time."""
    if device.type == "cuda":
        gc.collect()
        with suppress(RuntimeError):  # an earlier fault of the device, which its own case reports
            torch.cuda.empty_cache()


def peak_bytes(work: Work, device: torch.device) -> int | None:
    """Return by how much a call raises the device's allocated bytes at most; None on a CPU, which does not count."""
    if device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def seconds_of(work: Work, device: torch.device, repeats: int = 1) -> float:
    """Return the seconds of one call, from the first launch until the device has finished the last."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(device)
    return (time.perf_counter() - start) / repeats


@dataclass(frozen=True)
class Timing:
    """Interleaved times.

    Attributes:
        times: name to the seconds of one call, round by round.
        errors: name to the reason why a variant could not run.
    """

    times: Times
    errors: dict[str, str]

    def median(self, name: str) -> float:
        return Figure.of(self.times[name]).median

    def relative(self, name: str, baseline: str) -> float:
        """Return the median over the rounds of a variant's time relative to the baseline's."""
        pairs = zip(self.times[name], self.times[baseline], strict=False)
        return Figure.of([own / base for own, base in pairs]).median

    def milliseconds(self) -> dict[str, list[float]]:
        """Return low quartile, median and high quartile of each variant."""
        figures = {name: Figure.of(values) for name, values in self.times.items()}
        return {name: [1e3 * f.low, 1e3 * f.median, 1e3 * f.high] for name, f in figures.items()}

    def ratios(self, baseline: str) -> dict[str, float]:
        """Return each variant's time relative to the baseline's."""
        return {name: self.relative(name, baseline) for name in self.times} if baseline in self.times else {}


def interleave(
    works: dict[str, Work],
    stage: Stage,
    rounds: int,
    *,
    least_seconds: float = 0.004,
    warmed: bool = False,
    keep: Callable[[dict[str, float]], set[str]] | None = None,
) -> Timing:
    """Time variants in rounds in which each runs in turn, the first one another every time.

    Args:
        works: name to what to run, which is run three times to warm up; once if it has been `warmed`.
        stage: stops after the first round once its time is over.
        rounds: how many.
        least_seconds: repeat a call within a round for so long.
        keep: given the seconds of one call, returns the variants that are worth all rounds; the others keep one time.
    """
    device = stage.device
    if stage.toy:
        rounds, least_seconds = 2, 0.0
    errors: dict[str, str] = {}
    first: dict[str, float] = {}
    for name, work in works.items():
        try:
            if not warmed:
                work()
            first[name] = min(seconds_of(work, device) for _ in range(1 if warmed else 2))
        except Exception as error:
            errors[name] = explained(error)
            del error
            release_memory(device)
    times: Times = {name: [seconds] for name, seconds in first.items()}
    going_on = keep(first) if keep and first else set(first)
    names = [name for name in first if name in going_on]
    times |= {name: [] for name in names}
    repeats = {name: min(200, max(1, round(least_seconds / first[name]))) for name in names}
    if not stage.toy:
        gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn and stage.left <= 0:
                break
            start = turn % max(1, len(names))
            for name in names[start:] + names[:start]:
                times[name].append(seconds_of(works[name], device, repeats[name]))
    finally:
        gc.enable()
    return Timing(times, errors)


def graphed(work: Work, device: torch.device) -> Work:
    """Return a function that replays a captured CUDA graph of a call, which is warmed up on a stream of its own.

    A call on a CPU is returned as it is.
    After a capture that fails, random numbers may not be drawn on the device any more.
    """
    if device.type != "cuda":  # a rehearsal
        return work
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    torch.cuda.synchronize(device)

    def replay(_kept: Work = work) -> None:  # a graph reads memory that only the call's own objects keep allocated
        graph.replay()

    return replay


def rounded(value: Any) -> Any:
    """Return a value with every float at five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
