"""Stage: a bank of 64 and of 1,024 adapters: mixed batches and decoding, eager and as a CUDA graph."""

import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import veratune
from gpu.harness import Figures, Stage, explained, graphed, interleave, release_memory, wait
from gpu.models import LLAMA_1B, LLAMA_TOY, llama, sharing_copy, structured_schemes
from veratune.bank import AdapterBank
from veratune.bank.layer_call import serving

DTYPE = torch.bfloat16
BASE, LORA = "base", "bmm LoRA r=8"
LIMIT = 0.15
"""Largest difference between a row in a mixed batch and the same adapter alone, relative to what the adapter changes.

Both are computed in bfloat16, differently: an adapter in the wrong row would be a difference of about 1.4.
"""


class Sizes:
    """The dimensions of the measurement."""

    def __init__(self, toy: bool) -> None:
        self.model, self.layers = (LLAMA_TOY, 1) if toy else (LLAMA_1B, 4)
        self.r = 8 if toy else 256
        self.rows, self.tokens, self.prompt = (4, 3, 5) if toy else (64, 32, 128)
        self.counts = (4, 6) if toy else (64, 1024)


class GatheredLora(nn.Module):
    """A linear layer with a stack of LoRA matrices, a different one for each row: the strongest simple baseline."""

    def __init__(self, base: nn.Linear, count: int, r: int, rows: Tensor) -> None:
        super().__init__()
        weight = base.weight
        self.base, self.rows = base, rows
        self.a = 0.02 * torch.randn(count, base.in_features, r, device=weight.device, dtype=weight.dtype)
        self.b = 0.02 * torch.randn(count, r, base.out_features, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        down = torch.bmm(x, self.a.index_select(0, self.rows))
        return torch.baddbmm(self.base(x), down, self.b.index_select(0, self.rows))


def with_lora(base: nn.Module, count: int, rows: Tensor) -> nn.Module:
    """Return a model whose linear layers are `GatheredLora`."""
    model = sharing_copy(base)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, GatheredLora(child, count, 8, rows))
    return model


class Inputs:
    """A batch of a forward pass, and one of a decoding step after a prompt."""

    def __init__(self, base: nn.Module, sizes: Sizes, device: torch.device) -> None:
        def normal(tokens: int) -> Tensor:
            return torch.randn(sizes.rows, tokens, sizes.model["hidden_size"], device=device).to(DTYPE)

        self.batch, self.token = normal(sizes.tokens), normal(1)
        self.cache = DynamicCache()
        with torch.no_grad():
            base(inputs_embeds=normal(sizes.prompt), past_key_values=self.cache, use_cache=True)
        self.read = [(layer.keys, layer.values) for layer in self.cache.layers]

    def forward(self, call: Callable[..., object], **extra: object) -> Tensor:
        with torch.no_grad():
            return call(inputs_embeds=self.batch, use_cache=False, **extra)[0]  # type: ignore[index]

    def decode(self, call: Callable[..., object], **extra: object) -> Tensor:
        for layer, (keys, values) in zip(self.cache.layers, self.read, strict=True):
            layer.keys, layer.values = keys, values
        with torch.no_grad():
            return call(inputs_embeds=self.token, past_key_values=self.cache, use_cache=True, **extra)[0]  # type: ignore[index]


KINDS = ("forward", "decode")


def run(stage: Stage) -> None:
    sizes = Sizes(stage.toy)
    base = llama(sizes.model, stage.device, DTYPE, layers=sizes.layers).eval()
    inputs = Inputs(base, sizes, stage.device)
    for scheme in schemes(sizes):
        ways = Ways(stage, sizes, base, inputs, scheme, max(sizes.counts))
        for count in sizes.counts:
            stage.case(f"{scheme}: add up to {count} adapters", partial(ways.fill, count), seconds=3)
            if ways.held < count:
                continue
            if count == sizes.counts[0]:
                stage.case(f"{scheme}: rows of a mixed batch", ways.check)
            for kind in KINDS:
                stage.case(f"{scheme}: {kind}, {count} adapters", partial(ways.measure, kind, count), seconds=2)
        del ways
        release_memory(stage.device)


def schemes(sizes: Sizes) -> tuple[str, ...]:
    """Return the schemes to measure."""
    hidden, wide = sizes.model["hidden_size"], sizes.model["intermediate_size"]
    return "per_dimension", *structured_schemes(sizes.r, hidden, wide)


class Ways:
    """The ways to serve a mixed batch of one scheme's adapters, and of LoRA's."""

    def __init__(self, stage: Stage, sizes: Sizes, base: nn.Module, inputs: Inputs, scheme: str, capacity: int) -> None:
        self.stage, self.sizes, self.base, self.inputs = stage, sizes, base, inputs
        config = veratune.VeraConfig(r=sizes.r, target_modules="all-linear", projection=scheme)
        self.source = veratune.get_peft_model(sharing_copy(base), copy.deepcopy(config)).eval()
        self.bank = AdapterBank(sharing_copy(base), config, capacity=capacity)
        self.held = 0
        self.generator = torch.Generator(device=stage.device).manual_seed(0)

    def fill(self, count: int) -> Figures:
        """Add adapters, each with values of its own."""
        start, before = time.perf_counter(), self.held
        vectors = [
            vector for layer in self.source.vera_layers().values() for vector in layer.vectors("default").values()
        ]
        while self.held < count:
            if self.stage.left <= 0:
                raise TimeoutError(f"only {self.held} adapters could be added")
            with torch.no_grad():
                for vector in vectors:
                    vector.normal_(std=0.3, generator=self.generator)
            self.bank.add(f"customer{self.held}", self.source)
            self.held += 1
        each = (time.perf_counter() - start) / (count - before)
        return {"ms_each": 1e3 * each, "bank_bytes": self.bank.nbytes, "line": f"{1e3 * each:.1f} ms each"}

    def names(self, count: int) -> list[str]:
        """Return each row's adapter, spread over those that the bank holds."""
        rows = self.sizes.rows
        return [f"customer{row * count // rows}" for row in range(rows)]

    def check(self) -> Figures:
        """Compare a row of a mixed batch with the same adapter alone in a model of its own."""
        last = f"customer{self.held - 1}"
        names: list[str | None] = [*self.names(self.held)]
        names[1], names[2] = last, None
        mixed = self.inputs.forward(self.bank.model, adapters=names).float()
        alone, plain = self.inputs.forward(self.source).float(), self.inputs.forward(self.base).float()
        errors = {
            "adapter": float((mixed[1] - alone[1]).norm() / alone[1].norm()),
            "base": float((mixed[2] - plain[2]).norm() / plain[2].norm()),
            "effect": float((alone[1] - plain[1]).norm() / plain[1].norm()),
        }
        passed = max(errors["adapter"], errors["base"]) <= LIMIT * errors["effect"]
        line = (
            f"{'the same as' if passed else 'NOT the same as'} alone: differences {errors['adapter']:.2g} with an"
            f" adapter, {errors['base']:.2g} without, where the adapter changes {errors['effect']:.2g}"
        )
        return {"errors": errors, "passed": passed, "line": line}

    def measure(self, kind: str, count: int) -> Figures:
        """Time a batch in which each row has another adapter."""
        names, call = self.names(count), getattr(self.inputs, kind)
        rows = torch.arange(self.sizes.rows, device=self.stage.device) * count // self.sizes.rows
        lora = with_lora(self.base, count, rows)
        works = {
            BASE: lambda: call(self.base),
            "bank": lambda: call(self.bank.model, adapters=names),
            LORA: lambda: call(lora),
        }
        with self.bank.lease(names) as lease:
            works["bank, leased"] = lambda: call(self.bank.model, adapters=lease)
            timing = interleave(works, self.stage, 7, least_seconds=0.02)
        ratios = timing.ratios(BASE)
        line = f"base {1e3 * timing.median(BASE):.2f} ms; " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items())
        return {"ms": timing.milliseconds(), "ratios": ratios, "errors": timing.errors, "line": line}

    def graphs(self, count: int, *, whole: bool) -> Figures:
        """Time a decoding step that was captured once: with the call's adapters looked up outside, or inside of it."""
        names, device, errors = self.names(count), self.stage.device, {}
        rows = torch.arange(self.sizes.rows, device=device) * count // self.sizes.rows
        lora = with_lora(self.base, count, rows)
        decode = self.inputs.decode
        replays: dict[str, Callable[[], object]] = {}
        differences = {}
        with self.bank.lease(names) as lease:
            call = self.bank.call_of(lease)

            def inside() -> Tensor:
                with serving(call):
                    return decode(self.bank.model.base_model)

            works: dict[str, Callable[[], Tensor]] = {BASE: lambda: decode(self.base)}
            if whole:
                works["bank"] = lambda: decode(self.bank.model, adapters=lease)
            else:
                works |= {"bank": inside, LORA: lambda: decode(lora)}
            for name, work in works.items():
                try:
                    expected = work().clone()
                    kept: list[Tensor] = []
                    replays[name] = graphed(lambda work=work, kept=kept: kept.append(work()), device)
                    replays[name]()
                    wait(device)
                    differences[name] = float((kept[-1] - expected).abs().max() / expected.abs().max())
                except Exception as error:
                    replays.pop(name, None)
                    errors[name] = explained(error)
                    del error
                    release_memory(device)
            timing = interleave(replays, self.stage, 7, least_seconds=0.01)
        ratios = timing.ratios(BASE)
        line = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()) or f"none: {sorted(errors)}"
        return {
            "ms": timing.milliseconds(),
            "ratios": ratios,
            "difference_to_eager": differences,
            "errors": errors | timing.errors,
            "line": line,
        }
