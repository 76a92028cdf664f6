"""`veratune chat`: answers of a trained language model, streamed, and its base model's to compare."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from command_line import run
from tiny_models import randomise_trainable, tiny_model
from tiny_text import tiny_tokenizer
from veratune import VeraConfig, VeraModel, get_peft_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chat") / "base"
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tuned = get_peft_model(model, VeraConfig(r=8, target_modules="all-linear"))
    randomise_trainable(tuned, std=0.5).save_pretrained(base.parent / "run" / "adapter")
    return base.parent / "run"


def answers(model: Any, lines: list[str], most: int, *, plain: bool = False) -> list[str]:
    """Answer lines by greedy decoding, token by token, from the full text of the chat."""
    tokenizer = tiny_tokenizer()
    messages: list[dict[str, str]] = []
    found = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        text = line if plain else tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=plain, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        while ids.shape[1] < length + most:
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == 1:
                break
        found.append(tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip())
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def says(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_answers_follow_each_other_and_begin_anew(
    base: Path, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    first, second = answers(plain, ["a b", "c"], 4)
    tuned = VeraModel.from_pretrained(plain, adapter)
    expected = answers(tuned, ["a b", "c"], 4)
    assert expected != [first, second] and expected[1] != answers(tuned, ["c"], 4)[0]
    says(monkeypatch, "a b", "", "c", "/new", "c")
    code, out, err = run(capsys, "chat", adapter, "--max-new-tokens", 4)
    assert code == 0, err
    assert [line.strip() for line in out.splitlines()] == [*expected, *answers(tuned, ["c"], 4)]
    says(monkeypatch, "a b", "c")
    code, out, _ = run(capsys, "chat", adapter / "adapter", "--max-new-tokens", 4, "--compare-base", "--model", base)
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert lines == [f"base: {first}", f"adapter: {expected[0]}", f"base: {second}", f"adapter: {expected[1]}"]


def test_plain_text_and_sampling(
    base: Path, adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = VeraModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base).eval(), adapter)
    expected = [answers(tuned, [line], 3, plain=True)[0] for line in ("a b", "c")]
    says(monkeypatch, "a b", "c")
    code, out, _ = run(capsys, "chat", adapter, "--max-new-tokens", 3, "--plain")
    assert code == 0 and [line.strip() for line in out.splitlines()] == expected
    sampled = []
    for seed in (1, 1, 2):
        says(monkeypatch, "a b", "c")
        given = ("--max-new-tokens", 6, "--temperature", 9.0, "--seed", seed)
        sampled.append(run(capsys, "chat", adapter, *given)[1])
    assert sampled[0] == sampled[1] != sampled[2]


def test_what_cannot_be_talked_to(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, "a " * 100)
    code, _, err = run(capsys, "chat", adapter)
    assert code == 1 and "positions: start another with /new" in err
    model = get_peft_model(tiny_model("bert"), VeraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "classifier")
    code, _, err = run(capsys, "chat", tmp_path / "classifier", "--model", base)
    assert code == 1 and "veratune predict" in err
    code, _, err = run(capsys, "chat", adapter, "--plain", "--system", "be kind")
    assert code == 1 and "leave it out" in err
