"""Parameter groups for an optimizer, with the learning rates that VeRA needs."""

import math
import warnings
from typing import Any

from torch import nn

from veratune.layers import VeraLayer
from veratune.layers.entries import VECTOR_PREFIX

VECTOR_RATE, HEAD_RATE = 1e-2, 1e-3
"""Default learning rates for the vectors and for everything else."""

# Learning rates outside this range are unlikely to work for the vectors. The paper uses 3e-3 to 3e-2.
_LOW_RATE, _HIGH_RATE = 1e-3, 1e-1


def rate_advice(lr: float) -> str | None:
    """Return a warning for a learning rate that is unlikely to work for VeRA's vectors, or None."""
    if lr < _LOW_RATE:
        return f"learning_rate={lr} is low for VeRA, whose vectors need about {VECTOR_RATE:g}: training may be too slow"
    if lr > _HIGH_RATE:
        return f"learning_rate={lr} is high for VeRA, whose vectors need about {VECTOR_RATE:g}: training may diverge"
    return None


def parameter_groups(
    model: nn.Module, lr: float = VECTOR_RATE, head_lr: float = HEAD_RATE, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups for an optimizer: the vectors, and the rest (heads, biases).

    VeRA's vectors need a much higher learning rate than LoRA or full fine-tuning: the paper uses 3e-3 to 3e-2 for
    RoBERTa (its Table 8), with a lower rate for the classification head, and no weight decay. A rate far outside
    this range causes a warning.

    Args:
        model: the adapted model, or a `peft.PeftModel` with veratune's layers.
        lr: learning rate of the vectors b and d.
        head_lr: learning rate of everything else that is trainable.
        weight_decay: weight decay of both groups.

    Returns:
        Groups for `torch.optim`; empty groups are omitted.

    Raises:
        TypeError: the model has no VeRA adapter.
        ValueError: a value is negative or not finite, or the model has no trainable parameter.
    """
    for name, value in (("lr", lr), ("head_lr", head_lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r} is not allowed: it must be finite and not negative")
    vectors, rest = trained_parts(model)
    advice = rate_advice(lr) if vectors else None
    if advice is not None:
        warnings.warn(f"veratune: {advice}", UserWarning, stacklevel=2)
    groups = [
        {"params": vectors, "lr": lr, "weight_decay": weight_decay},
        {"params": rest, "lr": head_lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def trained_parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable vectors of an adapted model, and everything else that is trainable.

    Raises:
        TypeError: the model has no VeRA adapter.
        ValueError: the model has no trainable parameter, or an adapter is merged.
    """
    named = dict(model.named_parameters())
    vector_names = {name for name in named if any(part.startswith(VECTOR_PREFIX) for part in name.split("."))}
    if not vector_names:
        raise TypeError(f"this {type(model).__name__} has no adapter to train: call get_peft_model first")
    merged = {name for module in model.modules() if isinstance(module, VeraLayer) for name in module.merged_adapters}
    if merged:
        raise ValueError(
            f"adapters {sorted(merged)} are merged, so their vectors get no gradients: call unmerge_adapter before"
            " training"
        )
    vectors = [named[name] for name in named if name in vector_names and named[name].requires_grad]
    rest = [named[name] for name in named if name not in vector_names and named[name].requires_grad]
    if not vectors and not rest:
        configs: dict[str, Any] = getattr(model, "peft_config", {})
        frozen = [name for name, config in configs.items() if config.inference_mode]
        raise ValueError(
            "the model has no trainable parameter: "
            + (
                f"adapters {frozen} were loaded for inference: load with is_trainable=True to continue training"
                if frozen
                else "activate an adapter with set_adapter"
            )
        )
    return vectors, rest
