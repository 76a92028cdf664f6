"""Weights that a library keeps in a few bits: reading them as numbers, and writing them back for merging.

Known are bitsandbytes' 4-bit and 8-bit weights, and tensors of a class of their own that have a `dequantize` method
(torchao). Whatever else computes a linear layer is trained through, and cannot be merged into.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

# What bitsandbytes' 4-bit layers decide by whether they pack.
_PACKS = "support_avx512bf16_for_cpu"


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module's weight is none that ordinary operations compute with."""
    weight = module._parameters.get("weight")
    return weight is None or type(weight) is not nn.Parameter or not weight.is_floating_point()


def why_not_readable(module: nn.Module) -> str | None:
    """Return None if `dequantized` can read a module's weight, otherwise the reason."""
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return f"{type(module).__name__} keeps its weight in a form of its own"
    if weight.is_meta:
        return "its weight is on the meta device and has no values"
    kind = type(weight).__name__
    if kind in ("Params4bit", "Int8Params"):
        done = weight.quant_state if kind == "Params4bit" else codes_of(module)
        return None if done is not None else "its weight is not quantized yet: move it to its device first"
    if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
        return None
    return f"its weight is a {kind} of the type {weight.dtype}"


def dequantized(module: nn.Module) -> Tensor:
    """Return a quantized weight as the numbers (out, in) that it stands for, in a floating-point dtype."""
    weight: Any = module._parameters["weight"]
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes import functional

        codes, state = weight.data, weight.quant_state
        if _is_packed(weight):
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


class _Unpacking:
    """A hook before the forward of a 4-bit layer that puts the weight it had before evaluation back for training.

    In evaluation on a CPU bitsandbytes exchanges codes and scales for others that only an inference kernel reads, with
    scales rounded to bfloat16. Backward passes from then on, or under way, would take these for the usual ones.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, Tensor, Any] | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        weight: Any = module._parameters["weight"]
        learning = module.training or torch.is_grad_enabled()
        module.__dict__[_PACKS] = not learning
        if not learning:
            if weight.is_cpu and weight.quant_state is not None and not _is_packed(weight):
                self._kept = weight, weight.data, weight.quant_state
                weight.quant_state = copy.copy(weight.quant_state)  # graphs hold the one that they were made with
        elif self._kept is not None and weight is self._kept[0] and weight.device == self._kept[1].device:
            _, weight.data, weight.quant_state = self._kept
            self._kept = None
        elif _is_packed(weight):  # in a copy, say
            weight.data, weight.quant_state = _usual_form(weight)

    def __deepcopy__(self, memo: Any) -> "_Unpacking":
        return _Unpacking()  # what was kept is of the weight that it was taken from


def keep_differentiable(model: nn.Module) -> None:
    """Make evaluations leave the gradients right that flow through bitsandbytes' 4-bit layers afterwards."""
    for module in model.modules():
        if spoils_gradients(module):
            weight: Any = module._parameters["weight"]
            if _is_packed(weight):
                weight.data, weight.quant_state = _usual_form(weight)
            module.register_forward_pre_hook(_Unpacking())


def leave_to_library(model: nn.Module) -> None:
    """Undo `keep_differentiable`."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if type(hook) is _Unpacking:
                del module._forward_pre_hooks[key]
                module.__dict__[_PACKS] = True


def spoils_gradients(module: nn.Module) -> bool:
    """Return whether a module is a 4-bit layer that `keep_differentiable` has something to do for."""
    return bool(module.__dict__.get(_PACKS)) and not _unpacks(module)


def _unpacks(module: nn.Module) -> bool:
    return any(type(hook) is _Unpacking for hook in module._forward_pre_hooks.values())


def _is_packed(weight: Any) -> bool:
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _usual_form(weight: Any) -> tuple[Tensor, Any]:
    """Return the codes and the state that a 4-bit weight had before it was packed for a CPU; scales in float32."""
    from bitsandbytes import functional

    state = copy.copy(weight.quant_state)
    # The inverse restores the codes alone.
    state.absmax, state.original_nested = state.absmax.t().reshape(-1).float(), False
    codes, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    return codes, state


def loss_of_merging(module: nn.Module) -> str:
    """Return what merging does to a quantized weight, to stand behind "merging"."""
    if type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params"):
        return "rounds their weights to the few values they can have, anew"
    return "makes their weights plain numbers, of the size that they had before they were quantized"


def requantized(module: nn.Module, full: Tensor) -> nn.Parameter:
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
    placed: nn.Parameter = new.to(weight.device)  # where it is quantized
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
