"""Tiny models of the architectures that are exported for llama.cpp, with adapters, and what they compute here.

Three commands, in three processes: `make DIRECTORY`; `convert DIRECTORY SOURCE`, where SOURCE is llama.cpp's source
with its converters; `run DIRECTORY` in the environment of llama-cpp-python, which compares the logits.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = [3, 17, 42, 8, 25, 11, 30, 5, 44, 9]
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What an architecture needs beside the sizes above.
_SPECIAL: dict[str, dict[str, Any]] = {
    "BloomForCausalLM": {"tie_word_embeddings": True, "n_layer": 2, "n_head": 4},
    "Cohere2ForCausalLM": {"tie_word_embeddings": True},
    "CohereForCausalLM": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "GPT2LMHeadModel": {"tie_word_embeddings": True, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Gemma2ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "Gemma3ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "GemmaForCausalLM": {"head_dim": 16, "tie_word_embeddings": True},
    "Glm4ForCausalLM": {"head_dim": 16},
    "MixtralForCausalLM": _EXPERTS,
    "Phi3ForCausalLM": {"num_key_value_heads": 4},
    "PhiForCausalLM": {"num_key_value_heads": 4, "intermediate_size": 256},
    "Qwen2MoeForCausalLM": {**_EXPERTS, "shared_expert_intermediate_size": 48},
    "Qwen3ForCausalLM": {"head_dim": 16},
    "Qwen3MoeForCausalLM": {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True},
}


# What the converter reads in the configuration and transformers 5 does not have there any more.
_FORMER: dict[str, dict[str, Any]] = {
    "Cohere2ForCausalLM": {"rotary_pct": 1.0},
    "GPT2LMHeadModel": {"n_ctx": 64},
    "GPTNeoXForCausalLM": {"rotary_pct": 0.25},
}


def make(directory: Path) -> None:
    """Write a random model of each class, an adapter on it in two formats, and its logits."""
    from veratune.export.gguf import _ARCHITECTURES

    for kind in _ARCHITECTURES:
        (directory / kind).mkdir(parents=True)
        try:
            _make_one(kind, directory / kind)
        except Exception as error:  # the table is to say which one does not work
            _note(directory / kind, error)


def _note(directory: Path, error: BaseException) -> None:
    (directory / "error.txt").write_text(f"{type(error).__name__}: {error}"[:500])


def _make_one(kind: str, directory: Path) -> None:
    import torch
    import transformers

    from veratune import VeraConfig, get_peft_model

    model_class: Any = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**_SIZES | _SPECIAL.get(kind, {}))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(directory / "base")
    # Gemma's converter counts the tokens in this file.
    tokenizer = {"model": {"vocab": {str(i): i for i in range(_SIZES["vocab_size"])}}, "added_tokens": []}
    (directory / "base" / "tokenizer.json").write_text(json.dumps(tokenizer))
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        base = model(ids).logits[0]
    adapted = get_peft_model(model, VeraConfig(r=16, target_modules="all-linear", modules_to_save=[])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        logits = adapted(ids).logits[0]
    adapted.export_gguf(directory / "ours")
    adapted.export_lora(directory / "lora")
    np.savez(directory / "logits.npz", base=base.numpy(), adapted=logits.numpy())


def convert(directory: Path, source: Path) -> None:
    """Let llama.cpp's own converters write the base models, and the LoRA exports."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    for place in _made(directory):
        try:
            _convert_base(place / "base", place / "base.gguf")
        except Exception as error:  # as above
            _note(place, error)
            continue
        (place / "converter.json").write_text(json.dumps(_convert_lora(place, source)))


def _made(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir() and not (path / "error.txt").exists())


def _convert_base(model: Path, file: Path) -> None:
    """Convert a model, which has no tokenizer."""
    import conversion
    import gguf

    hparams = conversion.ModelBase.load_hparams(model, False)
    kind = hparams["architectures"][0]
    hparams |= _FORMER.get(kind, {})
    model_class: Any = conversion.get_model_class(kind)

    class WithoutVocabulary(model_class):
        model_arch = model_class.model_arch

        def set_vocab(self) -> None:
            self.gguf_writer.add_tokenizer_model("none")
            self.gguf_writer.kv_data[0].pop(f"{self.gguf_writer.arch}.vocab_size", None)
            self.gguf_writer.add_vocab_size(hparams["vocab_size"])

    WithoutVocabulary(model, gguf.LlamaFileType.ALL_F32, file, hparams=hparams).write()


def _convert_lora(place: Path, source: Path) -> dict[str, Any]:
    """Return how far our GGUF LoRA is from what llama.cpp's converter makes of the LoRA in PEFT's format."""
    import gguf

    script, output = source / "convert_lora_to_gguf.py", place / "theirs.gguf"
    sys.argv = [str(script), "--base", str(place / "base"), str(place / "lora"), "--outfile", str(output)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except (Exception, SystemExit) as error:  # it does not know every layer that we write
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    ours, theirs = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
        for file in (place / "ours" / "adapter_model.gguf", output)
    )
    equal = sum(name in theirs and np.array_equal(ours[name], theirs[name]) for name in ours)
    return {"tensors": len(ours), "equal": equal, "only_theirs": sorted(theirs.keys() - ours.keys())}


def run(directory: Path) -> None:
    import llama_cpp

    found = {}
    for file in sorted(directory.glob("*/error.txt")):
        found[file.parent.name] = {"error": file.read_text()}
    for place in _made(directory):
        expected = np.load(place / "logits.npz")
        try:
            base = _logits(llama_cpp, place / "base.gguf", None)
            adapted = _logits(llama_cpp, place / "base.gguf", place / "ours" / "adapter_model.gguf")
        except RuntimeError as error:
            found[place.name] = {"error": str(error)}
            continue
        found[place.name] = {
            "base_off": _off(base, expected["base"]),
            "adapted_off": _off(adapted, expected["adapted"]),
            "adapter_changes": _off(expected["base"], expected["adapted"]),
            "converter": json.loads((place / "converter.json").read_text()),
        }
    (directory / "found.json").write_text(json.dumps(found, indent=1))


def _off(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _logits(llama_cpp: Any, model: Path, lora: Path | None) -> np.ndarray:
    """Return the logits of all tokens (tokens, vocabulary)."""
    settings = llama_cpp.llama_model_default_params()
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), settings)
    if not loaded:
        raise RuntimeError(f"llama.cpp does not load {model.name}")
    context_settings = llama_cpp.llama_context_default_params()
    context_settings.n_ctx = 64
    # By default keys and values are kept in half precision.
    context_settings.type_k = context_settings.type_v = llama_cpp.GGML_TYPE_F32
    # Flash attention rounds to half precision in between.
    context_settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(loaded, context_settings)
    if lora is not None:
        adapter = llama_cpp.llama_adapter_lora_init(loaded, str(lora).encode())
        if not adapter:
            raise RuntimeError(f"llama.cpp does not load {lora.name}")
        _use(llama_cpp, context, adapter)
    size = len(TOKENS)
    batch = llama_cpp.llama_batch_init(size, 0, 1)
    batch.n_tokens = size
    for i, token in enumerate(TOKENS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (width,)).copy() for i in range(size)]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(loaded)
    return np.stack(rows)


def _use(llama_cpp: Any, context: Any, adapter: Any) -> None:
    import ctypes

    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (ctypes.c_float * 1)(1.0)
    assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales) == 0


if __name__ == "__main__":
    command, place, *more = sys.argv[1:]
    {"make": make, "convert": convert, "run": run}[command](Path(place), *(Path(path).resolve() for path in more))
