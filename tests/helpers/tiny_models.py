"""Tiny random transformers models, seeded, float32, without dropout, in eval mode.

Every bias and norm is random as well, so that a bias that is lost or mixed up changes the output.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

_TEXT = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_ROTARY = {**_TEXT, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}

# Names of linear layers of several shapes in each model.
TARGETS = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "t5": ["q", "v", "o", "wi", "wo"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "distilbert": ["q_lin", "v_lin", "lin1", "lin2"],
}
KINDS = ("bert", "gpt2", "llama", "t5", "vit", "mixtral")


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        **_TEXT,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.3,
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**settings: Any) -> Any:
    """A Llama with these settings in place of the usual ones; its weights are drawn at each call."""
    usual = {**_ROTARY, "intermediate_size": 40, "max_position_embeddings": 32, "initializer_range": 0.3}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**usual, **settings}))


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=12, d_ff=40, num_layers=2, num_heads=2, dropout_rate=0.0, pad_token_id=2
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return transformers.ViTForImageClassification(config)


def _mixtral() -> nn.Module:
    # The experts are 3-D parameters in transformers 5; only the attention has linear layers.
    config = transformers.MixtralConfig(
        **_ROTARY,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return transformers.MixtralForCausalLM(config)


def _distilbert() -> nn.Module:
    # Its head is made of two modules, "pre_classifier" and "classifier".
    config = transformers.DistilBertConfig(
        vocab_size=50,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=32,
        num_labels=3,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.3,
    )
    return transformers.DistilBertForSequenceClassification(config)


_BUILDERS = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": llama,
    "t5": _t5,
    "vit": _vit,
    "mixtral": _mixtral,
    "distilbert": _distilbert,
}


def tiny_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of this kind; equal bits at every call, whatever was drawn before."""
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = _BUILDERS[kind]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2 if name.endswith("bias") else 0.1)
    return model.to(dtype).eval()


def tiny_inputs(kind: str) -> dict[str, Tensor]:
    """The keyword arguments of one call: two examples."""
    generator = torch.Generator().manual_seed(99)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 50, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.randint(3, 50, (2, 5), generator=generator)
    return inputs


def main_output(model: nn.Module, kind: str) -> Tensor:
    """The logits for `tiny_inputs(kind)`, in the caller's grad mode."""
    inputs = tiny_inputs(kind)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    if kind in ("gpt2", "llama", "mixtral", "t5"):
        inputs["use_cache"] = False
    return model(**inputs).logits


def randomise_trainable(model: nn.Module, seed: int = 7, std: float = 0.5) -> nn.Module:
    """Give every trainable parameter (vectors, heads, biases) normal random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model
