"""The methods that the demo compares: how each changes the model, what it trains, and what it has to save."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import peft
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from _demo_training import ParameterGroups
from veratune import VeraConfig, VeraModel, get_peft_model, parameter_groups

Targets = str | Sequence[str]


class Method(Protocol):
    """One row of the table."""

    @property
    def name(self) -> str: ...

    def prepare(self, base: PreTrainedModel) -> nn.Module:
        """Return the model to train; the base may be changed in place."""

    def groups(self, model: nn.Module) -> ParameterGroups:
        """Return what is trained, with its learning rates."""

    def save(self, model: Any, directory: Path) -> None:
        """Write what has to be kept beside the base model's own file."""


@dataclass(frozen=True)
class FrozenEncoder:
    """Only the classification head is trained."""

    name: str
    head_lr: float

    def prepare(self, base: PreTrainedModel) -> nn.Module:
        base.requires_grad_(False)
        base.classifier.requires_grad_(True)
        return base

    def groups(self, model: nn.Module) -> ParameterGroups:
        return split_groups(model, self.head_lr, self.head_lr)

    def save(self, model: Any, directory: Path) -> None:
        save_file(model.classifier.state_dict(), directory / "head.safetensors")


@dataclass(frozen=True)
class Vera:
    """VeRA on some or all linear layers, and the head."""

    name: str
    target_modules: Targets
    lr: float
    head_lr: float
    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0

    def prepare(self, base: PreTrainedModel) -> VeraModel:
        config = VeraConfig(
            r=self.r,
            target_modules=self.target_modules,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            task_type="SEQ_CLS",
        )
        return get_peft_model(base, config)

    def groups(self, model: nn.Module) -> ParameterGroups:
        return parameter_groups(model, lr=self.lr, head_lr=self.head_lr)

    def save(self, model: Any, directory: Path) -> None:
        model.save_pretrained(directory)


@dataclass(frozen=True)
class Lora:
    """PEFT's LoRA on some or all linear layers, and the head."""

    name: str
    target_modules: Targets
    lr: float
    head_lr: float
    r: int = 8
    alpha: int = 16
    dropout: float = 0.0

    def prepare(self, base: PreTrainedModel) -> nn.Module:
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="SEQ_CLS",
        )
        return peft.get_peft_model(base, config)

    def groups(self, model: nn.Module) -> ParameterGroups:
        return split_groups(model, self.lr, self.head_lr)

    def save(self, model: Any, directory: Path) -> None:
        model.save_pretrained(directory)


@dataclass(frozen=True)
class FullFineTuning:
    """Every parameter of the model is trained."""

    name: str
    lr: float
    head_lr: float
    weight_decay: float = 0.01

    def prepare(self, base: PreTrainedModel) -> nn.Module:
        return base

    def groups(self, model: nn.Module) -> ParameterGroups:
        return split_groups(model, self.lr, self.head_lr, self.weight_decay)

    def save(self, model: Any, directory: Path) -> None:
        model.save_pretrained(directory)


def split_groups(model: nn.Module, lr: float, head_lr: float, weight_decay: float = 0.0) -> ParameterGroups:
    """Return the trainable parameters in two groups: the encoder's, and the head's with a rate of its own."""
    head = {id(parameter) for parameter in model.classifier.parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if id(parameter) not in head], "lr": lr},
        {"params": [parameter for parameter in trainable if id(parameter) in head], "lr": head_lr},
    ]
    return [{**group, "weight_decay": weight_decay} for group in groups if group["params"]]
