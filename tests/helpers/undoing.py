from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from reference import randomise
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.integrations.peft import VeratuneConfig, install


class Net(nn.Module):
    """A linear layer, a convolution, an embedding, a stack of matrices, a fused encoder, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 6, 1)
        self.lin = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(tokens).mT).mT
        return self.head(torch.tanh(self.lin(self.attention(x, x, x)[0])))


def net() -> Net:
    torch.manual_seed(3)
    return Net().eval().requires_grad_(True)


TOKENS = torch.tensor([[1, 2, 6, 0]])


SETTINGS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["table", "conv", "lin"],
    "target_parameters": ["in_proj_weight"],
    "modules_to_save": ["head"],
}


def settings(**others: Any) -> dict[str, Any]:
    return {**SETTINGS, **others}


def seen(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a change to its adapters may touch, in comparable form."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [len(module._forward_hooks), len(module._load_state_dict_pre_hooks)]
        lists = {
            key: list(value)
            for key, value in vars(module).items()
            if key
            in ("active_adapters", "merged_adapters", "added_adapters", "entries", "_active_adapter", "peft_config")
            or key in ("_active", "_schemes", "_biases", "active_adapter")
        }
        found[name] = (type(module).__name__, module.training, hooks, lists)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"{name}?"] = parameter.requires_grad
    for name, tensor in model.state_dict().items():
        found[f"{name}="] = (tensor.dtype, tensor.detach().numpy().tobytes())
    return found


def two() -> VeraModel:
    model = get_peft_model(net(), VeraConfig(**settings(bias="vera_only")), adapter_name="one")
    model.add_adapter("two", VeraConfig(**settings(modules_to_save=[], r=3)))
    torch.manual_seed(5)
    randomise(model, 0.3)
    return model


def one() -> VeraModel:
    model = two()
    model.delete_adapter("two")
    return model


def two_others() -> VeraModel:
    """Return the same with other values."""
    model = two()
    torch.manual_seed(8)
    with torch.no_grad():
        for name in model.peft_config:
            for parameter in model.adapter_state(name).parameters():
                parameter.normal_()
    return model


def saved_at(path: Path) -> Path:
    model = get_peft_model(net(), VeraConfig(**settings(bias="all")))
    torch.manual_seed(6)
    randomise(model, 0.3)
    model.save_pretrained(path)
    return path


def merged() -> VeraModel:
    model = two()
    model.merge_adapter(["one", "two"])
    return model


def tuned() -> Any:
    install()
    model = peft.get_peft_model(net(), VeratuneConfig(**settings()), adapter_name="one")
    model.add_adapter("two", VeratuneConfig(**settings(modules_to_save=None, r=3)))
    torch.manual_seed(5)
    randomise(model, 0.3)
    return model


def tuned_merged() -> Any:
    model = tuned()
    model.merge_adapter(["one", "two"])
    return model


def saved_by_peft(path: Path) -> Path:
    model = peft.get_peft_model(net(), VeratuneConfig(**settings()))
    torch.manual_seed(6)
    randomise(model, 0.3)
    model.save_pretrained(path)
    return path
