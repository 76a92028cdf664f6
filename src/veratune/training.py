"""What training VeRA needs beside the model: parameter groups with the learning rates it wants."""

import math
from typing import Any

from torch import Tensor

from veratune.adapters import AdaptedModel


def parameter_groups(
    model: AdaptedModel, lr: float = 1e-2, head_lr: float = 1e-3, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups for an optimizer: the vectors, and all else (heads, biases).

    VeRA's vectors want a learning rate far above LoRA's or full fine-tuning's: the paper's for RoBERTa (its Table 8)
    are 3e-3 to 3e-2, with a smaller one for the classification head, and no weight decay.

    Args:
        model: the adapted model.
        lr: learning rate of the vectors b and d.
        head_lr: learning rate of everything else that is trainable.
        weight_decay: of both groups.

    Returns:
        Groups for `torch.optim`, without those that would be empty.

    Raises:
        TypeError: the model is not what `get_peft_model` or `VeraModel.from_pretrained` returns.
        ValueError: a rate that is negative or not finite, or the model has no trainable parameter.
    """
    if not isinstance(model, AdaptedModel):
        raise TypeError(f"this {type(model).__name__} has no adapter to train: make one with get_peft_model first")
    for name, value in (("lr", lr), ("head_lr", head_lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r} is not allowed: it must be a finite number that is not negative")
    vectors: list[Tensor] = []
    for layer in model.vera_layers().values():
        for name in layer.slots:
            vectors += [vector for vector in layer.vectors(name) if vector.requires_grad]
    own = {id(vector) for vector in vectors}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    if not vectors and not rest:
        frozen = [name for name, config in model.peft_config.items() if config.inference_mode]
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
