"""`veratune chat`: talk to a trained language model, and to its base model to compare."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veratune.cli.models import adapter_in, base_of, device_of, load_adapted, pad_with, tokenizer_of
from veratune.cli.output import print_text, printable, warning_line
from veratune.cli.train.chats import Message, chat_text
from veratune.cli.train.start import task_of_adapter
from veratune.model import VeraModel

_NEW = "/new"
_ADAPTER, _BASE = "adapter", "base"


class FullError(ValueError):
    """A chat has more tokens than the model has positions."""


@dataclass(frozen=True)
class Generation:
    """How to generate an answer.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: to sample with; 0 for the most likely tokens.
        seed: for sampling.
    """

    max_new_tokens: int
    temperature: float
    seed: int


def chat(
    run: Path,
    model: str | None,
    settings: Generation,
    *,
    compare_base: bool,
    plain: bool,
    system: str | None,
    device: str | None,
) -> None:
    """Answer the lines of standard input, until it ends.

    Args:
        run: a training run's output directory, or an adapter's.
        model: the base model; None for the one that the adapter names.
        settings: how to generate answers.
        compare_base: whether to print the base model's answers as well.
        plain: whether to continue lines as plain text, each by itself.
        system: the system message of each chat.
        device: the device's name.
    """
    adapter = adapter_in(run)
    base = base_of(adapter, model)
    if task_of_adapter(adapter) not in ("causal-lm", None):
        raise ValueError(
            f"{adapter} is for a classifier, which does not answer: veratune predict {adapter} --data ROWS"
        )
    tokenizer = tokenizer_of(adapter, base)
    if not plain and not tokenizer.chat_template:
        warning_line(
            "the tokenizer has no chat template: each line is continued as plain text, without the lines before"
        )
        plain = True
    if plain and system is not None:
        raise ValueError("--system is part of a chat, and plain text is continued here: leave it out")
    adapted = load_adapted(base, adapter).to(device_of(device))
    pad_with(adapted.base_model, tokenizer)
    torch.manual_seed(settings.seed)
    speakers = [_BASE, _ADAPTER] if compare_base else [_ADAPTER]
    talks = {
        name: _Talk(adapted, tokenizer, settings, system, plain=plain, adapted=name == _ADAPTER) for name in speakers
    }
    for line in _lines():
        if line == _NEW:
            for talk in talks.values():
                talk.begin()
            continue
        for name, talk in talks.items():
            if compare_base:
                print(f"{name}: ", end="", flush=True)
            try:
                talk.answer(line)
            except FullError as error:
                if not sys.stdin.isatty():
                    raise
                warning_line(str(error))
        if compare_base:
            print_text("")


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not empty; on a terminal, ask for each."""
    asks = sys.stdin.isatty()
    if asks:
        print_text(f"One message a line; {_NEW} starts another chat, and Ctrl-D ends it.")
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            if asks:
                print_text("")
            return
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:  # bytes that Python could not decode
                raise ValueError("standard input is not UTF-8: convert it first") from None
        if line.strip():
            yield line.strip()


class _Talk:
    """A chat with one model."""

    def __init__(
        self,
        model: VeraModel,
        tokenizer: Any,
        settings: Generation,
        system: str | None,
        *,
        plain: bool,
        adapted: bool,
    ) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._system, self._plain, self._adapted = system, plain, adapted
        self._messages: list[Message] = []
        self.begin()

    def begin(self) -> None:
        """Forget all messages."""
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def answer(self, line: str) -> None:
        """Print the answer to a message while it is generated, and remember both."""
        messages = [*self._messages, {"role": "user", "content": line}]
        text = line if self._plain else chat_text(self._tokenizer, messages, add_generation_prompt=True)
        encoded = self._tokenizer(text, add_special_tokens=self._plain, return_tensors="pt")
        inputs = {name: encoded[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        answer = self._generated(inputs)
        if not self._plain:
            self._messages = [*messages, {"role": "assistant", "content": answer}]

    def _generated(self, inputs: dict[str, torch.Tensor]) -> str:
        settings, length = self._settings, inputs["input_ids"].shape[1]
        config: Any = self._model.config
        most = getattr(config, "max_position_embeddings", None)
        left = settings.max_new_tokens if most is None else min(settings.max_new_tokens, most - length)
        if left < 1:
            raise FullError(
                f"the chat has {length} tokens, and the model only {most} positions: start another with {_NEW}"
            )
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.temperature:
            sampling = {"do_sample": True, "temperature": settings.temperature}
        with nullcontext() if self._adapted else self._model.disable_adapter():
            tokens = self._model.generate(
                **inputs,
                **sampling,
                max_new_tokens=left,
                streamer=_streamer(self._tokenizer),
                pad_token_id=self._tokenizer.pad_token_id,
            )
        return str(self._tokenizer.decode(tokens[0, length:], skip_special_tokens=True)).strip()


def _streamer(tokenizer: Any) -> Any:
    """Return a streamer that prints an answer's words as soon as they are complete."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(printable(text), end="\n" if stream_end else "", flush=True)

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
