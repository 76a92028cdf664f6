"""The metrics in a trainer's log, and the scores of a constant answer to compare them with."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from veratune.cli.train.chats import IGNORED
from veratune.cli.train.reading import Row
from veratune.cli.train.settings import TrainSettings

_PREFIX = "eval_"
_OF_THE_MACHINE = ("runtime", "per_second", "_time")


def evaluated(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return an evaluation's results by name, without the prefix: the loss first, then the metrics."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in entry.items()
        if name.startswith(_PREFIX) and isinstance(value, float) and not name.endswith(_OF_THE_MACHINE)
    }


@dataclass(frozen=True)
class TrivialAnswer:
    """The best constant answer, and its score.

    Attributes:
        answer: the most frequent class of the training rows, or their mean.
        metric: "accuracy" or "mse".
        score: its value on the evaluation rows.
    """

    answer: str
    metric: str
    score: float

    def is_beaten_by(self, metrics: Mapping[str, float]) -> bool:
        """Return whether a model has a better score."""
        return metrics[self.metric] < self.score if self.metric == "mse" else metrics[self.metric] > self.score


def scores_text(metrics: Mapping[str, float], trivial: TrivialAnswer | None) -> str:
    """Return metrics as text, with the score of a constant answer after that of the model."""
    shown = [f"{name} {value:.4f}" for name, value in metrics.items()]
    if trivial is not None and trivial.metric in metrics:
        shown[list(metrics).index(trivial.metric)] += f" (always {trivial.answer}: {trivial.score:.4f})"
    return ", ".join(shown)


def trivial_answer(
    settings: TrainSettings, examples: tuple[Iterable[Row], Iterable[Row]], labels: list[str]
) -> TrivialAnswer | None:
    """Return the best constant answer, as a baseline for a model's score; None for language models.

    Args:
        settings: the settings.
        examples: for training and for evaluation.
        labels: the classes.
    """
    if settings.task == "causal-lm":
        return None
    train, evaluation = (_all_labels(part) for part in examples)
    if settings.task == "regression":
        mean = sum(train) / len(train)
        return TrivialAnswer(f"{mean:.4g}", "mse", sum((x - mean) ** 2 for x in evaluation) / len(evaluation))
    most = min(Counter(train).items(), key=lambda item: (-item[1], item[0]))[0]
    return TrivialAnswer(repr(labels[most]), "accuracy", sum(x == most for x in evaluation) / len(evaluation))


def _all_labels(examples: Iterable[Row]) -> list[Any]:
    found: list[Any] = []
    for example in examples:
        label = example["labels"]
        found += [x for x in label if x != IGNORED] if isinstance(label, list) else [label]
    return found
