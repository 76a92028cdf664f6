"""The quality study's tables and plot, from the records of its runs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quality_data import PARTS
from quality_methods import DENSE, HEAD_RATE, Method
from quality_plan import Plan, Record, Run
from quality_training import BATCH, WARMUP
from report import markdown

NOTHING = "-"


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, of `count` values."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        if len(values) < 2:
            return cls(values[0], math.nan, 1)
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))

    @classmethod
    def mean_of(cls, estimates: Sequence["Estimate"]) -> "Estimate":
        """Return the mean of independent estimates."""
        error = math.sqrt(sum(estimate.error**2 for estimate in estimates)) / len(estimates)
        count = min(estimate.count for estimate in estimates)
        return cls(statistics.fmean(estimate.mean for estimate in estimates), error, count)

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.2f}"
        return f"{self.mean:+.2f}{error}"


@dataclass(frozen=True)
class Cell:
    """A method on a task: its finished runs on the test rows."""

    runs: Sequence[tuple[Run, Record]]

    @property
    def accuracies(self) -> dict[int, float]:
        """The accuracies by seed."""
        return {run.seed: record["accuracy"] for run, record in self.runs}

    def minus(self, other: "Cell") -> Estimate | None:
        """Return the mean difference of runs of one seed; None if there are no such pairs."""
        mine, theirs = self.accuracies, other.accuracies
        differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
        return Estimate.of(differences) if differences else None

    def __str__(self) -> str:
        values = list(self.accuracies.values())
        if not values:
            return NOTHING
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread} ({len(values)})"


@dataclass
class Results:
    """The finished part of a plan."""

    plan: Plan

    def cell(self, task: str, method: Method) -> Cell:
        runs = self.plan.test_runs(self.plan.study.tasks[task], method)
        return Cell([(run, self.plan.records[run.key]) for run in runs if run.key in self.plan.records])

    def difference(self, task: str, method: Method, baseline: str) -> Estimate | None:
        """Return the paired difference to another method on one task."""
        other = next((other for other in self.plan.methods if other.name == baseline), None)
        return None if other is None else self.cell(task, method).minus(self.cell(task, other))

    def mean_difference(self, method: Method, baseline: str) -> Estimate | None:
        """Return the mean over all tasks of the paired differences; None unless each task has one."""
        differences = [self.difference(task, method, baseline) for task in self.plan.study.tasks]
        known = [difference for difference in differences if difference is not None]
        return Estimate.mean_of(known) if known and len(known) == len(differences) else None

    def shown(self) -> list[Method]:
        """Return the methods of which anything is finished."""
        return [method for method in self.plan.methods if any(self.cell(task, method).runs for task in self._tasks)]

    @property
    def _tasks(self) -> list[str]:
        return list(self.plan.study.tasks)

    # Tables

    def accuracy_table(self) -> str:
        rows = []
        for method in self.shown():
            cells = [self.cell(task, method) for task in self._tasks]
            trained = next(record["trained"] for cell in cells for _, record in cell.runs)
            same_rank = self.mean_difference(method, method.baseline) if method.baseline != DENSE else None
            differences = (self.mean_difference(method, DENSE), same_rank)
            rows.append([method.name, f"{trained:,}", *map(str, cells), *(_or_dash(value) for value in differences)])
        header = ["", "trained", *self._tasks, f"mean minus {DENSE}", "mean minus dense of the same rank"]
        return markdown(header, rows)

    def difference_table(self) -> str:
        rows = [
            [method.name, *(_or_dash(self.difference(task, method, DENSE)) for task in self._tasks)]
            for method in self.shown()
            if method.name != DENSE
        ]
        return markdown(["", *self._tasks], rows)

    def rate_table(self) -> str:
        rows = []
        for method in self.plan.methods:
            cells = []
            for task in self.plan.study.tasks.values():
                tried = [(run, self.plan.records.get(run.key)) for run in self.plan.rate_runs(task, method)]
                best = self.plan.chosen_rate(task, method)
                texts = [
                    f"**{record['accuracy']:.1f}**" if run.rate == best else f"{record['accuracy']:.1f}"
                    for run, record in tried
                    if record is not None
                ]
                cells.append(" / ".join(texts) or NOTHING)
            if any(cell != NOTHING for cell in cells):
                rows.append([method.name, " / ".join(f"{rate:g}" for rate in method.rates), *cells])
        return markdown(["", "rates", *self._tasks], rows)

    # Plot

    def plot(self, path: Path) -> None:
        """Draw each method's mean paired difference, with two standard errors, and its differences on the tasks."""
        from plots import BLUE, CYCLE, MARKERS, panels, save

        shown = [method for method in self.shown() if method.name != DENSE]
        figure, (axes,) = panels(1, width=8.0, height=1.2 + 0.3 * len(shown))
        for index, task in enumerate(self._tasks):
            found = [(row, self.difference(task, method, DENSE)) for row, method in enumerate(shown)]
            points = [(estimate.mean, row + 0.25) for row, estimate in found if estimate is not None]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, MARKERS[index % 6], color=CYCLE[1 + index % 5], markersize=4, label=task, alpha=0.8)
        for row, method in enumerate(shown):
            mean = self.mean_difference(method, DENSE)
            if mean is not None:
                error = 0.0 if math.isnan(mean.error) else 2 * mean.error
                axes.errorbar(mean.mean, row - 0.1, xerr=error, fmt="s", color=BLUE, capsize=3)
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(shown)), [method.name for method in shown])
        axes.invert_yaxis()
        axes.set_xlabel(f"accuracy minus that of {DENSE} (points); squares: mean of the tasks, two standard errors")
        axes.legend(fontsize=8)
        save(figure, path)


def _or_dash(value: Estimate | None) -> str:
    return NOTHING if value is None else str(value)


def write(plan: Plan, page: Path, picture: Path) -> None:
    """Write the page with all tables, and the plot beside the records."""
    results = Results(plan)
    if not results.shown():
        raise SystemExit("there is nothing to report yet: no method has finished its learning rates and a test run")
    results.plot(picture)
    paragraphs = [
        "# Quality",
        _origin(plan, picture),
        _setting(plan),
        "## Accuracy in percent",
        "Mean ± standard deviation (number of runs); differences are means over the tasks of paired differences, ± one"
        ' standard error. "trained" counts the adapter\'s values, without the head.',
        results.accuracy_table(),
        f"![differences](results/{picture.name})",
        f"## Paired differences to {DENSE}, by task",
        results.difference_table(),
        "## Accuracy on validation rows by learning rate",
        "Bold: the rate that was chosen.",
        results.rate_table(),
    ]
    page.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def _origin(plan: Plan, picture: Path) -> str:
    records = list(plan.records.values())
    devices = ", ".join(sorted({record["device"] for record in records}))
    versions = ", ".join(sorted({f"torch {record['torch']}" for record in records}))
    days = sorted({record["date"][:10] for record in records})
    return (
        f"Made by `python benchmarks/quality.py report` from [{len(records)} runs](results/{picture.stem}.jsonl) on"
        f" {devices}, {versions}, {days[0]} to {days[-1]}."
    )


def _setting(plan: Plan) -> str:
    described = ", ".join(
        f"{task.name} ({task.classes} classes, {task.epochs} epochs, {task.rows['train'].token_ids.shape[1]} tokens)"
        for task in plan.study.tasks.values()
    )
    train, validation, test = (len(next(iter(plan.study.tasks.values())).rows[part]) for part in PARTS)
    return (
        "MiniLM (22.7 million parameters), its weights rounded to half precision once and trained in float32 (TF32"
        " products on a GPU), with a new classification head on its pooler. Tasks:"
        f" {described}; {train:,} training rows, {validation:,} to choose the learning rate, {test:,} to score. All"
        f" methods: AdamW, batches of {BATCH}, {WARMUP:.0%} warm-up, {HEAD_RATE:g} for the head. A method's learning"
        " rate is the one that does best on the validation rows. Each run on the test rows has a seed and a projection"
        " key that no other run of the method has; run i of all methods shares its seed, hence its head, its batches"
        " and its key."
    )
