"""The tasks of `veratune train`: model class, inputs and metrics of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from veratune.cli.models import load_with_new, pad_with
from veratune.cli.train.chats import IGNORED, chat_tokens, check_chats
from veratune.cli.train.reading import Row
from veratune.cli.train.settings import TrainSettings
from veratune.cli.values import class_name


@dataclass(frozen=True)
class Task:
    """One task with its settings.

    Attributes:
        model: makes the model; also returns the names of its weights that are new.
        encode: converts a row to inputs, with its labels unless it is called with labelled=False. Inputs of words
            without labels have "word_starts" instead, which `word_starts` returned.
        collator: combines inputs into a batch.
        metrics: computes named numbers from predictions; None if there is only the loss.
        best: the metric that determines the best evaluation.
        greater_is_better: whether higher values of it are better.
    """

    model: Callable[[], tuple[Any, list[str]]]
    encode: Callable[..., Row]
    collator: Any
    metrics: Callable[[Any], dict[str, float]] | None
    best: str
    greater_is_better: bool


def make_task(settings: TrainSettings, tokenizer: Any, labels: list[str]) -> Task:
    """Return a task.

    Args:
        settings: the settings.
        tokenizer: the model's tokenizer.
        labels: the classes; empty for tasks without.
    """
    if settings.task == "causal-lm":
        return _causal_lm(settings, tokenizer)
    if settings.task == "token-classification":
        return _token_classification(settings, tokenizer, labels)
    return _sequence(settings, tokenizer, labels)


def task_of_class(name: str, problem_type: str | None, outputs: int) -> str | None:
    """Return the task of a model's class, or None if it has none of the tasks.

    Args:
        name: the class's name.
        problem_type: the `problem_type` of its configuration.
        outputs: the number of its outputs; 0 if unknown.
    """
    if name.endswith("ForSequenceClassification"):
        return "regression" if problem_type == "regression" or outputs == 1 else "sequence-classification"
    if name.endswith("ForTokenClassification"):
        return "token-classification"
    return "causal-lm" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def word_starts(encoded: Any) -> list[int | None]:
    """Return for each token of a list of words the number of the word that it begins, or None."""
    ids = encoded.word_ids()
    return [word if word is not None and (i == 0 or ids[i - 1] != word) else None for i, word in enumerate(ids)]


def _sequence(settings: TrainSettings, tokenizer: Any, labels: list[str]) -> Task:
    import transformers

    regression = settings.task == "regression"
    numbers = {name: number for number, name in enumerate(labels)}

    def encode(row: Row, *, labelled: bool = True) -> Row:
        pair = None if settings.text_pair_column is None else row[settings.text_pair_column]
        text = row[settings.text_column]
        encoded: Row = dict(tokenizer(text, pair, truncation=True, max_length=settings.max_length))
        if labelled:
            label = row[settings.label_column]
            encoded["labels"] = float(label) if regression else numbers[class_name("the label", label)]
        return encoded

    def model() -> tuple[Any, list[str]]:
        kind = {"problem_type": "regression", "num_labels": 1} if regression else _names(labels)
        made, new = load_with_new(
            transformers.AutoModelForSequenceClassification, settings.model, ignore_mismatched_sizes=True, **kind
        )
        pad_with(made, tokenizer)
        return made, new

    def metrics(output: Any) -> dict[str, float]:
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        truth = output.label_ids
        if regression:
            values = np.squeeze(logits, -1)
            correlation = float(np.corrcoef(values, truth)[0, 1]) if len(truth) > 1 else float("nan")
            return {"mse": float(np.mean((values - truth) ** 2)), "pearson": correlation}
        return _classes(np.argmax(logits, -1), truth, len(labels))

    return Task(
        model,
        encode,
        transformers.DataCollatorWithPadding(tokenizer),
        metrics,
        best="mse" if regression else "accuracy",
        greater_is_better=not regression,
    )


def _token_classification(settings: TrainSettings, tokenizer: Any, labels: list[str]) -> Task:
    import transformers

    numbers = {name: number for number, name in enumerate(labels)}
    if not tokenizer.is_fast:
        raise ValueError(f"token classification needs a fast tokenizer, and {settings.model} has none")

    def encode(row: Row, *, labelled: bool = True) -> Row:
        words = row[settings.text_column]
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=settings.max_length)
        starts = word_starts(encoded)
        if not labelled:
            return {**dict(encoded), "word_starts": starts}
        given = row[settings.label_column]
        # The first token of a word carries its label.
        targets = [IGNORED if word is None else numbers[class_name("a label", given[word])] for word in starts]
        return {**dict(encoded), "labels": targets}

    def metrics(output: Any) -> dict[str, float]:
        known = output.label_ids != IGNORED
        return _classes(np.argmax(output.predictions, -1)[known], output.label_ids[known], len(labels))

    return Task(
        lambda: load_with_new(
            transformers.AutoModelForTokenClassification, settings.model, ignore_mismatched_sizes=True, **_names(labels)
        ),
        encode,
        transformers.DataCollatorForTokenClassification(tokenizer),
        metrics,
        best="f1",
        greater_is_better=True,
    )


def _causal_lm(settings: TrainSettings, tokenizer: Any) -> Task:
    import transformers

    architectures = transformers.AutoConfig.from_pretrained(settings.model).architectures or []
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise ValueError(
            f"{settings.model} is a {' or '.join(architectures)}, which is not a left-to-right language model, as"
            " causal-lm needs"
        )

    every = settings.chat_loss == "all"

    def encode(row: Row, *, labelled: bool = True) -> Row:
        text = row[settings.text_column]
        if isinstance(text, list):
            check_chats(tokenizer, every=every)
            ids, labels = chat_tokens(tokenizer, text, every=every)
        else:
            ids = list(tokenizer(text)["input_ids"])
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
            labels = ids
        most = settings.max_length
        return {"input_ids": ids[:most], "attention_mask": [1] * len(ids[:most]), "labels": labels[:most]}

    return Task(
        lambda: load_with_new(transformers.AutoModelForCausalLM, settings.model),
        encode,
        # Labels are padded separately: if the end-of-text token is also the padding token, it must still be learned.
        transformers.DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED),
        metrics=None,
        best="loss",
        greater_is_better=False,
    )


def _names(labels: list[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
    }


def _classes(predicted: Any, truth: Any, count: int) -> dict[str, float]:
    """Return the accuracy, and the mean over the classes of F1."""
    scores = []
    for label in range(count):
        hits = float(np.sum((predicted == label) & (truth == label)))
        total = float(np.sum(predicted == label) + np.sum(truth == label))
        if total:
            scores.append(2 * hits / total)
    return {"accuracy": float(np.mean(predicted == truth)), "f1": float(np.mean(scores))}
