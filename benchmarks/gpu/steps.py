"""Stages: training steps of a whole model and of single layers, eager and compiled."""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gpu.harness import Figures, Stage, Timing, interleave, peak_bytes, release_memory
from gpu.models import (
    DENSE_SCHEME,
    FROZEN,
    LLAMA_1B,
    LLAMA_TOY,
    LORA_8,
    LORA_16,
    PEFT_VERA,
    PEFT_VERA_HALF,
    Step,
    Variant,
    forced,
    held_bytes,
    linear,
    llama,
    sharing_copy,
    variants,
)
from veratune import VeraModel

DTYPE = torch.bfloat16
LENGTH = 1024
LAYERS = ((4096, 4096), (4096, 11008))
# With so many tokens the other routes are far from the best, or differ little from these; single layers have all.
ON_MODELS = {FROZEN, LORA_8, LORA_16}
ON_MODELS_AT_FIRST_RANK = {PEFT_VERA, PEFT_VERA_HALF}
ROUTES_ON_MODELS = (" auto", " folded")
Call = Callable[[nn.Module, Tensor], Tensor]


def run(stage: Stage) -> None:
    """Measure the model at three points, single layers, and the model at one more point."""
    ranks = (8, 16) if stage.toy else (256, 1024)
    tokens = (8,) if stage.toy else (2048, 8192)
    shapes = ((16, 24),) if stage.toy else LAYERS
    base = llama(LLAMA_TOY if stage.toy else LLAMA_1B, stage.device, DTYPE)
    points = [(r, count) for r in ranks for count in tokens]
    last = (ranks[1], tokens[0]) if len(tokens) > 1 else None

    def model(base: nn.Module, r: int, count: int) -> None:
        work = partial(whole_model, stage, base, r, count, r == ranks[0])
        stage.case(f"Llama 1B r={r} T={count}", work, seconds=10)

    for r, count in points:
        if (r, count) != last:
            model(base, r, count)
    for (r, count), (n, m) in itertools.product(points, shapes):
        stage.case(f"{n}->{m} r={r} T={count}", partial(single_layer, stage, n, m, r, count), seconds=2)
    if last is not None:
        model(base, *last)
    del base
    release_memory(stage.device)


def run_compiled(stage: Stage) -> None:
    """Measure compiled single layers and two layers of the model, beside the same in eager mode."""
    r = 8 if stage.toy else 256
    tokens = 16 if stage.toy else 2048
    n, m = (16, 24) if stage.toy else LAYERS[0]
    stage.case(f"{n}->{m} r={r} T={tokens}", partial(compiled_layer, stage, n, m, r, tokens), seconds=10)
    if stage.toy:
        return  # tracing a model takes long, and runs no other code than a layer
    base = llama(LLAMA_1B, stage.device, DTYPE, layers=2)
    stage.case(
        f"{base.config.num_hidden_layers} Llama layers r={r} T={tokens}",
        partial(compiled_model, stage, base, r, tokens),
        seconds=15,
    )


def whole_model(stage: Stage, base: nn.Module, r: int, tokens: int, first_rank: bool) -> Figures:
    """Time a model's step in those variants that matter there, and take their peak memory."""
    hidden = base.config.hidden_size
    length = min(LENGTH, tokens)
    names = ON_MODELS | (ON_MODELS_AT_FIRST_RANK if first_rank else set())
    own = {
        name: variant
        for name, variant in variants(r, hidden, base.config.intermediate_size, stage.device).items()
        if name in names or name.endswith(ROUTES_ON_MODELS) or name == f"{DENSE_SCHEME} mixed, weight kept"
    }
    return compare(stage, base, own, (tokens // length, length, hidden), call_model, rounds=5)


def call_model(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(inputs_embeds=x, use_cache=False)[0]
    return output


def single_layer(stage: Stage, n: int, m: int, r: int, tokens: int) -> Figures:
    """Time all variants of one layer's step."""
    base = linear(n, m, stage.device, DTYPE)
    return compare(stage, base, variants(r, n, m, stage.device), (tokens, n), nn.Module.__call__, rounds=5)


def compare(
    stage: Stage,
    base: nn.Module,
    own: dict[str, Variant],
    size: tuple[int, ...],
    call: Call,
    *,
    rounds: int,
) -> Figures:
    """Measure variants of a step: their peak memory and interleaved times."""
    x = torch.randn(size, device=stage.device).to(DTYPE).requires_grad_()
    with torch.no_grad():
        gradient = torch.randn_like(call(base, x)) / x.numel()
    works, memory, routes = {}, {}, {}
    errors: dict[str, str] = {}
    for name, variant in own.items():
        if stage.left <= 0:
            errors[name] = "left out: the stage's time was over"
            continue
        try:
            step, work = _made(base, variant, x, gradient, call)
            work()
            step.clear()
            peak = peak_bytes(work, stage.device)
            memory[name] = None if peak is None else peak + held_bytes(step.model, base)
            works[name] = work
            if isinstance(step.model, VeraModel) and variant.choice is None:
                count = x.numel() // x.shape[-1]
                chosen = [str(row.chosen.choice) for row in step.model.explain_routes(count)]
                routes[name] = {choice: chosen.count(choice) for choice in sorted(set(chosen))}
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {str(error)[:500]}"
            del error
            release_memory(stage.device)
    timing = interleave(works, stage, rounds, warmed=True)
    found = figures(timing, memory, routes, errors | timing.errors)
    del works
    release_memory(stage.device)
    return found


def _made(
    base: nn.Module, variant: Variant, x: Tensor, gradient: Tensor, call: Call
) -> tuple[Step, Callable[[], None]]:
    step = Step(variant.make(sharing_copy(base)), x, gradient, call)

    def work() -> None:
        with forced(variant.choice):
            step()

    return step, work


def figures(
    timing: Timing, memory: dict[str, int | None], routes: dict[str, dict[str, int]], errors: dict[str, str]
) -> Figures:
    """Return a case's figures; the line is the ratios to the frozen step."""
    ratios = timing.ratios(FROZEN)
    baseline = f"frozen {1e3 * timing.median(FROZEN):.2f} ms; " if FROZEN in timing.times else ""
    line = baseline + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if name != FROZEN)
    return {
        "ms": timing.milliseconds(),
        "ratios": ratios,
        "rounds": max((len(values) for values in timing.times.values()), default=0),
        "peak_bytes": memory,
        "routes": routes,
        "errors": errors,
        "line": line + (f"; failed: {sorted(errors)}" if errors else ""),
    }


# Compiled


def compiled_layer(stage: Stage, n: int, m: int, r: int, tokens: int) -> Figures:
    base = linear(n, m, stage.device, DTYPE)
    return _compiled(stage, base, variants(r, n, m, stage.device), (tokens, n), nn.Module.__call__)


def compiled_model(stage: Stage, base: nn.Module, r: int, tokens: int) -> Figures:
    length = min(LENGTH, tokens)
    hidden = base.config.hidden_size
    own = variants(r, hidden, base.config.intermediate_size, stage.device)
    return _compiled(stage, base, own, (tokens // length, length, hidden), call_model)


def _compiled(stage: Stage, base: nn.Module, own: dict[str, Variant], size: tuple[int, ...], call: Call) -> Figures:
    """Time those variants that are worth compiling, eager and compiled, while there is time to compile one more."""
    x = torch.randn(size, device=stage.device).to(DTYPE).requires_grad_()
    with torch.no_grad():
        gradient = torch.randn_like(call(base, x)) / x.numel()
    works: dict[str, Callable[[], None]] = {}
    errors: dict[str, str] = {}
    seconds: dict[str, float] = {}
    longest = 0.0
    torch._dynamo.reset()
    for name, variant in own.items():
        if not variant.compiled:
            continue
        step, works[f"{name}, eager"] = _made(base, variant, x, gradient, call)
        if stage.left < 1.2 * longest + 3:
            errors[name] = "not compiled: the stage's time was over"
            continue
        start = stage.left
        try:
            compiled = torch.compile(step.model, dynamic=False, backend="eager" if stage.toy else "inductor")
            again = Step(compiled, x, gradient, call)
            again()
            works[name] = again
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {str(error)[:1000]}"
            del error
        seconds[name] = start - stage.left
        longest = max(longest, seconds[name])
    timing = interleave(works, stage, 5)
    found = figures(timing, {}, {}, errors | timing.errors)
    return found | {"compile_seconds": seconds, "ratios_eager": timing.ratios(f"{FROZEN}, eager")}
