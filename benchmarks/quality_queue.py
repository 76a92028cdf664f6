"""Worker processes that take the quality study's runs one after the other until all are done or the time is up.

A worker that dies or takes too long is replaced, and the run that it had is recorded as failed. Only the main process
writes records, so that no two lines get mixed up.
"""

import contextlib
import gc
import multiprocessing
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from common import progress
from quality_data import read_study
from quality_plan import Journal, Plan, Run
from quality_training import Bench, CaptureError, OutOfTimeError, train_and_score

START_SECONDS = 180.0
GRACE_SECONDS = 5.0
LONGEST_ERROR = 2000
MOST_REPLACED = 40
MOST_FAILURES = 4
"""After so many failed runs of a method, the rest of its runs is left for another time."""


@dataclass(frozen=True)
class Settings:
    """How runs are run.

    Attributes:
        data: the study's folder.
        device: "cpu" or "cuda".
        workers: how many processes; 0 runs everything in this one.
        threads: torch's, in each worker.
        deadline: `time.monotonic()` after which no run goes on.
        run_seconds: a run that takes longer is given up.
        graphs: replay training steps as CUDA graphs.
    """

    data: Path
    device: str
    workers: int
    threads: int = 1
    deadline: float = float("inf")
    run_seconds: float = 3600.0
    graphs: bool = True

    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"


def run_all(plan: Plan, journal: Journal, settings: Settings) -> None:
    """Run everything that is missing, and append each result to the journal as it comes."""
    queue = _Queue(plan, journal, settings)
    if settings.workers == 0:
        queue.run_here()
    else:
        queue.run_in_workers()
    progress(f"{queue.finished} runs finished, {queue.failed} failed")


# In the workers


@dataclass(frozen=True)
class _Answer:
    """What came of a run: `result`, an error, or neither if it ran out of time.

    `poisoned` is whether the error may have left the process in a state in which nothing works any more.
    """

    result: dict[str, Any] | None = None
    error: str | None = None
    capture_failed: bool = False
    poisoned: bool = False


def _answer(bench: Bench, run: Run, deadline: float, graphs: bool) -> _Answer:
    try:
        result = train_and_score(bench, run.task, run.method, run.rate, run.seed, run.seed, run.part, deadline, graphs)
    except OutOfTimeError:
        return _Answer()
    except CaptureError as error:
        text = f"a step could not be captured: {error}"[:LONGEST_ERROR]
        return _Answer(error=text, capture_failed=True, poisoned=True)
    except Exception as error:
        poisoned = bench.device.type == "cuda" and isinstance(error, RuntimeError)
        return _Answer(error=traceback.format_exc()[-LONGEST_ERROR:], poisoned=poisoned)
    finally:
        gc.collect()  # models with adapters have cycles, and each holds a copy of the encoder
    return _Answer(result)


def _work(connection: Connection, settings: Settings) -> None:
    """Send the device's name, then answer runs until this process is ended."""
    _set_up(settings)
    bench = Bench(read_study(settings.data), torch.device(settings.device))
    torch.zeros(1, device=bench.device)
    gc.freeze()
    connection.send(settings.device_name())
    while True:
        task, described, deadline, graphs = connection.recv()
        run = Run(bench.study.tasks[task], *described)
        connection.send(_answer(bench, run, deadline, graphs))


def _set_up(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for all methods alike


# In the main process


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    since: float
    device: str | None = None
    run: Run | None = None
    graphs: bool = False


@dataclass
class _Queue:
    plan: Plan
    journal: Journal
    settings: Settings
    finished: int = 0
    failed: int = 0
    replaced: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    eager: set[str] = field(default_factory=set)
    workers: list[_Worker] = field(default_factory=list)

    # Everything in this process

    def run_here(self) -> None:
        _set_up(self.settings)
        bench = Bench(self.plan.study, torch.device(self.settings.device))
        while time.monotonic() < self.settings.deadline and (run := self.plan.next_run(set())) is not None:
            graphs = self._graphs(run)
            limit = min(self.settings.deadline, time.monotonic() + self.settings.run_seconds)
            self._take(run, _answer(bench, run, limit, graphs), self.settings.device_name(), graphs)

    # In workers

    def run_in_workers(self) -> None:
        if self.plan.next_run(set()) is None:
            return
        try:
            self.workers = [self._start() for _ in range(self.settings.workers)]
            while time.monotonic() < self.settings.deadline + GRACE_SECONDS and self._hand_out():
                self._wait()
        finally:
            self._end_all()

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.settings), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, time.monotonic())

    def _replace(self, worker: _Worker) -> None:
        """End a worker, and start another one unless that has been done too often."""
        _end(worker)
        self.workers.remove(worker)
        if self.replaced < MOST_REPLACED:
            self.replaced += 1
            self.workers.append(self._start())
        else:
            progress("too many workers have failed: this one is not replaced")

    def _hand_out(self) -> bool:
        """Give the idle workers something to do, and return whether any has."""
        more = True
        for worker in self.workers:
            if worker.device is None or worker.run is not None or time.monotonic() >= self.settings.deadline:
                continue
            run = self.plan.next_run(self._running())
            if run is None:
                more = False
                break
            worker.run, worker.since, worker.graphs = run, time.monotonic(), self._graphs(run)
            limit = min(self.settings.deadline, worker.since + self.settings.run_seconds)
            described = (run.method, run.rate, run.seed, run.part, run.study_digest)
            self._say(worker, (run.task.name, described, limit, worker.graphs))
        starting = any(worker.device is None for worker in self.workers)
        return bool(self._running()) or (more and starting and time.monotonic() < self.settings.deadline)

    def _running(self) -> set[str]:
        return {worker.run.key for worker in self.workers if worker.run is not None}

    def _wait(self) -> None:
        """Wait for answers, and replace workers that have died or take too long."""
        answered = wait([worker.connection for worker in self.workers], timeout=0.5)
        for worker in list(self.workers):
            try:
                if worker.connection in answered:
                    self._hear(worker)
                    continue
                allowed = START_SECONDS if worker.device is None else self.settings.run_seconds + GRACE_SECONDS
                busy = worker.device is None or worker.run is not None
                if not busy or time.monotonic() - worker.since < allowed:
                    continue
                reason = f"took more than {allowed:.0f} s"
            except (EOFError, OSError):
                worker.process.join(GRACE_SECONDS)
                reason = f"its process ended with exit code {worker.process.exitcode}"
            if worker.run is not None:
                self._take(worker.run, _Answer(error=reason), worker.device, worker.graphs)
            else:
                progress(f"a worker did not start: {reason}")
            self._replace(worker)

    def _hear(self, worker: _Worker) -> None:
        message = worker.connection.recv()
        if worker.run is None:
            worker.device = message
            return
        run, worker.run = worker.run, None
        self._take(run, message, worker.device, worker.graphs)
        if message.poisoned:
            self._replace(worker)

    @staticmethod
    def _say(worker: _Worker, message: Any) -> None:
        with contextlib.suppress(OSError):  # if it has died, the next look at its connection finds it
            worker.connection.send(message)

    def _end_all(self) -> None:
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            _end(worker)

    # Both

    def _graphs(self, run: Run) -> bool:
        return self.settings.graphs and self.settings.device == "cuda" and run.method.code not in self.eager

    def _take(self, run: Run, answer: _Answer, device: str | None, graphs: bool) -> None:
        if answer.capture_failed:
            progress(f"{run.method.name} and its like go on without graphs: {answer.error}")
            self.eager.add(run.method.code)
            return
        if answer.result is None and answer.error is None:
            if time.monotonic() >= self.settings.deadline:
                return
            answer = _Answer(error=f"took more than {self.settings.run_seconds:.0f} s")
        record = {
            "key": run.key,
            "method": run.method.name,
            "settings": run.settings,
            "device": device,
            "graphs": graphs,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "date": datetime.now().isoformat(timespec="seconds"),
        }
        shown = f"{run.task.name}, {run.method.name}, rate {run.rate:g}, seed {run.seed}, {run.part}"
        if answer.error is not None:
            self.failed += 1
            self.plan.given_up.add(run.key)
            self.failures[run.method.name] += 1
            if self.failures[run.method.name] >= MOST_FAILURES:
                self.plan.dropped.add(run.method.name)
            self.journal.append({**record, "error": answer.error})
            progress(f"{shown}: failed: {answer.error.strip().splitlines()[-1]}")
            return
        assert answer.result is not None
        self.finished += 1
        self.journal.append({**record, **answer.result})
        progress(f"{shown}: {answer.result['accuracy']:.1f} % in {answer.result['seconds']:.1f} s")


def _end(worker: _Worker) -> None:
    worker.process.terminate()
    worker.process.join(GRACE_SECONDS / 2)
    if worker.process.exitcode is None:
        worker.process.kill()
        worker.process.join(GRACE_SECONDS / 2)
    worker.connection.close()
