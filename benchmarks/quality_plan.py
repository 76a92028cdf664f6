"""What the quality study runs and in which order, and the file of what has been run.

The learning rate of a method on a task is chosen by runs scored on validation rows. The runs that are reported are
scored on test rows, with the rate chosen, each with a seed and a projection key that no other has.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from quality_data import Study, Task
from quality_methods import HEAD_RATE, Method
from quality_training import BATCH, WARMUP

Record = dict[str, Any]

RATE_SEED = 1000
"""The seed and projection key of the runs that choose a learning rate. Reported runs have 0, 1, 2 and so on."""


@dataclass(frozen=True)
class Run:
    """One training run to be scored on one part of a task's rows."""

    task: Task = field(repr=False)
    method: Method
    rate: float
    seed: int
    part: str
    study_digest: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the result, but for rounding: runs with other settings are other runs."""
        return {
            "task": self.task.name,
            "rows": self.task.digest,
            "encoder": self.study_digest,
            "epochs": self.task.epochs,
            "batch": BATCH,
            "warmup": WARMUP,
            "head_rate": HEAD_RATE,
            "method": self.method.settings(),
            "rate": self.rate,
            "seed": self.seed,
            "projection_key": self.seed,
            "part": self.part,
        }

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Plan:
    """All runs of a study.

    Attributes:
        study: the data.
        methods: what is compared.
        repeats: how many runs each method has on the test rows of each task.
        records: what is finished, by the runs' keys.
        given_up: keys of runs that failed and are not tried again.
        dropped: names of methods of which nothing more is run.
    """

    study: Study
    methods: Sequence[Method]
    repeats: int
    records: Mapping[str, Record]
    given_up: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    _runs: dict[tuple[Any, ...], Run] = field(default_factory=dict)

    def run(self, task: Task, method: Method, rate: float, seed: int, part: str) -> Run:
        identity = (task.name, method, rate, seed, part)
        if identity not in self._runs:
            self._runs[identity] = Run(task, method, rate, seed, part, self.study.digest)
        return self._runs[identity]

    def rate_runs(self, task: Task, method: Method) -> list[Run]:
        return [self.run(task, method, rate, RATE_SEED, "validation") for rate in method.rates]

    def chosen_rate(self, task: Task, method: Method) -> float | None:
        """Return the rate that did best on validation rows; None while some has not been tried."""
        runs = [run for run in self.rate_runs(task, method) if run.key not in self.given_up]
        if not runs or not all(run.key in self.records for run in runs):
            return None

        def goodness(run: Run) -> tuple[float, float]:
            record = self.records[run.key]
            return record["accuracy"], -(record["loss"] if record["loss"] is not None else float("inf"))

        return max(runs, key=goodness).rate

    def test_runs(self, task: Task, method: Method) -> list[Run]:
        """Return the runs to report, none before the rate is chosen."""
        rate = self.chosen_rate(task, method)
        if rate is None:
            return []
        return [self.run(task, method, rate, seed, "test") for seed in range(self.repeats)]

    def in_order(self) -> Iterator[Run]:
        """Yield all runs whose rates are known, so that the important methods' table is complete early."""
        tasks = self.study.tasks.values()
        for stage in sorted({method.stage for method in self.methods}):
            methods = [method for method in self.methods if method.stage == stage]
            for method in methods:
                for task in tasks:
                    yield from self.rate_runs(task, method)
            tests = {(method.name, task.name): self.test_runs(task, method) for method in methods for task in tasks}
            for repeat in range(self.repeats):
                for method in methods:
                    for task in tasks:
                        yield from tests[method.name, task.name][repeat : repeat + 1]

    def next_run(self, running: set[str]) -> Run | None:
        """Return the next run that can be started."""
        for run in self.in_order():
            done = run.key in self.records or run.key in running or run.key in self.given_up
            if not done and run.method.name not in self.dropped:
                return run
        return None


class Journal:
    """The file of all records: a line of JSON for each, appended as a run ends and never rewritten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = read_records(path)

    def append(self, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            # A line that was cut off by a crash ends here, so that it spoils no other.
            if file.tell() and not _ends_a_line(self.path):
                file.write(b"\n")
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if "error" not in record:
            self.records[record["key"]] = record


def read_records(path: Path) -> dict[str, Record]:
    """Return the finished runs of a file by their keys, without those that failed and lines that are not whole."""
    found: dict[str, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "error" not in record:
            found[record["key"]] = record
    return found


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
