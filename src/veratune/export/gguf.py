"""Export as a LoRA in a GGUF file, for llama.cpp and programs built on it.

The matrices are those of the LoRA export, transformed the way llama.cpp's converter transforms the base model: tensors
are renamed, the rows of some queries and keys are reordered, and the experts' gate and up matrices are split. Only
architectures whose conversion is known are supported: see docs/engines.md.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from veratune.adapters.adapted_model import AdaptedModel
from veratune.adapters.names import without_wrappers
from veratune.export.lora import check_dtype, check_vectors_only
from veratune.layers import VeraLayer
from veratune.utils.atomic import replacing

GGUF_NAME = "adapter_model.gguf"

# For each model class in transformers, the architecture in llama.cpp and the order of rows after conversion. "pairs":
# rows of queries and keys that are rotated together, one in each half of a head, become adjacent. "parts": a fused
# layer with query, key and value head by head is reordered into all queries, then all keys, then all values.
_ARCHITECTURES: dict[str, tuple[str, Literal["pairs", "parts"] | None]] = {
    "ArceeForCausalLM": ("arcee", "pairs"),
    "BloomForCausalLM": ("bloom", "parts"),
    "Cohere2ForCausalLM": ("cohere2", None),
    "CohereForCausalLM": ("command-r", None),
    "GPT2LMHeadModel": ("gpt2", None),
    "GPTNeoXForCausalLM": ("gptneox", "parts"),
    "Gemma2ForCausalLM": ("gemma2", None),
    "Gemma3ForCausalLM": ("gemma3", None),
    "GemmaForCausalLM": ("gemma", None),
    "Glm4ForCausalLM": ("glm4", None),
    "GraniteForCausalLM": ("granite", "pairs"),
    "LlamaForCausalLM": ("llama", "pairs"),
    "MistralForCausalLM": ("llama", "pairs"),
    "MixtralForCausalLM": ("llama", "pairs"),
    "Olmo2ForCausalLM": ("olmo2", None),
    "Olmo3ForCausalLM": ("olmo2", None),
    "OlmoForCausalLM": ("olmo", "pairs"),
    "Phi3ForCausalLM": ("phi3", None),
    "PhiForCausalLM": ("phi2", None),
    "Qwen2ForCausalLM": ("qwen2", None),
    "Qwen2MoeForCausalLM": ("qwen2moe", None),
    "Qwen3ForCausalLM": ("qwen3", None),
    "Qwen3MoeForCausalLM": ("qwen3moe", None),
    "SmolLM3ForCausalLM": ("smollm3", "pairs"),
    "StableLmForCausalLM": ("stablelm", None),
    "Starcoder2ForCausalLM": ("starcoder2", None),
}
_GGML_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class _Pair(NamedTuple):
    """The two LoRA matrices of one tensor of the base model.

    Attributes:
        name: the tensor's name in the base model's file.
        a: (r, in); for a stack (n, r, in); for the token embedding (tokens, r).
        b: (out, r); for a stack (n, out, r).
    """

    name: str
    a: Tensor
    b: Tensor


class _Order(NamedTuple):
    """A permutation of rows: view them as (*outer, rest) and swap two of these axes."""

    outer: tuple[int, int]
    swapped: tuple[int, int]


def export_gguf(host: AdaptedModel, adapter_name: str, directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write an adapter as `adapter_model.gguf`, a LoRA for llama.cpp.

    Args:
        host: the model, whose base is a causal language model of transformers.
        adapter_name: the adapter's name.
        directory: the destination; an existing file of this name is replaced atomically.
        dtype: float32, float16 or bfloat16, for the matrices. With the latter two, llama.cpp also rounds activations.

    Returns:
        The path of the file.

    Raises:
        ImportError: the gguf package is not installed.
        ValueError: llama.cpp does not support this model or a part of the adapter, or `dtype` is invalid.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"writing a GGUF file requires gguf: pip install 'veratune[gguf]' ({error})") from None
    check_dtype(dtype)
    if dtype not in _GGML_TYPES:
        raise ValueError(f"dtype={dtype} is not allowed in GGUF files: use one of {list(map(str, _GGML_TYPES))}")
    architecture, order = _architecture(host.base_model)
    check_vectors_only(host, adapter_name, "llama.cpp's LoRA", "convert the model")
    layers = {name: layer for name, layer in host.vera_layers().items() if adapter_name in layer.entries}
    config: Any = without_wrappers(host.base_model).config
    architectures = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], config.num_hidden_layers)
    tied = bool(getattr(config, "tie_word_embeddings", None))
    placed = {name: _places(name, layer, names, tied=tied) for name, layer in layers.items()}
    orders = _orders(config, order)
    alpha = Counter(layer.entries[adapter_name].r for layer in layers.values()).most_common(1)[0][0]
    kind = getattr(gguf.GGMLQuantizationType, _GGML_TYPES[dtype])
    with replacing(directory / GGUF_NAME) as path, closing(gguf.GGUFWriter(path, architecture)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, layer in layers.items():
            for pair in _pairs(layer, adapter_name, placed[name], alpha, orders.get(name.rpartition(".")[2])):
                for side, matrix in (("lora_a", pair.a), ("lora_b", pair.b)):
                    data = gguf.quants.quantize(matrix.contiguous().numpy(), kind)
                    writer.add_tensor(f"{pair.name}.{side}", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return directory / GGUF_NAME


def _architecture(model: nn.Module) -> tuple[str, Literal["pairs", "parts"] | None]:
    kind = type(without_wrappers(model)).__name__
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"{kind} cannot be exported for llama.cpp, only {', '.join(_ARCHITECTURES)}. If llama.cpp supports the"
            " model, merge the adapter (merge_and_unload), save the merged model, and convert it"
        )
    return _ARCHITECTURES[kind]


def _places(name: str, layer: VeraLayer, names: Any, *, tied: bool) -> list[str]:
    """Return the names of the GGUF tensors that one weight becomes: one, or two for the experts' gate and up.

    Raises:
        ValueError: llama.cpp has no such tensor, or does not support LoRA for it.
    """
    stem = name.removesuffix(".weight") if layer.of_parameter else name
    tensor_names = [stem]
    if "gguf" not in layer.exports:
        tensor_names = []
    elif layer.geometry.count is not None:
        if layer.out_axis != 0 or not stem.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            tensor_names = []
        elif stem.endswith(".gate_up_proj"):
            tensor_names = [stem.removesuffix("gate_up_proj") + part for part in ("gate_proj", "up_proj")]
    found = [names.get_name(tensor_name) for tensor_name in tensor_names]
    reason = layer.why_not_lora()
    if not found or None in found:
        reason = f"no tensor that supports LoRA corresponds to it ({layer.kind})"
    elif tied and found[0] in ("output", "token_embd"):
        reason = "the output head and the token embedding share one tensor"
    if reason is not None:
        raise ValueError(
            f"llama.cpp's LoRA cannot hold the adapter on {name}: {reason}. Exclude the layer (exclude_modules), or"
            " merge the adapter (merge_and_unload) and convert the model"
        )
    return [f"{tensor_name}.weight" for tensor_name in found]


def _orders(config: Any, order: str | None) -> dict[str, _Order]:
    """Return the row permutation of each layer that is reordered, keyed by the last part of its name."""
    heads = int(config.num_attention_heads)
    if order == "parts":
        return {"query_key_value": _Order((heads, 3), (0, 1))}
    if order == "pairs":
        key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        return {"q_proj": _Order((heads, 2), (1, 2)), "k_proj": _Order((key_heads, 2), (1, 2))}
    return {}


def _pairs(
    layer: VeraLayer, adapter_name: str, tensor_names: list[str], alpha: int, order: _Order | None
) -> Iterator[_Pair]:
    """Yield the float32 matrices of each tensor of one weight, scaled so that llama.cpp's factor alpha / r cancels."""
    a, b = layer.lora_factors(adapter_name)
    r, count = layer.entries[adapter_name].r, layer.geometry.count
    if r != alpha:  # the file has one alpha for all layers
        b = b * (r / alpha)
    if layer.one_hot:
        a = a.t()
    if count is not None:
        a, b = a.view(count, r, -1), b.view(-1, r, count).permute(2, 0, 1)
    if order is not None:
        b = b.view(*order.outer, -1, r).transpose(*order.swapped).reshape(b.shape)
    for tensor_name, rows in zip(tensor_names, b.chunk(len(tensor_names), -2), strict=True):
        yield _Pair(tensor_name, a, rows)
