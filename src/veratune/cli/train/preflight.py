"""Pre-flight checks: errors that would surface late, and settings unlikely to learn anything."""

import importlib.util
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veratune.cli.output import bytes_text, process_count
from veratune.cli.train.data import Examples
from veratune.cli.train.reading import Row
from veratune.cli.train.settings import TrainSettings
from veratune.training import rate_advice
from veratune.utils.text import counted

# How far b must be able to move from zero: after successful training, its largest elements are near 1.
_LITTLE_REACH = 0.25
# Ranks below this are typical of LoRA, where they mean something else.
_LOW_RANK = 64
_HIGH_HEAD_RATE = 1e-1
# Fewer unknown tokens than this share are names and rare words.
_MUCH_UNKNOWN = 0.3
# More classes than this, with a row or two of each, are probably not intended.
_MANY_CLASSES = 50


def check_vocabulary(model: nn.Module, examples: Examples, data: str) -> None:
    """Raise ValueError if the tokenizer returns tokens that the model has no embedding for."""
    described: Any = model
    rows = getattr(described.get_input_embeddings(), "num_embeddings", None)
    highest = max((token for example in examples for token in example["input_ids"]), default=0)
    if isinstance(rows, int) and highest >= rows:
        raise ValueError(
            f"{data}: the tokenizer returns token {highest}, but the model has only {rows} tokens: they do not belong"
            " together"
        )


def unknown_tokens(tokenizer: Any, examples: Iterable[Row]) -> str | None:
    """Return a warning if the tokenizer has no tokens for much of the texts, such as for those in another script."""
    unknown = tokenizer.unk_token_id
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if unknown is None or unknown in others:
        return None
    special = set(tokenizer.all_special_ids) - {unknown}
    tokens = Counter(token for example in examples for token in example["input_ids"] if token not in special)
    share = tokens[unknown] / max(1, tokens.total())
    if share < _MUCH_UNKNOWN:
        return None
    return (
        f"the tokenizer turns {100 * share:.0f} % of the texts' tokens into {tokenizer.unk_token}, from which nothing"
        " can be learned: it was probably made for another language or script"
    )


def warnings_of(
    settings: TrainSettings, examples: tuple[Examples, Examples], labels: list[str], trainable: int, steps: int
) -> Iterator[str]:
    """Yield warnings about settings that would fail or disappoint.

    Args:
        settings: all settings.
        examples: for training and for evaluation.
        labels: the classes.
        trainable: the number of trained parameters.
        steps: the number of optimizer steps.
    """
    train, evaluation = examples
    if importlib.util.find_spec("matplotlib") is None:
        yield "the curves will not be plotted, since matplotlib is missing: pip install 'veratune[cli]'"
    advice = rate_advice(settings.learning_rate)
    if advice is not None:
        yield advice
    if labels and settings.head_learning_rate > _HIGH_HEAD_RATE:
        yield f"head_learning_rate={settings.head_learning_rate} is high for a new head: it may diverge"
    if settings.r < _LOW_RANK:
        yield (
            f"r={settings.r} is low for VeRA, whose ranks are 256 and more: unlike LoRA's, a higher one trains"
            " only that many more numbers in each layer"
        )
    if settings.precision == "bfloat16" and not torch.cuda.is_available():
        yield "precision=bfloat16 is slower than float32 on many CPUs"
    left_out = train.left_out + evaluation.left_out
    if left_out:
        yield (
            f"{counted(left_out, 'row')} left out: nothing to be learned is within"
            f" max_length={settings.max_length} tokens"
        )
    cut = sum(len(example["input_ids"]) >= settings.max_length for example in train)
    if cut:
        yield (
            f"{cut} of {counted(len(train), 'text')} fill max_length={settings.max_length} tokens: the rest is not used"
        )
    if len(train) < settings.batch_size:
        yield f"there are only {counted(len(train), 'row')} to train with, fewer than batch_size={settings.batch_size}"
    # Adam moves a parameter by about the learning rate in a step, which is half of its maximum on average.
    reach = settings.learning_rate * steps / 2
    if reach < _LITTLE_REACH:
        yield (
            f"a run of {counted(steps, 'step')} is short: with learning_rate={settings.learning_rate} it moves b, which"
            " starts at zero, by"
            f" about {reach:.2g} at most, and a trained b reaches 1. More epochs, more rows or a smaller batch_size"
            " make more steps"
        )
    evaluations = evaluations_of(settings, len(train), steps)
    if settings.early_stopping >= evaluations:
        yield (
            f"early_stopping={settings.early_stopping} cannot happen with only {counted(evaluations, 'evaluation')}"
            " in all: a smaller eval_steps makes more"
        )
    if len(labels) > _MANY_CLASSES and len(train) < 4 * len(labels):
        yield (
            f"there are {len(labels)} different labels in {len(train)} rows: is {settings.label_column!r} the column of"
            " the labels, and the task not regression?"
        )
    # A checkpoint has the trained parameters and two moments of each; at most three are kept, plus the adapter.
    needed = 4 * trainable * (3 * 3 + 1)
    output = Path(settings.output).absolute()
    free = shutil.disk_usage(next(path for path in (output, *output.parents) if path.exists())).free
    if free < needed:
        yield f"checkpoints may need {bytes_text(needed)}, and {settings.output} has {bytes_text(free)} left"


def evaluations_of(settings: TrainSettings, rows: int, steps: int) -> int:
    """Return the number of evaluations in a run."""
    every = settings.eval_steps or steps_of_epoch(settings, rows)
    return max(1, -(-steps // every))


def steps_of_epoch(settings: TrainSettings, rows: int) -> int:
    """Return the number of optimizer steps in an epoch."""
    batches = -(-rows // settings.batch_size)
    of_process = -(-batches // process_count())
    return -(-of_process // settings.gradient_accumulation)


def steps_of_run(settings: TrainSettings, rows: int) -> int:
    """Return the total number of optimizer steps."""
    if settings.max_steps:
        return settings.max_steps
    return max(1, -int(-settings.epochs * steps_of_epoch(settings, rows) // 1))
