"""The measured models and variants: full fine-tuning, PEFT's adapters and veratune's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel, T5Config, T5EncoderModel

import veratune


@dataclass(frozen=True)
class Shape:
    """The architecture and dimensions of an encoder or decoder without its head, and of its batch."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    batch: int
    length: int
    architecture: str = "bert"

    def build(self) -> nn.Module:
        """Return the model with random weights, in training mode, frozen, without dropout, which would hide costs."""
        return _ARCHITECTURES[self.architecture](self).train().requires_grad_(False)


# Vocabularies are small, as the inputs are embeddings.


def _bert(shape: Shape) -> nn.Module:
    config = BertConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return BertModel(config, add_pooling_layer=False)


def _t5(shape: Shape) -> nn.Module:
    config = T5Config(
        d_model=shape.hidden,
        d_ff=shape.intermediate,
        d_kv=shape.hidden // shape.heads,
        num_layers=shape.layers,
        num_heads=shape.heads,
        vocab_size=8,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def _llama(shape: Shape) -> nn.Module:
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        vocab_size=8,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaModel(config)


_ARCHITECTURES: dict[str, Callable[[Shape], nn.Module]] = {"bert": _bert, "t5": _t5, "llama": _llama}

SHAPES = {
    "MiniLM": Shape(layers=6, hidden=384, intermediate=1536, heads=12, batch=32, length=128),
    "BERT-base": Shape(layers=12, hidden=768, intermediate=3072, heads=12, batch=16, length=128),
    "DistilBERT": Shape(layers=6, hidden=768, intermediate=3072, heads=12, batch=16, length=128),
    "T5-small": Shape(layers=6, hidden=512, intermediate=2048, heads=8, batch=16, length=128, architecture="t5"),
    "small Llama": Shape(layers=8, hidden=512, intermediate=1408, heads=8, batch=16, length=128, architecture="llama"),
    "tiny": Shape(layers=2, hidden=32, intermediate=64, heads=2, batch=2, length=8),
}

FROZEN, FULL, PEFT_VERA, OURS = "frozen backbone", "full fine-tuning", "PEFT VeRA", "veratune"
LORA_8, LORA_64 = "PEFT LoRA r=8", "PEFT LoRA r=64"
OURS_FACTORED, OURS_DENSE = "veratune, route=factored", "veratune, route=dense"
OURS_LOW, OURS_FAST = "veratune, memory=low", "veratune, memory=fast"
OURS_BLOCKS_8, OURS_BLOCKS_16 = "veratune, 8 blocks", "veratune, 16 blocks"
OURS_BLOCKS_LOW = "veratune, 16 blocks, memory=low"
VARIANTS = (
    FROZEN,
    FULL,
    PEFT_VERA,
    LORA_8,
    LORA_64,
    OURS,
    OURS_FACTORED,
    OURS_DENSE,
    OURS_LOW,
    OURS_FAST,
    OURS_BLOCKS_8,
    OURS_BLOCKS_16,
    OURS_BLOCKS_LOW,
)
_OUR_SETTINGS: dict[str, dict[str, Any]] = {
    OURS: {},
    OURS_FACTORED: {"route": "factored"},
    OURS_DENSE: {"route": "dense"},
    OURS_LOW: {"memory": "low"},
    OURS_FAST: {"memory": "fast"},
    OURS_BLOCKS_8: {"projection": "blocks", "projection_blocks": 8},
    OURS_BLOCKS_16: {"projection": "blocks", "projection_blocks": 16},
    OURS_BLOCKS_LOW: {"projection": "blocks", "projection_blocks": 16, "memory": "low"},
}


def make_variant(name: str, base: nn.Module, r: int, target_modules: str | list[str] = "all-linear") -> nn.Module:
    """Return a copy of a frozen model, made trainable in the way that a variant's name says."""
    model = copy.deepcopy(base)
    if name == FROZEN:
        return model
    if name == FULL:
        return model.requires_grad_(True)
    if name == PEFT_VERA:
        return peft.get_peft_model(model, peft.VeraConfig(r=r, target_modules=target_modules))
    if name in (LORA_8, LORA_64):
        return peft.get_peft_model(model, peft.LoraConfig(r=8 if name == LORA_8 else 64, target_modules=target_modules))
    settings = _OUR_SETTINGS[name]
    return veratune.get_peft_model(model, veratune.VeraConfig(r=r, target_modules=target_modules, **settings))


class Step:
    """One training step: forward, backward to the input and the trainable parameters, and AdamW.

    The inputs are embeddings that require a gradient, for every variant: so all of them have the same way to go back,
    that of the frozen backbone, and nothing beside it but what the adapter costs.
    """

    def __init__(self, model: nn.Module, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (shape.batch, shape.length, shape.hidden)
        self.model = model
        self.inputs = torch.randn(size, generator=generator).requires_grad_()
        self.gradient = torch.randn(size, generator=generator) / self.inputs.numel()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-5) if trainable else None

    def __call__(self) -> None:
        self.clear()
        self.model(inputs_embeds=self.inputs).last_hidden_state.backward(self.gradient)
        if self.optimizer is not None:
            self.optimizer.step()

    def clear(self) -> None:
        """Drop all gradients."""
        self.inputs.grad = None
        if self.optimizer is not None:
            self.optimizer.zero_grad()


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, buffers and projections, each tensor counted once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    projections = {
        values.untyped_storage().data_ptr(): values.untyped_storage().nbytes()
        for layer in (model.vera_layers().values() if isinstance(model, veratune.VeraModel) else ())
        for entry in layer.entries.values()
        for view in entry.views
        for values in view.tensors.values()
    }
    return sum((storages | projections).values())


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
LLAMA_TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(dimensions: dict[str, int], device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return a frozen Llama; off the meta device its weights are all one small number, which is quick to write."""
    config = LlamaConfig(**dimensions, vocab_size=32000, attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype).requires_grad_(False)
    if device != "meta":
        model.to_empty(device=device)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(0.01)
    return model
