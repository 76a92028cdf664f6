"""One run of the quality study: a classifier is trained on a task's rows and scored on one other part of them."""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from quality_data import PAD, Rows, Study, Task
from quality_methods import Groups, Method

BATCH = 32
SCORED_BATCH = 250
WARMUP = 0.06
EAGER_STEPS = 3
BETWEEN_LOOKS_AT_THE_CLOCK = 25


class OutOfTimeError(Exception):
    """The time limit passed before a run was finished."""


class CaptureError(Exception):
    """A training step could not be captured as a CUDA graph."""


@dataclass
class Bench:
    """A study's data on a device, and the models of its tasks as they are before training."""

    study: Study
    device: torch.device
    _rows: dict[tuple[str, str], Rows] = field(default_factory=dict)
    _models: dict[int, BertForSequenceClassification] = field(default_factory=dict)

    def rows(self, task: Task, part: str) -> Rows:
        if (task.name, part) not in self._rows:
            self._rows[task.name, part] = task.rows[part].to(self.device)
        return self._rows[task.name, part]

    def model(self, task: Task, seed: int) -> BertForSequenceClassification:
        """Return a copy of the encoder with a new head, drawn as transformers does, from the seed alone."""
        if task.classes not in self._models:
            self._models[task.classes] = self.study.new_model(task.classes, self.device)
        model = copy.deepcopy(self._models[task.classes])
        drawn = torch.empty(model.classifier.weight.shape)
        drawn.normal_(std=model.config.initializer_range, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            model.classifier.weight.copy_(drawn)
            model.classifier.bias.zero_()
        return model


def train_and_score(
    bench: Bench, task: Task, method: Method, rate: float, seed: int, key: int, part: str, deadline: float, graphs: bool
) -> dict[str, Any]:
    """Train on the task's training rows and score on another part; read no other row.

    Args:
        bench: the data and models.
        task, method: what is trained, and how.
        rate: the method's learning rate.
        seed: decides the head, the batches and the dropout.
        key: of frozen projections.
        part: "validation" or "test".
        deadline: `time.monotonic()` at which to give up.
        graphs: replay training steps as a CUDA graph, if the device is one.

    Raises:
        OutOfTimeError: the deadline passed.
        CaptureError: `graphs` did not work.
    """
    started = time.perf_counter()
    model = method.adapt(bench.model(task, seed), seed, key)
    rows = bench.rows(task, "train")
    batches = batch_order(len(rows), task.epochs, seed)
    run = _Training(model, method.groups(model, rate), rows, batches.to(bench.device))
    torch.manual_seed(seed)
    model.train()
    if graphs and bench.device.type == "cuda":
        run.replay(deadline)
    else:
        run.eager(len(batches), deadline)
    losses = run.losses.tolist()
    accuracy, loss = score(model, bench.rows(task, part), deadline)
    head = sum(parameter.numel() for parameter in method.groups(model, rate)[-1]["params"])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "accuracy": accuracy,
        "loss": _finite(loss),
        "train_loss": _finite(sum(losses[-20:]) / len(losses[-20:])),
        "steps": len(losses),
        "trained": trained - head,
        "seconds": round(time.perf_counter() - started, 3),
    }


class _Training:
    """A training loop whose step reads and writes nothing but tensors on the device, so that it can be replayed."""

    def __init__(self, model: nn.Module, groups: Groups, rows: Rows, batches: Tensor) -> None:
        device = batches.device
        self.model, self.rows, self.batches = model, rows, batches
        self.factors = schedule(len(batches)).to(device)
        self.losses = torch.zeros(len(batches), device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._base_rates = [group["lr"] for group in groups]
        self._rates = [torch.zeros((), device=device) for _ in groups]
        with_rates = [{**group, "lr": rate} for group, rate in zip(groups, self._rates, strict=True)]
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(with_rates, weight_decay=0.0, fused=True, capturable=on_gpu)
        self._trim = not on_gpu

    def step(self) -> None:
        """Take the next batch, whose number is on the device, and count on."""
        chosen = self.batches.index_select(0, self._position)[0]
        token_ids = self.rows.token_ids.index_select(0, chosen)
        if self._trim:
            token_ids = trimmed(token_ids)
        logits = self.model(input_ids=token_ids, attention_mask=(token_ids != PAD).long()).logits
        loss = F.cross_entropy(logits.float(), self.rows.labels.index_select(0, chosen))
        loss.backward()
        factor = self.factors.index_select(0, self._position)[0]
        for rate, base in zip(self._rates, self._base_rates, strict=True):
            rate.copy_(factor * base)
        self._optimizer.step()
        self.losses.index_copy_(0, self._position, loss.detach()[None])
        self._position += 1

    def eager(self, steps: int, deadline: float) -> None:
        for _ in range(steps):
            self._optimizer.zero_grad(set_to_none=True)
            self.step()
            _look_at_the_clock(deadline)

    def replay(self, deadline: float) -> None:
        """Train by a CUDA graph of one step, after a few steps without, which make all that is made once."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.eager(EAGER_STEPS, deadline)
        torch.cuda.current_stream().wait_stream(stream)
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.step()
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        for step in range(EAGER_STEPS, len(self.batches)):
            graph.replay()
            if step % BETWEEN_LOOKS_AT_THE_CLOCK == 0:
                torch.cuda.synchronize()
                _look_at_the_clock(deadline)
        torch.cuda.synchronize()


def batch_order(rows: int, epochs: int, seed: int) -> Tensor:
    """Return the rows of each batch, (steps, BATCH); epochs run into each other, and the last rows may be left out."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])
    size = min(BATCH, rows)
    return order[: len(order) // size * size].view(-1, size)


def schedule(steps: int) -> Tensor:
    """Return the factor on the learning rates at each step: a linear warm-up, and a linear way down to zero."""
    warmup = max(1, round(WARMUP * steps))
    factors = [min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)) for step in range(steps)]
    return torch.tensor(factors)


def score(model: nn.Module, rows: Rows, deadline: float) -> tuple[float, float]:
    """Return the accuracy in percent and the mean loss."""
    model.eval()
    right: list[Tensor] = []
    losses: list[Tensor] = []
    with torch.no_grad():
        for token_ids, labels in _scored_batches(rows):
            logits = model(input_ids=token_ids, attention_mask=(token_ids != PAD).long()).logits.float()
            right.append((logits.argmax(dim=1) == labels).float())
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
            _look_at_the_clock(deadline)
    return 100 * torch.cat(right).double().mean().item(), torch.cat(losses).double().mean().item()


def _scored_batches(rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    by_length = (rows.token_ids != PAD).sum(1).argsort()
    for chosen in by_length.split(SCORED_BATCH):
        yield trimmed(rows.token_ids[chosen]), rows.labels[chosen]


def trimmed(token_ids: Tensor) -> Tensor:
    """Return rows without the columns in which all are filled up."""
    return token_ids[:, : int((token_ids != PAD).sum(1).max())]


def _look_at_the_clock(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise OutOfTimeError


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
