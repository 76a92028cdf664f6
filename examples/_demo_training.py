"""The training loop that all methods of the demo share, and prediction."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from _demo_data import Encoded

BATCH_SIZE = 32
BATCHES_PER_POOL = 16
WARMUP = 0.06
TEST_BATCH_SIZE = 100

ParameterGroups = list[dict[str, Any]]


@dataclass
class History:
    """What one training run did, step by step.

    Attributes:
        losses: training loss of each step.
        accuracies: (steps done, test accuracy in percent), the last one after the last step.
        seconds: time the steps took, without the evaluations.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def steps_per_epoch(rows: int) -> int:
    return -(-rows // BATCH_SIZE)


def train(
    model: nn.Module,
    groups: ParameterGroups,
    data: Encoded,
    test: Encoded,
    *,
    epochs: int,
    evaluations: int,
    seed: int,
    after_step: Callable[[History], None],
) -> tuple[History, Tensor]:
    """Train a model with AdamW, a warm-up and a linear decay; the seed decides the batches and the dropout.

    The evaluations are evenly spaced, the last one comes after the last step, and its logits are returned.
    """
    order = _batch_order(data, epochs, seed)
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_then_linear(len(order)))
    evaluated = {round(count * len(order) / evaluations) for count in range(1, evaluations + 1)}
    history = History()
    torch.manual_seed(seed)
    for step, rows in enumerate(order, start=1):
        started = time.perf_counter()
        model.train()
        loss = model(**data.batch(rows)).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        history.losses.append(loss.item())
        history.seconds += time.perf_counter() - started
        if step in evaluated:
            logits = predict(model, test)
            history.accuracies.append((step, accuracy(logits, test)))
        after_step(history)
    return history, logits


def predict(model: nn.Module, data: Encoded) -> Tensor:
    """Return the logits of all rows, (rows, classes), computed in batches of sentences of like length."""
    model.eval()
    by_length = sorted(range(len(data)), key=lambda row: len(data.token_ids[row]))
    logits = torch.empty(len(data), 2)
    with torch.inference_mode():
        for start in range(0, len(data), TEST_BATCH_SIZE):
            rows = by_length[start : start + TEST_BATCH_SIZE]
            logits[rows] = model(**data.batch(rows)).logits
    return logits


def accuracy(logits: Tensor, data: Encoded) -> float:
    """Return how many rows the logits have right, in percent."""
    right = logits.argmax(dim=1) == torch.tensor(data.labels)
    return 100 * right.float().mean().item()


def _batch_order(data: Encoded, epochs: int, seed: int) -> list[list[int]]:
    """Return the rows of each batch of the whole run, shuffled anew in every epoch.

    Sentences of like length share a batch, which leaves half as much padding to compute: the shuffled rows are cut into
    pools of a few batches, each pool is sorted by length and cut into batches, and the batches are shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[list[int]] = []
    for _ in range(epochs):
        batches: list[list[int]] = []
        for pool in torch.randperm(len(data), generator=generator).split(BATCH_SIZE * BATCHES_PER_POOL):
            by_length = sorted(pool.tolist(), key=lambda row: len(data.token_ids[row]))
            batches += [by_length[start : start + BATCH_SIZE] for start in range(0, len(by_length), BATCH_SIZE)]
        order += [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
    return order


def _warmup_then_linear(steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rates at each step: up to 1 in the warm-up, down to 0 at the end."""
    warmup = max(1, round(WARMUP * steps))
    return lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
