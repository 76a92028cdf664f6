"""The methods of the quality study: one entry each, in the order of their importance."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import quality_schemes
from veratune import VeraConfig, get_peft_model, parameter_groups
from veratune.projections.schemes import SCHEMES

HEAD_RATE = 4e-3
VERA_RATES = (5e-3, 1e-2, 2e-2, 4e-2)
LORA_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
DENSE = "VeRA dense, r=256"

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Method(ABC):
    """A way to fine-tune a classifier.

    Attributes:
        name: of its row in the tables.
        rates: learning rates to choose from.
        stage: methods of a lower one run first.
        baseline: the method that the differences are taken to.
    """

    not_settings: ClassVar[tuple[str, ...]] = ("name", "rates", "stage", "baseline")

    name: str
    rates: tuple[float, ...]
    stage: int
    baseline: str = DENSE

    def settings(self) -> dict[str, Any]:
        """Return what decides a run's result: everything but the name and the plan."""
        values = {"kind": type(self).__name__, **dataclasses.asdict(self)}
        return {name: value for name, value in values.items() if name not in self.not_settings}

    @property
    def code(self) -> str:
        """Which code computes it: methods of the same can or cannot be captured as a CUDA graph."""
        return type(self).__name__

    @abstractmethod
    def adapt(self, model: nn.Module, seed: int, key: int) -> nn.Module:
        """Make a model trainable in this way, and return the model to train.

        Args:
            model: a classifier with the head `classifier`, which may be changed.
            seed: of what is drawn at random.
            key: of the frozen projections.
        """

    def groups(self, model: nn.Module, rate: float) -> Groups:
        """Return the trainable parameters in groups with their learning rates."""
        head = {id(parameter) for name, parameter in model.named_parameters() if ".classifier." in f".{name}"}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for parameter in trained if id(parameter) not in head], "lr": rate},
            {"params": [parameter for parameter in trained if id(parameter) in head], "lr": HEAD_RATE},
        ]


@dataclass(frozen=True)
class Vera(Method):
    """VeRA on all linear layers; `options` are further fields of `VeraConfig`."""

    r: int = 256
    projection: str = "per_dimension"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def code(self) -> str:
        return f"Vera {self.projection}"

    def adapt(self, model: nn.Module, seed: int, key: int) -> nn.Module:
        config = VeraConfig(
            r=self.r,
            target_modules="all-linear",
            projection=self.projection,
            projection_prng_key=key,
            task_type="SEQ_CLS",
            **dict(self.options),
        )
        return get_peft_model(model, config)

    def groups(self, model: nn.Module, rate: float) -> Groups:
        return parameter_groups(model, lr=rate, head_lr=HEAD_RATE)


@dataclass(frozen=True)
class Lora(Method):
    """PEFT's LoRA on all linear layers, with alpha = 2 r."""

    r: int = 8

    def adapt(self, model: nn.Module, seed: int, key: int) -> nn.Module:
        import peft

        torch.manual_seed(seed)
        config = peft.LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules="all-linear", task_type="SEQ_CLS")
        return peft.get_peft_model(model, config)


@dataclass(frozen=True)
class Head(Method):
    """Only the classification head, whose rate is the one that is chosen."""

    def adapt(self, model: nn.Module, seed: int, key: int) -> nn.Module:
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model

    def groups(self, model: nn.Module, rate: float) -> Groups:
        return [{"params": list(model.classifier.parameters()), "lr": rate}]


def _methods() -> list[Method]:
    def vera(name: str, stage: int, r: int = 256, projection: str = "per_dimension", **options: Any) -> Vera:
        baseline = DENSE.replace("256", str(r))
        return Vera(name, VERA_RATES, stage, baseline, r, projection, tuple(sorted(options.items())))

    def blocks(stage: int, g: int, r: int = 256, out: int | None = None) -> Vera:
        if out is not None:
            return vera(f"blocks g={g} of A, {out} of B, r={r}", stage, r, quality_schemes.blocks(g, out))
        if "blocks" in SCHEMES:
            return vera(f"blocks g={g}, r={r}", stage, r, "blocks", projection_blocks=g)
        return vera(f"blocks g={g}, r={r}", stage, r, quality_schemes.blocks(g, g))

    return [
        vera(DENSE, 0),
        Lora("LoRA r=8", LORA_RATES, 0, r=8),
        *(blocks(0, g) for g in (4, 8, 16)),
        blocks(0, 8, 1024),
        vera("VeRA dense, r=1024", 1, 1024),
        blocks(1, 16, 1024),
        blocks(1, 2),
        Lora("LoRA r=2", LORA_RATES, 1, r=2),
        Head("head only", (1e-3, 4e-3, 1e-2, 3e-2), 1),
        vera("mixed blocks g=8, r=256", 2, projection=quality_schemes.mixed_blocks(8)),
        vera("Hadamard, r=256", 2, projection=quality_schemes.hadamard_rows()),
        blocks(2, 4, 1024),
        vera("VeRA dense, r=512", 2, 512),
        blocks(2, 8, 512),
        blocks(2, 16, 512),
        vera("VeRA dense, PEFT's projections, r=256", 3, projection="peft"),
        blocks(3, 8, out=2),
        blocks(3, 2, out=8),
        vera("one nonzero a column, r=256", 3, projection=quality_schemes.one_a_column()),
        blocks(3, 4, 512),
        blocks(3, 2, 512),
        blocks(3, 2, 1024),
    ]


METHODS = _methods()
"""All methods of the study. The schemes that only it has are registered as this module is imported."""


def chosen(names: Sequence[str] | None) -> list[Method]:
    """Return the methods of these names; all of them if there are none."""
    unknown = set(names or ()) - {method.name for method in METHODS}
    if unknown:
        raise SystemExit(f"there are no methods {sorted(unknown)}: there are {[method.name for method in METHODS]}")
    return [method for method in METHODS if not names or method.name in names]
