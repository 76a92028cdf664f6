"""Small models of several kinds for the tests of what PEFT's users do, and calls of them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tiny_models import TARGETS as MODEL_TARGETS
from tiny_models import main_output, randomise_trainable, tiny_model

LANGUAGE = ("gpt2", "llama", "t5")
KINDS = ("mlp", "conv1d", "bert", *LANGUAGE)
TARGETS = {**MODEL_TARGETS, "mlp": ["lin0", "lin1"], "conv1d": ["conv", "out"]}
# One of the targets that has a bias, where the kind has any.
BIASED = {"mlp": "lin0", "conv1d": "conv", "bert": "query", "gpt2": "c_attn"}
HEADS = {"mlp": "head", "conv1d": "head", "bert": "classifier"}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 16, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x.to(self.head.weight.dtype))))))


class Conv1DNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv1D(12, 10)
        self.out = nn.Linear(12, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.out(torch.tanh(self.conv(x.to(self.out.weight.dtype))))))


def base(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model, with equal bits at every call."""
    if kind in MODEL_TARGETS:
        return tiny_model(kind, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(21)
        model = {"mlp": Mlp, "conv1d": Conv1DNet}[kind]()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).eval()


def rows() -> Tensor:
    return torch.linspace(-2, 2, 40).view(4, 10).sin()


def call(model: nn.Module, kind: str) -> Tensor:
    """The output for fixed inputs, in the caller's grad mode."""
    return main_output(model, kind) if kind in MODEL_TARGETS else model(rows())


def outputs(model: nn.Module, kind: str) -> Tensor:
    """The same in eval mode, without gradients."""
    with torch.no_grad():
        return call(model.eval(), kind)


def tuned(kind: str, config: Any, name: str = "default", seed: int = 7, **settings: Any) -> Any:
    """A PEFT model whose adapter is as if it had been trained."""
    import peft

    model = peft.get_peft_model(base(kind), config, adapter_name=name, **settings)
    return randomise_trainable(model, seed, std=0.3)


def vectors_of(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    return {key: p for key, p in model.named_parameters() if ".vera_lambda_" in key and key.endswith(f".{name}")}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
