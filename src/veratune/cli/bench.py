"""`veratune bench`: time training steps on this machine, with veratune and alternatives."""

import os
import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from veratune.cli.models import device_of, load_model
from veratune.cli.output import bytes_text, cpu_name, print_json, print_table, print_text, warning_line
from veratune.cli.steps import (
    FROZEN,
    FULL,
    LORA,
    OURS,
    PEFT_VERA,
    VARIANTS,
    Step,
    fits_in_full,
    make_variant,
    random_inputs,
)
from veratune.cli.train.settings import dtype_of
from veratune.utils.text import counted
from veratune.utils.timing import interleaved, median_ratio, peak_device_bytes

_OTHERS_BUSY = 0.5


def bench(
    model: str,
    ranks: list[int],
    batch: int,
    length: int,
    rounds: int,
    *,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Time training steps of a model on this machine: veratune's, PEFT's, full fine-tuning, and the frozen model."""
    # Otherwise the memory profiler prints messages when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch_device = device_of(device)
    base: Any = load_model(model, weights=True)
    if dtype is not None:
        base = base.to(dtype_of(dtype))
    base = base.to(torch_device).requires_grad_(False).train()
    _without_dropout(base)
    inputs = random_inputs(base, batch, length, torch_device)
    if torch_device.type == "cpu":
        _warn_of_others()
    header = {
        "model": model,
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "batch": batch,
        "length": length,
        "rounds": rounds,
        "device": torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    cases = [_measure(base, rank, inputs, rounds, torch_device) for rank in ranks]
    if as_json:
        print_json(header | {"ranks": cases})
        return
    print_text(
        f"{model}: {header['parameters']:,} parameters, {header['dtype']}, batch {batch} x {length} on"
        f" {header['device']}, {counted(torch.get_num_threads(), 'thread')}, torch {header['torch']}; medians of"
        f" {counted(rounds, 'round')}"
    )
    for case in cases:
        _print_case(case)


def _measure(
    base: nn.Module, rank: int, inputs: dict[str, torch.Tensor], rounds: int, torch_device: torch.device
) -> dict[str, Any]:
    """Time all variants that support a rank."""
    steps: dict[str, Step] = {}
    left_out: dict[str, str] = {}
    for name in VARIANTS:
        if name == FULL and not fits_in_full(base, torch_device):
            left_out[name] = "its weights, gradients and moments do not fit into free memory"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step = Step(make_variant(name, base, rank), inputs)
                step()
        except ImportError:
            left_out[name] = "the peft package is not installed"
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
        except Exception as error:
            if name not in (PEFT_VERA, LORA):
                raise
            left_out[name] = " ".join(str(error).split()) or type(error).__name__
        else:
            steps[name] = step
    wait = (lambda: torch.cuda.synchronize(torch_device)) if torch_device.type == "cuda" else (lambda: None)
    with _told(rank, rounds) as after_each:
        times = interleaved(dict(steps), rounds, wait=wait, after_each=after_each)
        memory = {name: peak_device_bytes(step, torch_device) for name, step in steps.items()}
    return {
        "rank": rank,
        "steps": {
            name: {
                "seconds": statistics.median(times[name]),
                "all_seconds": times[name],
                "relative_to_frozen": median_ratio(times, name, FROZEN),
                "relative_to_veratune": median_ratio(times, name, OURS["auto"]),
                "trained_parameters": steps[name].trainable,
                "peak_bytes": memory[name],
            }
            for name in steps
        },
        "left_out": left_out,
    }


def _print_case(case: dict[str, Any]) -> None:
    rows = [
        (
            name,
            f"{1000 * step['seconds']:.1f}",
            f"{step['relative_to_frozen']:.2f}",
            f"{step['relative_to_veratune']:.2f}",
            bytes_text(step["peak_bytes"]),
            f"{step['trained_parameters']:,}",
        )
        for name, step in case["steps"].items()
    ]
    header = ("step", "ms", "x frozen", "x veratune", "peak memory", "trained")
    print_table(header, rows, title=f"r = {case['rank']}")
    for name, reason in case["left_out"].items():
        print_text(f"left out: {name}: {reason}")


@contextmanager
def _told(rank: int, rounds: int) -> Iterator[Any]:
    """Yield a function that prints the number of rounds to standard error if that is a terminal."""
    done = 0

    def after_each() -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\rr = {rank}: round {done} of {rounds}", end="", file=sys.stderr, flush=True)

    try:
        yield after_each
    finally:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _without_dropout(model: nn.Module) -> None:
    """Disable dropout, whose random numbers would hide the differences between variants."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attention_probs_dropout_prob", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _warn_of_others() -> None:
    """Warn if other processes are using the CPUs."""
    if not hasattr(os, "getloadavg"):
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > _OTHERS_BUSY * cores:
        warning_line(f"the machine is busy (load {load:.1f} on {cores} cores): trust the ratios, not the seconds")
