"""What training VeRA needs beside the model: parameter groups with the learning rates it wants."""

import math
from typing import Any

from torch import nn

# Of the vectors. The paper's are from 3e-3 to 3e-2.
_LOW_RATE = 1e-3


def why_rate_is_low(lr: float) -> str | None:
    """Return what there is to say of a learning rate that is too low for VeRA's vectors; None for others."""
    return f"learning_rate={lr} is low for VeRA, whose vectors want about 1e-2" if lr < _LOW_RATE else None


def parameter_groups(
    model: nn.Module, lr: float = 1e-2, head_lr: float = 1e-3, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups for an optimizer: the vectors, and all else (heads, biases).

    VeRA's vectors want a learning rate far above LoRA's or full fine-tuning's: the paper's for RoBERTa (its Table 8)
    are 3e-3 to 3e-2, with a smaller one for the classification head, and no weight decay.

    Args:
        model: the adapted model, or a `peft.PeftModel` with veratune's layers.
        lr: learning rate of the vectors b and d.
        head_lr: learning rate of everything else that is trainable.
        weight_decay: of both groups.

    Returns:
        Groups for `torch.optim`, without those that would be empty.

    Raises:
        TypeError: the model has no VeRA adapter.
        ValueError: a rate that is negative or not finite, or the model has no trainable parameter.
    """
    named = dict(model.named_parameters())
    own_names = {name for name in named if any(part.startswith("vera_lambda_") for part in name.split("."))}
    if not own_names:
        raise TypeError(f"this {type(model).__name__} has no adapter to train: make one with get_peft_model first")
    for name, value in (("lr", lr), ("head_lr", head_lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r} is not allowed: it must be a finite number that is not negative")
    vectors = [named[name] for name in named if name in own_names and named[name].requires_grad]
    rest = [named[name] for name in named if name not in own_names and named[name].requires_grad]
    if not vectors and not rest:
        configs: dict[str, Any] = getattr(model, "peft_config", {})
        frozen = [name for name, config in configs.items() if config.inference_mode]
        raise ValueError(
            "the model has no trainable parameter: "
            + (
                f"{frozen} were loaded for inference: load with is_trainable=True to go on training them"
                if frozen
                else "choose an adapter with set_adapter"
            )
        )
    groups = [
        {"params": vectors, "lr": lr, "weight_decay": weight_decay},
        {"params": rest, "lr": head_lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
