"""Weights that a library keeps in a few bits: reading them as numbers, and writing them back for merging.

Known are bitsandbytes' 4-bit and 8-bit weights, and tensors of a class of their own that have a `dequantize` method
(torchao). Whatever else computes a linear layer is trained through, and cannot be merged into.
"""

import copy
from typing import Any

from torch import Tensor, nn

# What bitsandbytes' 4-bit layers decide by whether they pack.
_PACKS = "support_avx512bf16_for_cpu"


def is_quantised(module: nn.Module) -> bool:
    """Return whether a module's weight is none that ordinary operations compute with."""
    weight = module._parameters.get("weight")
    return weight is None or type(weight) is not nn.Parameter or not weight.is_floating_point()


def why_not_readable(module: nn.Module) -> str | None:
    """Return None if `dequantised` can read a module's weight, otherwise the reason."""
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return f"{type(module).__name__} keeps its weight in a form of its own"
    if weight.is_meta:
        return "its weight is on the meta device and has no values"
    kind = type(weight).__name__
    if kind in ("Params4bit", "Int8Params"):
        done = weight.quant_state if kind == "Params4bit" else codes_of(module)
        return None if done is not None else "its weight is not quantised yet: move it to its device first"
    if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
        return None
    return f"its weight is a {kind} of the type {weight.dtype}"


def dequantised(module: nn.Module) -> Tensor:
    """Return a quantised weight as the numbers (out, in) that it stands for, in a floating-point dtype."""
    weight: Any = module._parameters["weight"]
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes import functional

        codes, state = weight.data, weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            codes, state = _usual_form(weight)
        full: Tensor = functional.dequantize_4bit(codes, state)
        return full
    if kind == "Int8Params":
        parts = codes_of(module)
        assert parts is not None
        codes, scales = parts
        return codes.float() * (scales.float() / 127.0)[:, None]
    plain: Tensor = weight.dequantize()
    return plain


def packs_in_evaluation(module: nn.Module) -> bool:
    """Return whether this is a 4-bit layer of bitsandbytes that packs its codes in evaluation on a CPU."""
    return bool(module.__dict__.get(_PACKS))


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers in a form that they can be differentiated through, now and from now on.

    In evaluation on a CPU they exchange their codes for others that only an inference kernel reads, and backward passes
    from then on, or under way, take these for the usual ones. The way back rounds the scales.
    """
    for module in model.modules():
        if packs_in_evaluation(module):
            module.__dict__[_PACKS] = False
            weight: Any = module._parameters["weight"]
            if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                weight.data, weight.quant_state = _usual_form(weight)


def _usual_form(weight: Any) -> tuple[Tensor, Any]:
    """Return the codes and the state that a 4-bit weight had before it was packed for a CPU; scales in float32."""
    from bitsandbytes import functional

    state = copy.copy(weight.quant_state)
    # The inverse restores the codes alone.
    state.absmax, state.original_nested = state.absmax.t().reshape(-1).float(), False
    codes, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    return codes, state


def loss_of_merging(module: nn.Module) -> str:
    """Return what merging does to a quantised weight, to stand behind "merging"."""
    if type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params"):
        return "rounds their weights to the few values they can have, anew"
    return "makes their weights plain numbers, of the size that they had before they were quantised"


def requantised(module: nn.Module, full: Tensor) -> nn.Parameter:
    """Return a weight of the same kind for other numbers: rounded to bitsandbytes' codes, or as plain numbers."""
    weight: Any = module._parameters["weight"]
    kind = type(weight).__name__
    if kind not in ("Params4bit", "Int8Params"):
        return nn.Parameter(full, requires_grad=weight.requires_grad)
    import bitsandbytes

    kinds: Any = bitsandbytes.nn
    if kind == "Params4bit":
        new = kinds.Params4bit(
            full.to(getattr(weight.quant_state, "original_dtype", weight.quant_state.dtype)).cpu(),
            requires_grad=False,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            module=module,
        )
    else:
        new = kinds.Int8Params(full.half().cpu(), requires_grad=False, has_fp16_weights=False)
    placed: nn.Parameter = new.to(weight.device)  # where it is quantised
    return placed


def codes_of(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return bitsandbytes' 8-bit codes (out, in) and scales (out,), wherever the layer has them; None for another."""
    weight: Any = module._parameters.get("weight")
    if type(weight).__name__ != "Int8Params":
        return None
    for holder in (weight, getattr(module, "state", None)):
        codes, scales = getattr(holder, "CB", None), getattr(holder, "SCB", None)
        if codes is not None and scales is not None:
            return codes, scales
    return None


def hand_back(module: nn.Module, codes: tuple[Tensor, Tensor] | None) -> None:
    """Give bitsandbytes' layer the codes of the weight that it has again, which it had taken over."""
    if codes is not None:
        weight: Any = module._parameters["weight"]
        weight.CB, weight.SCB = codes
