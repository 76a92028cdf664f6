"""Dequantize weights, and quantize merged weights.

This supports bitsandbytes' 4-bit and 8-bit weights, and tensor subclasses with a `dequantize` method (torchao).
Adapters on any other quantized linear layer can be trained, but not merged.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

# The attribute by which bitsandbytes' 4-bit layers decide whether to pack their weight.
_PACKS = "support_avx512bf16_for_cpu"


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module's weight is stored in a form that ordinary operations cannot compute with."""
    weight = module._parameters.get("weight")
    return weight is None or type(weight) is not nn.Parameter or not weight.is_floating_point()


def why_not_readable(module: nn.Module) -> str | None:
    """Return None if `dequantized` can read a module's weight, otherwise the reason."""
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return f"{type(module).__name__} stores its weight in a form that veratune cannot read"
    if weight.is_meta:
        return "its weight is on the meta device and has no values"
    name = type(weight).__name__
    if name in ("Params4bit", "Int8Params"):
        done = weight.quant_state if name == "Params4bit" else codes_of(module)
        return None if done is not None else "its weight is not quantized yet: move the model to its device first"
    if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
        return None
    return f"its weight is a {name} of dtype {weight.dtype}"


def dequantized(module: nn.Module) -> Tensor:
    """Return a quantized weight as a floating-point tensor (out, in)."""
    weight: Any = module._parameters["weight"]
    name = type(weight).__name__
    if name == "Params4bit":
        from bitsandbytes import functional

        codes, state = weight.data, weight.quant_state
        if _is_packed(weight):
            codes, state = _usual_form(weight)
        full: Tensor = functional.dequantize_4bit(codes, state)
        return full
    if name == "Int8Params":
        parts = codes_of(module)
        assert parts is not None
        codes, scales = parts
        return codes.float() * (scales.float() / 127.0)[:, None]
    plain: Tensor = weight.dequantize()
    return plain


class _Unpacking:
    """A forward pre-hook on a 4-bit layer that, for training, restores the weight from before evaluation.

    In evaluation on a CPU, bitsandbytes replaces codes and scales with packed ones that only an inference kernel reads,
    and rounds the scales to bfloat16. Later backward passes, and those of existing graphs, would misread them.
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
                weight.quant_state = copy.copy(weight.quant_state)  # existing graphs keep theirs
        elif self._kept is not None and weight is self._kept[0] and weight.device == self._kept[1].device:
            _, weight.data, weight.quant_state = self._kept
            self._kept = None
        elif _is_packed(weight):  # for example in a copy
            weight.data, weight.quant_state = _usual_form(weight)

    def __deepcopy__(self, memo: Any) -> "_Unpacking":
        return _Unpacking()  # the kept values belong to the original's weight


def keep_differentiable(model: nn.Module) -> None:
    """Keep gradients through bitsandbytes 4-bit layers correct after evaluation."""
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
    """Return whether a module is a 4-bit layer that needs `keep_differentiable`."""
    return bool(module.__dict__.get(_PACKS)) and not _unpacks(module)


def _unpacks(module: nn.Module) -> bool:
    return any(type(hook) is _Unpacking for hook in module._forward_pre_hooks.values())


def _is_packed(weight: Any) -> bool:
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _usual_form(weight: Any) -> tuple[Tensor, Any]:
    """Return a packed 4-bit weight's codes and state as they were before packing, but with scales in float32."""
    from bitsandbytes import functional

    state = copy.copy(weight.quant_state)
    # The function below restores only the codes.
    state.absmax, state.original_nested = state.absmax.t().reshape(-1).float(), False
    codes, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    return codes, state


def loss_of_merging(module: nn.Module) -> str:
    """Return the effect of merging on quantized weights, phrased to follow "merging"."""
    if type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params"):
        return "rounds their weights by quantizing them again"
    return "turns their weights into ordinary tensors, as large as before quantization"


def requantized(module: nn.Module, full: Tensor) -> nn.Parameter:
    """Return a floating-point weight as a parameter for a module: quantized again for bitsandbytes, otherwise as is."""
    weight: Any = module._parameters["weight"]
    name = type(weight).__name__
    if name not in ("Params4bit", "Int8Params"):
        return nn.Parameter(full, requires_grad=weight.requires_grad)
    import bitsandbytes

    classes: Any = bitsandbytes.nn
    if name == "Params4bit":
        new = classes.Params4bit(
            full.to(getattr(weight.quant_state, "original_dtype", weight.quant_state.dtype)).cpu(),
            requires_grad=False,
            blocksize=weight.blocksize,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            module=module,
        )
    else:
        new = classes.Int8Params(full.half().cpu(), requires_grad=False, has_fp16_weights=False)
    moved: nn.Parameter = new.to(weight.device)  # quantizes the weight
    return moved


def codes_of(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return bitsandbytes' 8-bit codes (out, in) and scales (out,), from the weight or the layer's state, or None."""
    weight: Any = module._parameters.get("weight")
    if type(weight).__name__ != "Int8Params":
        return None
    for holder in (weight, getattr(module, "state", None)):
        codes, scales = getattr(holder, "CB", None), getattr(holder, "SCB", None)
        if codes is not None and scales is not None:
            return codes, scales
    return None


def quantized_codes(module: nn.Module) -> Tensor | None:
    """Return a bitsandbytes weight's codes as a plain matrix that packing for evaluation does not change, or None."""
    weight: Any = module._parameters.get("weight")
    if type(weight).__name__ == "Params4bit":
        codes = _usual_form(weight)[0] if _is_packed(weight) else weight.data
        return codes.as_subclass(Tensor) if weight.quant_state is not None else None
    parts = codes_of(module)
    return None if parts is None else parts[0].as_subclass(Tensor)


def hand_back(module: nn.Module, codes: tuple[Tensor, Tensor] | None) -> None:
    """Restore the 8-bit codes of a bitsandbytes weight, which the layer had moved into its state."""
    if codes is not None:
        weight: Any = module._parameters["weight"]
        weight.CB, weight.SCB = codes
