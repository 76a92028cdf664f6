"""transformers' pipelines take a `VeraModel` in the place of the model, and say what the merged model says."""

from typing import Any

import pytest
import torch
import transformers
from transformers import pipeline

from tiny_models import TARGETS, randomise_trainable, tiny_model
from tiny_text import tiny_tokenizer
from veratune import VeraConfig, get_peft_model

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


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_says_what_the_merged_model_says(task: str, recwarn: pytest.WarningsRecorder) -> None:
    _, kind, settings = TASKS[task]
    text = "a <mask> maybe" if task == "fill-mask" else TEXT
    config = VeraConfig(r=5, target_modules=TARGETS[kind], modules_to_save=[])
    model = randomise_trainable(get_peft_model(base_model(task), config), std=0.3).eval()
    run = pipeline(task, model=model, tokenizer=tiny_tokenizer(), device="cpu", **settings)
    ours, batch = run(text), run([text, f"{text} yes no"], batch_size=2)
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
    said = [str(warning.message) for warning in recwarn]
    assert not any("not supported" in line for line in said), said
