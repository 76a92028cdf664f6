"""The ways to serve many adapters that are compared: the bank, PEFT's, and a plain LoRA with gathered matrices."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, DynamicCache, LlamaConfig, LlamaModel

import veratune
from veratune.bank import AdapterBank

LAYERS, HIDDEN, INTERMEDIATE, HEADS = 6, 384, 1536, 12
BASE, MERGED = "base model", "one adapter, merged"
OURS, OURS_FACTORED, OURS_BLOCKS = "veratune", "veratune, route=factored", "veratune, 16 blocks"
LORA_8, LORA_16, LORA_BMM, PEFT_VERA = "PEFT LoRA r=8", "PEFT LoRA r=16", "bmm LoRA r=8", "PEFT VeRA, by adapter"
WAYS = (MERGED, OURS, OURS_FACTORED, OURS_BLOCKS, LORA_8, LORA_16, LORA_BMM, PEFT_VERA)

Served = Callable[[list[str]], object]
"""Runs one batch, given the name of each sequence's adapter."""


def _shape() -> BertConfig:
    return BertConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=HEADS
    )


def encoder() -> nn.Module:
    """Return a BERT of MiniLM's shape with random weights."""
    torch.manual_seed(0)
    return BertModel(_shape(), add_pooling_layer=False).eval().requires_grad_(False)


def classifier() -> nn.Module:
    """Return the same with a classification head."""
    torch.manual_seed(0)
    return BertForSequenceClassification(_shape()).eval().requires_grad_(False)


def decoder() -> nn.Module:
    """Return a Llama of the same shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=1000,
    )
    return LlamaModel(config).eval().requires_grad_(False)


def randomise(model: nn.Module, adapter: str, seed: int) -> None:
    """Give an adapter of any kind random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}" in name and parameter.is_floating_point():
            with torch.no_grad():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class Batch:
    """Inputs of a forward pass of an encoder, or of one step of a decoder that has read a prompt."""

    def __init__(self, model: nn.Module, rows: int, tokens: int, *, decode: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.decode = decode
        self.inputs = torch.randn(rows, 1 if decode else tokens, HIDDEN, generator=generator)
        self.prompt = torch.randn(rows, tokens, HIDDEN, generator=generator)
        self.caches: dict[int, DynamicCache] = {}
        if decode:
            for size in {rows // count for count in range(1, rows + 1) if rows % count == 0}:
                self.caches[size] = DynamicCache()
                with torch.no_grad():
                    model(inputs_embeds=self.prompt[:size], past_key_values=self.caches[size], use_cache=True)

    def run(self, call: Callable[..., object], rows: slice = slice(None), **extra: object) -> object:
        """Run a model on some of the rows."""
        inputs = self.inputs[rows]
        with torch.no_grad():
            if not self.decode:
                return call(inputs_embeds=inputs, **extra)
            cache = self.caches[len(inputs)]
            output = call(inputs_embeds=inputs, past_key_values=cache, use_cache=True, **extra)
            cache.crop(-1)
            return output


class GatheredLora(nn.Module):
    """A linear layer with stacked LoRA matrices, a different one for each sequence, the strongest simple baseline."""

    def __init__(self, base: nn.Linear, count: int, r: int) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("a", 0.02 * torch.randn(count, base.in_features, r))
        self.register_buffer("b", 0.02 * torch.randn(count, r, base.out_features))
        self.rows = torch.zeros(0, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.base(x), torch.bmm(x, self.a[self.rows]), self.b[self.rows])


def serve(way: str, base: nn.Module, names: list[str], r: int, batch: Batch) -> Served:
    """Return a function that serves a batch with one of the variants, with all adapters loaded."""
    model = copy.deepcopy(base)
    if way == BASE:
        return lambda _: batch.run(model)
    if way == MERGED:
        tuned = veratune.get_peft_model(model, veratune.VeraConfig(r=r, target_modules="all-linear"))
        randomise(tuned, "default", 0)
        merged = tuned.merge_and_unload().eval()
        return lambda _: batch.run(merged)
    if way in _OUR_SETTINGS:
        return _bank(model, base, names, r, batch, _OUR_SETTINGS[way])
    if way == LORA_BMM:
        return _gathered(model, names, batch)
    if way == PEFT_VERA:
        return _by_adapter(model, names, r, batch)
    config = peft.LoraConfig(r=8 if way == LORA_8 else 16, target_modules="all-linear")
    peer = _peft_model(model, config, names)
    return lambda rows: batch.run(peer, adapter_names=rows)


_OUR_SETTINGS: dict[str, dict[str, Any]] = {
    OURS: {},
    OURS_FACTORED: {"route": "factored"},
    OURS_BLOCKS: {"projection": "blocks", "projection_blocks": 16},
}


def _bank(
    model: nn.Module, base: nn.Module, names: list[str], r: int, batch: Batch, settings: dict[str, Any]
) -> Served:
    config = veratune.VeraConfig(r=r, target_modules="all-linear", **settings)
    bank = AdapterBank(model, config, capacity=len(names))
    source = veratune.get_peft_model(copy.deepcopy(base), config)
    for seed, name in enumerate(names):
        randomise(source, "default", seed)
        bank.add(name, source)
    return lambda rows: batch.run(bank.model, adapters=rows)


def _peft_model(model: nn.Module, config: peft.PeftConfig, names: list[str]) -> nn.Module:
    tuned = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        tuned.add_adapter(name, config)
    for seed, name in enumerate(names):
        randomise(tuned, name, seed)
    return tuned.eval()


def _by_adapter(model: nn.Module, names: list[str], r: int, batch: Batch) -> Served:
    tuned = _peft_model(model, peft.VeraConfig(r=r, target_modules="all-linear"), names)

    def run(rows: list[str]) -> object:
        outputs = []
        # Rows of one adapter stand together: this is the best that sorting a batch by adapter gives.
        size = len(rows) // len(set(rows))
        for start in range(0, len(rows), size):
            tuned.set_adapter(rows[start])
            outputs.append(batch.run(tuned, slice(start, start + size)))
        return outputs

    return run


def _gathered(model: nn.Module, names: list[str], batch: Batch) -> Served:
    layers = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layers.append(GatheredLora(child, len(names), 8))
                setattr(parent, name, layers[-1])
    numbers = {name: number for number, name in enumerate(names)}

    def run(rows: list[str]) -> object:
        chosen = torch.tensor([numbers[name] for name in rows])
        for layer in layers:
            layer.rows = chosen
        return batch.run(model)

    return run
