"""Stage: single layers' training steps and a bank's decoding steps, captured as CUDA graphs.

It is the last stage, and goes from what is sure to work to what may not: a capture that fails may spoil what follows.
"""

from functools import partial

import torch
from torch import nn

from gpu.bank import DTYPE, Inputs, Sizes, Ways, schemes
from gpu.harness import Figures, Stage, explained, graphed, interleave
from gpu.models import FROZEN, Step, forced, linear, llama, sharing_copy, variants
from gpu.steps import LAYERS


def run(stage: Stage) -> None:
    sizes = Sizes(stage.toy)
    base = llama(sizes.model, stage.device, DTYPE, layers=sizes.layers).eval()
    inputs = Inputs(base, sizes, stage.device)
    count = sizes.counts[0]
    all_ways = {scheme: Ways(stage, sizes, base, inputs, scheme, count) for scheme in schemes(sizes)}
    for scheme, ways in all_ways.items():
        stage.case(f"{scheme}: add {count} adapters", partial(ways.fill, count), seconds=2)
    shapes, r, tokens = (((16, 24),), 8, 8) if stage.toy else (LAYERS, 256, 2048)
    layers = [(n, m, linear(n, m, stage.device, DTYPE)) for n, m in shapes]
    for n, m, layer in layers:
        stage.case(f"{n}->{m} r={r} T={tokens}", partial(single_layer, stage, layer, n, m, r, tokens), seconds=2)
    for whole in (False, True):
        for scheme, ways in all_ways.items():
            if ways.held == count:
                what = "a whole call" if whole else "decode"
                stage.case(f"{scheme}: {what}, {count} adapters", partial(ways.graphs, count, whole=whole), seconds=1)


def single_layer(stage: Stage, base: nn.Module, n: int, m: int, r: int, tokens: int) -> Figures:
    """Time forward and backward passes of all variants."""
    x = torch.randn(tokens, n, device=stage.device).to(DTYPE).requires_grad_()
    gradient = torch.randn(tokens, m, device=stage.device).to(DTYPE) / x.numel()
    replays, errors = {}, {}
    for name, variant in variants(r, n, m, stage.device).items():
        step = Step(variant.make(sharing_copy(base)), x, gradient, nn.Module.__call__)

        def work(step: Step = step) -> None:
            step.clear()
            step.without_optimizer()

        try:
            with forced(variant.choice):
                replays[name] = graphed(work, stage.device)
        except Exception as error:
            errors[name] = explained(error)
            del error
    timing = interleave(replays, stage, 7)
    ratios = timing.ratios(FROZEN)
    line = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    failed = f"; failed: {sorted(errors)}" if errors else ""
    return {"ms": timing.milliseconds(), "ratios": ratios, "errors": errors | timing.errors, "line": line + failed}
