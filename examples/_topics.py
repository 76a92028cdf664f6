"""A small task for the examples with MiniLM: telling what a question is about (trivia, coding or AI)."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from _assets import minilm, questions

TOPICS = ("trivia", "coding", "ai")
HELD_OUT = 120

Row = dict[str, Any]


def classifier() -> Any:
    """Return MiniLM with a new head, the same at each call."""
    torch.manual_seed(0)
    names = dict(enumerate(TOPICS))
    return AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=len(TOPICS), id2label=names, label2id={name: i for i, name in names.items()}
    )


def rows() -> tuple[list[Row], list[Row], Any]:
    """Return the rows to train with, those held out, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    encoded = [
        {**tokenizer(question, truncation=True, max_length=32), "labels": TOPICS.index(topic)}
        for topic, question, _ in questions(*TOPICS)
    ]
    return encoded[HELD_OUT:], encoded[:HELD_OUT], tokenizer


@torch.no_grad()
def accuracy(model: Any, held_out: list[Row], tokenizer: Any) -> float:
    """Return the share of held-out questions whose topic is told."""
    model.eval()
    batch = tokenizer.pad(held_out, return_tensors="pt")
    labels = batch.pop("labels")
    return float((model(**batch).logits.argmax(-1) == labels).float().mean())
