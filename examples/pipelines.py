"""transformers' pipelines with a `VeraModel` in the place of the model.

    python examples/pipelines.py

Each pipeline is run with an adapter, and with the same adapter merged into a plain model.
"""

from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

from _assets import check, minilm, package_directory, quiet
from _causal_lm import load
from _topics import classifier
from veratune import VeraConfig, VeraModel, get_peft_model


def adapted(model: Any) -> VeraModel:
    """Return a model with an adapter as if it had been trained."""
    model = get_peft_model(model.eval(), VeraConfig(r=32, target_modules="all-linear", modules_to_save=[]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for vectors in model.adapter_state("default").vectors.values():
            vectors["b"].copy_(torch.randn(vectors["b"].shape, generator=generator) * 0.1)
    return model


def both(task: str, model: VeraModel, tokenizer: Any, text: str, **settings: Any) -> tuple[Any, Any, Any]:
    """Return what a pipeline says with an adapter, without it, and with it merged, for a list of one text."""
    run = pipeline(task, model=model, tokenizer=tokenizer, device="cpu", **settings)
    ours = run([text])
    with model.disable_adapter():
        without = run([text])
    merged = pipeline(task, model=model.merge_and_unload(), tokenizer=tokenizer, device="cpu", **settings)([text])
    return ours, without, merged


def main() -> None:
    quiet()
    bert = AutoTokenizer.from_pretrained(minilm())
    ours, without, merged = both("text-classification", adapted(classifier()), bert, "Who wrote Hamlet?", top_k=None)
    scores = [{part["label"]: part["score"] for part in result[0]} for result in (ours, without, merged)]
    close = all(abs(scores[0][label] - scores[2][label]) < 1e-4 for label in scores[0])
    check(close and scores[0] != scores[1], "text-classification: the adapter's scores, merged or not")

    features = adapted(AutoModel.from_pretrained(minilm()))
    ours, without, merged = (np.array(part) for part in both("feature-extraction", features, bert, "A short sentence."))
    close = np.allclose(ours, merged, atol=1e-4) and not np.allclose(ours, without, atol=1e-2)
    check(close, "feature-extraction: the adapter's features, merged or not")

    directory = (
        package_directory("rxnmapper", "rxnmapper==0.4.3") / "models/transformers/albert_heads_8_uspto_all_1310k"
    )
    smiles = AutoTokenizer.from_pretrained(directory)
    model = adapted(AutoModelForMaskedLM.from_pretrained(directory))
    ours, without, merged = both("fill-mask", model, smiles, f"CC{smiles.mask_token}O", top_k=3)
    close = all(abs(a["score"] - b["score"]) < 1e-4 for a, b in zip(ours, merged, strict=True))
    check(close and ours != without, "fill-mask (a model that runs one layer twelve times): likewise")

    base, tokenizer = load()
    settings = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    ours, without, merged = both("text-generation", adapted(base), tokenizer, "The capital of France is", **settings)
    check(ours == merged, f"text-generation: the same text, merged or not: {ours[0][0]['generated_text']!r}")
    check(ours != without, "and another one than without the adapter")


if __name__ == "__main__":
    main()
