"""What the examples with a language model share: chats, the loss of answers, samples, and the checks at the end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from _assets import check, questions, smollm2

TOPICS = ("trivia", "ai", "literature", "science", "psychology", "money", "humor", "history", "food", "sports")
HELD_OUT = 64
SHOWN = ("What is the capital of France?", "What do you like to eat?", "Who wrote Hamlet?")
NEW_TOKENS = 24

Chat = list[dict[str, str]]


def load() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct and its tokenizer."""
    directory = smollm2()
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def chats() -> tuple[list[Chat], list[Chat]]:
    """Return chats of one question and one answer each: those to train with, and those held out."""
    rows = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for _, question, answer in questions(*TOPICS)
    ]
    return rows[HELD_OUT:], rows[:HELD_OUT]


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, rows: Sequence[Chat]) -> float:
    """Return the mean loss of a token of the answers, given their questions."""
    model.eval()
    total, count = 0.0, 0
    for chat in rows:
        prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + chat[-1]["content"] + "<|im_end|>")["input_ids"]])
        scores = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
        total -= float(scores.gather(-1, ids[0, start:, None]).sum())
        count += ids.shape[1] - start
    return total / count


def generate(model: Any, tokenizer: Any, question: str, **settings: Any) -> torch.Tensor:
    """Return the tokens of one answer."""
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    model.eval()
    tokens: torch.Tensor = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **settings)
    return tokens[0, inputs["input_ids"].shape[1] :]


def show_samples(model: Any, tokenizer: Any, title: str) -> None:
    print(f"  {title}")
    for question in SHOWN:
        text = tokenizer.decode(generate(model, tokenizer, question), skip_special_tokens=True)
        print(f"    {question} -> {' '.join(text.split())!r}")


def check_result(model: Any, tokenizer: Any, adapter: Path, before: float, held_out: Sequence[Chat]) -> None:
    """Print what an adapter learned and weighs, and check it: loaded anew, and merged."""
    after = answer_loss(model, tokenizer, held_out)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    print(f"  held-out loss {before:.3f} -> {after:.3f}; the adapter is {size / 1000:.0f} KB")
    check(after < before - 0.3, "the loss of answers never seen fell by more than 0.3")
    asked = [*SHOWN, *(chat[0]["content"] for chat in held_out[:6])]
    plain = [generate(model, tokenizer, question) for question in asked]
    model.merge_adapter()
    merged = [generate(model, tokenizer, question) for question in asked]
    model.unmerge_adapter()
    same = all(torch.equal(ours, theirs) for ours, theirs in zip(plain, merged, strict=True))
    check(same, f"merged and unmerged generation agree in all {sum(map(len, plain))} tokens")
