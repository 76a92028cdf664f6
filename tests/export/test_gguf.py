"""GGUF files with a LoRA, read back with the gguf package and compared with float64 dense deltas.

How llama.cpp lays a weight out is taken from the other direction: transformers' reader of GGUF files, which turns
queries and keys of Llama and what is fused in BLOOM back, and transposes GPT-2's.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from exported import adapted, deltas
from layer_kinds import mixtral, qwen_moe, seeded
from reference import relative
from tiny_models import randomise_trainable, tiny_model

gguf = pytest.importorskip("gguf")

_SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 2,
}


@seeded
def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES, num_key_value_heads=2))


@seeded
def phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**_SIZES))


@seeded
def tied_llama() -> nn.Module:
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


@seeded
def bloom() -> nn.Module:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=4))


_ATTENTION = {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
_MLP = {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
_EXPERTS = {"mlp.experts.gate_up_proj": "ffn_gate_exps ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps"}
_GPT2 = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_PHI3 = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOOM = {
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_HEAD = {"model.embed_tokens": "token_embd", "lm_head": "output"}

# The model, settings of the adapter, its architecture in llama.cpp, and what each layer of a block is called there.
_MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str, dict[str, str]]] = {
    "llama": (lambda: tiny_model("llama"), {}, "llama", _ATTENTION | _MLP),
    "llama with its table and head": (
        lambda: tiny_model("llama"),
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        "llama",
        {"self_attn.q_proj": "attn_q"} | _HEAD,
    ),
    "two ranks": (lambda: tiny_model("llama"), {"rank_pattern": {"k_proj": 3}}, "llama", _ATTENTION | _MLP),
    "mixtral": (mixtral, {}, "llama", _ATTENTION | _EXPERTS),
    "router": (
        mixtral,
        {"target_modules": ["k_proj"], "target_parameters": ["gate.weight"]},
        "llama",
        {"self_attn.k_proj": "attn_k", "mlp.gate.weight": "ffn_gate_inp"},
    ),
    "qwen2": (qwen2, {}, "qwen2", _ATTENTION | _MLP),
    "qwen3_moe": (qwen_moe, {}, "qwen3moe", _ATTENTION | _EXPERTS),
    "gpt2": (lambda: tiny_model("gpt2"), {}, "gpt2", _GPT2),
    "bloom": (bloom, {}, "bloom", _BLOOM),
    "phi3": (phi3, {}, "phi3", _PHI3),
    "fused parts": (
        phi3,
        {"target_modules": ["qkv_proj"], "fused_parts": {"qkv_proj": 3}},
        "phi3",
        {"self_attn.qkv_proj": "attn_qkv"},
    ),
}


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a GGUF file's metadata and its tensors in float64."""
    reader = gguf.GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).double()
        for tensor in reader.tensors
    }
    return values, tensors


@pytest.mark.parametrize("kind", _MODELS)
def test_the_products_are_the_deltas_in_the_layout_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    make, settings, architecture, blocks = _MODELS[kind]
    model = adapted(make, **settings)
    file = model.export_gguf(tmp_path)
    assert file == tmp_path / "adapter_model.gguf"
    values, tensors = read(file)
    assert values["general.architecture"] == architecture
    assert values["general.type"] == "adapter" and values["adapter.type"] == "lora"
    alpha = values["adapter.lora.alpha"]
    assert alpha == 4.0
    config: Any = model.config.to_dict()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config)
    expected, met = deltas(model), set()
    for name, delta in expected.items():
        stem = name.removesuffix(".weight")
        number = next((part for part in stem.split(".") if part.isdigit()), None)
        ours, theirs = next((a, b) for a, b in blocks.items() if stem.endswith(a.removesuffix(".weight")))
        met.add(ours)
        products = []
        for place in theirs.split():
            prefix = f"{place}.weight" if number is None else f"blk.{number}.{place}.weight"
            a, b = tensors.pop(f"{prefix}.lora_a"), tensors.pop(f"{prefix}.lora_b")
            # llama.cpp takes rows of the table's lora_a.
            product = a @ b.t() if place == "token_embd" else b @ a
            product = product * (alpha / b.shape[-1])
            if "exps" not in place:
                product = torch.from_numpy(processor.process(product.numpy(), prefix).weights)
            products.append(product)
        product = torch.cat(products, -2)
        assert float(delta.abs().max()) > 0.01
        assert relative(product.view(delta.shape), delta) < 1e-6, name
    assert met == set(blocks) and not tensors  # nothing else is in the file


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_half_precision_is_rounded_once(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    model = adapted(lambda: tiny_model("llama"))
    _, exact = read(model.export_gguf(tmp_path / "exact"))
    file = model.export_gguf(tmp_path / "rounded", dtype=dtype)
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors} == {kind}
    _, rounded = read(file)
    assert rounded.keys() == exact.keys()
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.to(dtype).double()), name


@pytest.mark.filterwarnings("ignore:veratune. .* shares its weight with:UserWarning")
@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            lambda: tiny_model("bert"),
            {},
            "BertForSequenceClassification cannot be exported for llama.cpp, only .*",
        ),
        (lambda: tiny_model("llama"), {"modules_to_save": ["lm_head"]}, "cannot hold .* in full: lm_head"),
        (lambda: tiny_model("gpt2"), {"bias": "vera_only"}, r"in full: transformer\.h\.0\.attn\.c_attn\.bias"),
        (tied_llama, {"target_modules": ["q_proj", "embed_tokens"]}, "on model.embed_tokens: .* one tensor"),
        (tied_llama, {"target_modules": ["q_proj", "lm_head"]}, "on lm_head: .* one tensor"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(
    make: Callable[[], nn.Module], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = adapted(make, **settings)
    with pytest.raises(ValueError, match=message):
        model.export_gguf(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_layer_without_a_counterpart_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    base.model.layers[1].extra = nn.Linear(4, 4)
    model = adapted(lambda: base, target_modules=["q_proj", "extra"])
    with pytest.raises(ValueError, match=r"on model\.layers\.1\.extra: no tensor that supports LoRA .*exclude_modules"):
        model.export_gguf(tmp_path)
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(ValueError, match="is not allowed"):
            model.export_gguf(tmp_path, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(lambda: tiny_model("llama"))
    before = model.export_gguf(tmp_path).read_bytes()

    def full(self: Any, **_: Any) -> None:
        raise OSError("no space left")

    randomise_trainable(model, seed=8)
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
        with pytest.raises(OSError, match="no space"):
            model.export_gguf(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.gguf"]
    assert (tmp_path / "adapter_model.gguf").read_bytes() == before
    assert model.export_gguf(tmp_path).read_bytes() != before


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'veratune\[gguf\]'"):
        adapted(lambda: tiny_model("llama")).export_gguf(tmp_path)
