"""What the demo reports: the results of its runs as a table and as JSON."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _demo_adapter import AdapterReport
from _demo_data import MAX_TOKENS
from _demo_training import History


@dataclass(frozen=True)
class Style:
    """How a method's lines are drawn, in matplotlib's terms."""

    color: str
    line: str = "-"


@dataclass(frozen=True)
class Run:
    """One method trained once."""

    method: str
    seed: int
    trainable_parameters: int
    file_bytes: int
    history: History

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last step, in percent."""
        return self.history.accuracies[-1][1]


@dataclass(frozen=True)
class Summary:
    """One method over its seeds: means, and the standard deviation of the test accuracy where there are several."""

    method: str
    accuracies: list[float]
    accuracy: float
    deviation: float | None
    trainable_parameters: int
    file_bytes: int
    seconds: float


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.method, []).append(run)
    return grouped


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Return one summary for each method, in the order in which the methods first ran."""
    return [_summary(method, same) for method, same in by_method(runs).items()]


def _summary(method: str, runs: Sequence[Run]) -> Summary:
    accuracies = [run.accuracy for run in runs]
    return Summary(
        method=method,
        accuracies=accuracies,
        accuracy=statistics.mean(accuracies),
        deviation=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        trainable_parameters=runs[0].trainable_parameters,
        file_bytes=runs[0].file_bytes,
        seconds=statistics.mean(run.history.seconds for run in runs),
    )


def table(summaries: Sequence[Summary]) -> str:
    """Return the summaries as aligned plain text."""
    rows = [("method", "test accuracy %", "trainable parameters", "file", "seconds")]
    for summary in summaries:
        spread = "" if summary.deviation is None else f" ± {summary.deviation:.1f}"
        rows.append(
            (
                summary.method,
                f"{summary.accuracy:.1f}{spread}",
                f"{summary.trainable_parameters:,}",
                size(summary.file_bytes),
                f"{summary.seconds:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def size(count: int) -> str:
    """Return a number of bytes for people, in powers of 1,000."""
    if count < 10_000:
        return f"{count / 1e3:.1f} KB"
    return f"{count / 1e3:.0f} KB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def comparison(summaries: Sequence[Summary], first: str, second: str) -> str:
    """Return a sentence that says by how much one method is above or below another."""
    a, b = (next(summary for summary in summaries if summary.method == name) for name in (first, second))
    difference = round(a.accuracy - b.accuracy, 1)
    relation = "above" if difference > 0 else "below" if difference < 0 else "from"
    seeds = ", ".join(f"{x - y:+.1f}" for x, y in zip(a.accuracies, b.accuracies, strict=True))
    return (
        f"{first}: {abs(difference)} points {relation} {second} (seed by seed: {seeds}),"
        f" with {a.trainable_parameters:,} trainable parameters against {b.trainable_parameters:,}."
    )


def adapter_text(report: AdapterReport) -> str:
    """Return what was found about the saved adapter, for people."""
    return (
        f"The adapter is in {report.directory}. Loaded into a fresh base model it gives the same prediction for"
        f" {report.same_predictions:,} of {report.test_rows:,} test rows (largest difference of a logit:"
        f" {report.largest_difference:g}).\n"
        f"Its file is {size(report.file_bytes)} large, without the head {size(report.headless_bytes)}. PEFT's default"
        f" file for the same adaptation, which has A and B in it: {size(report.peft_bytes)}."
    )


def commands_text(output: Path, veratune: str) -> str:
    """Return the commands that use the adapter in an output directory."""
    return (
        "\nTo use the adapter:\n"
        f"  {veratune} predict {output} --data {output / 'rows.csv'} --max-length {MAX_TOKENS}\n"
        f"  {veratune} inspect {output}\n"
        f"  {veratune} export {output} {output / 'lora'} --format lora"
    )


def write_results(path: Path, runs: Sequence[Run], facts: dict[str, Any]) -> None:
    """Write every number as JSON, one run on each line."""
    entries = {key: json.dumps(value, default=str) for key, value in facts.items()}
    entries["summary"] = _one_on_each_line([asdict(summary) for summary in summarize(runs)])
    entries["runs"] = _one_on_each_line([asdict(run) for run in runs])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(f'"{key}": {value}' for key, value in entries.items()) + "\n}\n")


def _one_on_each_line(entries: Sequence[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(_rounded(entry)) for entry in entries) + "\n]"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value
