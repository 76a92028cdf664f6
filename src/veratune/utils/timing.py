"""Compare the times of calls on a machine that is not idle, and measure the memory that a call takes."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Work = Callable[[], object]


def interleaved(
    variants: dict[str, Work],
    rounds: int,
    *,
    wait: Callable[[], None] = lambda: None,
    after_each: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Return the time in seconds of one call of each variant, for each round.

    Each variant is called once to warm up. Then every round calls all variants, each round starting with another
    variant, so that other load on the machine affects all variants alike.

    Args:
        variants: name to callable.
        rounds: number of rounds.
        wait: waits for the device, such as `torch.cuda.synchronize`.
        after_each: called after each round, to report progress.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        variants[name]()
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(_seconds(variants[name], wait))
        after_each()
    return times


def _seconds(work: Work, wait: Callable[[], None]) -> float:
    gc.collect()
    wait()
    with _no_collecting():
        start = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - start


@contextmanager
def _no_collecting() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def median_ratio(times: dict[str, list[float]], name: str, baseline: str) -> float:
    """Return the median over the rounds of a variant's time relative to the baseline's in the same round."""
    return statistics.median(own / base for own, base in zip(times[name], times[baseline], strict=True))


def peak_bytes(work: Work) -> int:
    """Return the peak increase in the bytes of all live CPU tensors during a call.

    Count every allocation and release of torch's CPU allocator that the profiler records, even within one operation.
    Tensors that existed before the call count only if they are freed during it.
    """
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    profiler: Any = profile.profiler
    events = sorted((e for e in profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    living = peak = 0
    for event in events:
        living += event.nbytes()
        peak = max(peak, living)
    return peak


def peak_device_bytes(work: Work, device: torch.device) -> int:
    """Return the peak increase in a CUDA device's allocated bytes, or else in the CPU tensors' bytes, during a call."""
    if device.type != "cuda":
        return peak_bytes(work)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
