"""Microseconds of one layer's call and backward pass at a size at which only Python and launches take time.

    PYTHONPATH=src python benchmarks/overhead.py

A GPU computes a small layer faster than Python launches its operations: what this prints is then the layer's time.
"""

import time
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

import veratune

WIDTH, TOKENS, RANK = 16, 4, 8
CALLS, ROUNDS = 300, 9


def frozen(net: nn.Module) -> nn.Module:
    return net.requires_grad_(False)


def lora(net: nn.Module) -> nn.Module:
    return peft.get_peft_model(net, peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False))


def peft_vera(net: nn.Module) -> nn.Module:
    return peft.get_peft_model(net, peft.VeraConfig(r=RANK, target_modules=["0"]))


def ours(net: nn.Module) -> nn.Module:
    return veratune.get_peft_model(net, veratune.VeraConfig(r=RANK, target_modules=["0"]))


VARIANTS = {"frozen": frozen, "PEFT LoRA": lora, "PEFT VeRA": peft_vera, "veratune": ours}


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
    start = time.process_time()
    for _ in range(CALLS):
        work()
    return 1e6 * (time.process_time() - start) / CALLS


def main() -> None:
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        measured = {
            (name, what): work
            for name, make in VARIANTS.items()
            for what, work in works(*adapted_layer(make, dtype), dtype).items()
        }
        times: dict[tuple[str, str], list[float]] = {key: [] for key in measured}
        for _ in range(ROUNDS):  # interleaved; the first round warms up
            for key, work in measured.items():
                times[key].append(microseconds(work))
        for name in VARIANTS:
            forward, backward = (min(times[name, what][1:]) for what in ("forward", "backward"))
            short = str(dtype).removeprefix("torch.")
            print(f"{short:8} {name:10} forward {forward:4.0f} us, backward {backward:4.0f} us")


if __name__ == "__main__":
    main()
