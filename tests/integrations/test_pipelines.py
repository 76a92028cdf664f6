"""transformers' pipelines take a `VeraModel` in the place of the model, and say what the merged model says."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import pipeline

from tiny_models import TARGETS, randomise_trainable, tiny_model
from tiny_text import tiny_tokenizer
from veratune import VeraConfig, VeraModel, get_peft_model

TEXT = "a b maybe"
TASKS = {
    "text-classification": (transformers.BertForSequenceClassification, "bert", {"top_k": None}),
    "token-classification": (transformers.BertForTokenClassification, "bert", {}),
    "fill-mask": (transformers.BertForMaskedLM, "bert", {"top_k": 50}),
    "feature-extraction": (transformers.BertModel, "bert", {}),
    "text-generation": (transformers.LlamaForCausalLM, "llama", {"max_new_tokens": 6, "do_sample": False}),
}


def base_model(task: str) -> Any:
    model_class, kind, _ = TASKS[task]
    model = tiny_model(kind)
    if type(model) is not model_class:
        torch.manual_seed(5)
        model = model_class(model.config).eval()
    return model


def numbers(result: Any) -> torch.Tensor:
    """Return the scores or features that a pipeline gave, in an order that does not depend on them."""
    if isinstance(result[0], list) and isinstance(result[0][0], dict):
        result = result[0]
    if isinstance(result[0], dict):
        keys = ("label", "index", "token")
        rows = sorted(result, key=lambda row: tuple(str(row.get(key)) for key in keys))
        return torch.tensor([float(row["score"]) for row in rows])
    return torch.tensor(result)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What transformers logs, which it keeps from the root logger."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_says_what_the_merged_model_says(task: str, logged: pytest.LogCaptureFixture) -> None:
    _, kind, settings = TASKS[task]
    text = "a <mask> maybe" if task == "fill-mask" else TEXT
    config = VeraConfig(r=5, target_modules=TARGETS[kind], modules_to_save=[])
    model = randomise_trainable(get_peft_model(base_model(task), config), std=0.3).eval()
    wrapped = pipeline(task, model=model, tokenizer=tiny_tokenizer(), device="cpu", **settings)
    if task not in ("fill-mask", "feature-extraction"):  # for which transformers does not look
        assert "'VeraModel' is not supported" in logged.text  # as the documents say
    logged.clear()
    run = pipeline(task, model=model.base_model, tokenizer=tiny_tokenizer(), device="cpu", **settings)
    assert "is not supported" not in logged.text
    ours, batch = run(text), run([text, f"{text} yes no"], batch_size=2)
    assert wrapped(text) == ours
    with model.disable_adapter():
        without = run(text)
    plain = pipeline(task, model=base_model(task), tokenizer=tiny_tokenizer(), device="cpu", **settings)(text)
    unloaded = model.merge_and_unload()
    merged = pipeline(task, model=unloaded, tokenizer=tiny_tokenizer(), device="cpu", **settings)(text)
    assert len(batch) == 2
    if task == "text-generation":
        assert ours == merged and ours != without and without == plain
        return
    torch.testing.assert_close(numbers(ours), numbers(merged), rtol=1e-4, atol=1e-5)
    assert torch.equal(numbers(without), numbers(plain))
    assert not torch.allclose(numbers(ours), numbers(without), rtol=1e-2, atol=1e-3)


def test_a_loaded_classifier_knows_its_classes(tmp_path: Path) -> None:
    def base(labels: list[str]) -> Any:
        model = tiny_model("bert")
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: number for number, name in enumerate(labels)}
        return model

    def told(model: Any) -> str:
        return pipeline("text-classification", model=model.base_model, tokenizer=tiny_tokenizer())(TEXT)[0]["label"]

    names, unnamed = ["bad", "fair", "good"], ["LABEL_0", "LABEL_1", "LABEL_2"]
    config = VeraConfig(r=5, target_modules=TARGETS["bert"])
    model = randomise_trainable(get_peft_model(base(names), config), std=0.3).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = VeraModel.from_pretrained(base(unnamed), tmp_path / "adapter")
    assert told(loaded) == told(model) in names
    assert loaded.config.label2id == {"bad": 0, "fair": 1, "good": 2}
    with pytest.warns(UserWarning, match="classes bad, fair, good, but this model's are good, bad"):
        other = VeraModel.from_pretrained(base(["good", "bad", "fair"]), tmp_path / "adapter")
    assert other.config.id2label == {0: "good", 1: "bad", 2: "fair"}

    # Without a head of its own an adapter does not say what the outputs mean.
    headless = get_peft_model(base(names), VeraConfig(r=5, target_modules=TARGETS["bert"], modules_to_save=[]))
    headless.save_pretrained(tmp_path / "headless")
    assert VeraModel.from_pretrained(base(unnamed), tmp_path / "headless").config.id2label[0] == "LABEL_0"
    numbered = get_peft_model(base(unnamed), config)
    numbered.save_pretrained(tmp_path / "numbered")
    assert VeraModel.from_pretrained(base(names), tmp_path / "numbered").config.id2label[0] == "bad"
