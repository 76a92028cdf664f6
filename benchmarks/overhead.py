"""What Python and launches take of one layer's call and backward pass, at a size at which nothing else takes time.

    PYTHONPATH=src python benchmarks/overhead.py

A GPU computes a small layer faster than Python launches its operations: this is then the layer's time. Times are CPU
times of this thread, which other processes disturb less than the clock on the wall. `--label` names the version that is
measured; to compare two, run both in turn, with the other version's `src` in PYTHONPATH.
"""

import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

import veratune
from common import Benchmark, Case, Table, Target, new_case, progress

WIDTH, TOKENS, RANK = 16, 4, 16
CALLS = 300
FROZEN, LORA, PEFT_VERA, OURS, OURS_BLOCKS = "frozen", "PEFT LoRA", "PEFT VeRA", "veratune", "veratune, 4 blocks"


def frozen(net: nn.Module) -> nn.Module:
    return net.requires_grad_(False)


def lora(net: nn.Module) -> nn.Module:
    return peft.get_peft_model(net, peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False))


def peft_vera(net: nn.Module) -> nn.Module:
    return peft.get_peft_model(net, peft.VeraConfig(r=RANK, target_modules=["0"]))


def ours(net: nn.Module) -> nn.Module:
    return veratune.get_peft_model(net, veratune.VeraConfig(r=RANK, target_modules=["0"]))


def ours_blocks(net: nn.Module) -> nn.Module:
    config = veratune.VeraConfig(r=RANK, target_modules=["0"], projection="blocks", projection_blocks=4)
    return veratune.get_peft_model(net, config)


VARIANTS = {FROZEN: frozen, LORA: lora, PEFT_VERA: peft_vera, OURS: ours, OURS_BLOCKS: ours_blocks}


def adapted_layer(make: Callable[[nn.Module], nn.Module], dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    """Return the layer itself, without the model around it, and what is trainable."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(dtype)
    model = make(net)
    return net[0], [parameter for parameter in model.parameters() if parameter.requires_grad]


def works(layer: nn.Module, trainable: list[Tensor], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    x = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    gradient = torch.randn(TOKENS, WIDTH).to(dtype)
    y = layer(x)
    return {
        "forward": lambda: layer(x),
        "backward": lambda: torch.autograd.grad(y, [x, *trainable], gradient, retain_graph=True),
    }


def microseconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(CALLS):
        work()
    return 1e6 * (time.thread_time() - start) / CALLS


def measure(dtype: torch.dtype, rounds: int, label: str) -> Case:
    """Return the microseconds of each variant's forward and backward pass, round by round."""
    measured = {
        (name, what): work
        for name, make in VARIANTS.items()
        for what, work in works(*adapted_layer(make, dtype), dtype).items()
    }
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in VARIANTS}
    for turn in range(rounds + 1):  # interleaved; the first round warms up
        for (name, what), work in measured.items():
            found = microseconds(work)
            if turn:
                times[name][what].append(found)
    short = str(dtype).removeprefix("torch.")
    return new_case(f"{label}, {short}", label=label, dtype=short, microseconds=times)


def total(case: Case, name: str) -> list[float]:
    """Return the microseconds of both passes, round by round."""
    own = case["microseconds"][name]
    return [forward + backward for forward, backward in zip(own["forward"], own["backward"], strict=True)]


def ratio(case: Case, name: str, baseline: str) -> float:
    return statistics.median(a / b for a, b in zip(total(case, name), total(case, baseline), strict=True))


def tables(cases: list[Case]) -> list[Table]:
    """Return a table for each version and dtype."""
    found = []
    for case in cases:
        rows = [
            (
                name,
                *(f"{statistics.median(case['microseconds'][name][what]):.0f}" for what in ("forward", "backward")),
                f"{min(total(case, name)):.0f}",
                f"{ratio(case, name, LORA):.2f}",
            )
            for name in case["microseconds"]
        ]
        header = ("", "forward, us", "backward, us", "both, fastest round", "both, x LoRA's")
        found.append(Table(f"{case['label']}, {case['dtype']}", header, rows))
    return found


def targets(cases: list[Case]) -> list[Target]:
    """Return the target: not much more than LoRA."""
    return [
        Target(f"{case['label']}, {case['dtype']}: layer's time relative to LoRA's", ratio(case, OURS, LORA), 1.2)
        for case in cases
    ]


BENCHMARK = Benchmark("overhead", tables, targets)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--rounds", type=int, help="default: 15; quick: 3")
    parser.add_argument("--label", default="now", help="of the version that is measured (default: now)")
    options = BENCHMARK.parse(parser)
    torch.set_num_threads(1)
    rounds = options.rounds or (3 if options.quick else 15)
    for dtype in (torch.float32, torch.bfloat16):
        progress(f"overhead: {options.label}, {dtype}")
        BENCHMARK.finish([measure(dtype, rounds, options.label)], options.output)


if __name__ == "__main__":
    main()
