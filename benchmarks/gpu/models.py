"""The models that are measured, and the ways to adapt them, all on the same frozen weights in memory."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import veratune
from veratune.layers import plan
from veratune.ops.calibration import device_profile
from veratune.ops.costs import LayerShape
from veratune.ops.planning import RouteChoice
from veratune.ops.routes import ROUTES
from veratune.projections.schemes import SCHEMES

FROZEN = "frozen"
DENSE_SCHEME = "per_dimension"
LORA_8, LORA_8_WIDE, LORA_16 = "PEFT LoRA r=8", "PEFT LoRA r=8, float32 vectors", "PEFT LoRA r=16"
PEFT_VERA, PEFT_VERA_HALF = "PEFT VeRA", "PEFT VeRA, bfloat16 vectors"

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
}
LLAMA_TOY = LLAMA_1B | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llama(sizes: dict[str, int], device: torch.device, dtype: torch.dtype, layers: int | None = None) -> nn.Module:
    """Return a frozen Llama without a head, with random weights, made on the device."""
    own = sizes if layers is None else sizes | {"num_hidden_layers": layers}
    config = LlamaConfig(**own, attn_implementation="sdpa", use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaModel(config)
    return model.to(dtype).requires_grad_(False).train()


def linear(n: int, m: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return one frozen linear layer in a model."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n, m, bias=False, device=device, dtype=dtype)).requires_grad_(False)


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers are the same tensors."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@contextmanager
def forced(choice: RouteChoice | None) -> Iterator[None]:
    """Make all adapted linear layers take one route in this context, whatever the cost model says."""
    if choice is None:
        yield
        return
    chooser = plan.choose
    plan.choose = lambda entry, *_, **__: (choice,) * len(entry.shapes)
    try:
        yield
    finally:
        plan.choose = chooser


@dataclass(frozen=True)
class Variant:
    """One way to adapt a model.

    Attributes:
        make: adapts a model, which it may change.
        choice: the route that all layers take; None for their own choice.
        compiled: whether it is worth the time that compiling takes.
    """

    make: Callable[[nn.Module], nn.Module]
    choice: RouteChoice | None = None
    compiled: bool = False


def density(scheme: str, r: int, n: int, m: int) -> float:
    """Return the fraction of the elements of A and B that a scheme stores for a layer."""
    drawn = SCHEMES[scheme].for_layers(0, r, n, m)
    return min(drawn.structure("A", r, n).density, drawn.structure("B", r, m).density)


def structured_schemes(r: int, n: int, m: int) -> list[str]:
    """Return the schemes drawn from a key whose projections are cheaper than dense ones."""
    return [name for name in SCHEMES if density(name, r, n, m) < 1.0]


def routes_on(device: torch.device, scheme: str, r: int, n: int, m: int) -> list[str]:
    """Return the names of the routes that can compute a layer on a device, calibrated or not."""
    has_kernel = device.type == "cuda" and find_spec("triton") is not None
    shape = LayerShape(n, m, r, 1, density=density(scheme, r, n, m))
    profile = replace(device_profile(device, torch.bfloat16), triton_flops=float(has_kernel))
    return [name for name, route in ROUTES.items() if route.available(profile, shape)]


def variants(r: int, n: int, m: int, device: torch.device) -> dict[str, Variant]:
    """Return all variants for our rank r on layers of about n inputs and m outputs."""
    found = {
        FROZEN: Variant(lambda model: model, compiled=True),
        LORA_8: Variant(_lora(8, wide=False), compiled=True),
        LORA_8_WIDE: Variant(_lora(8, wide=True)),
        LORA_16: Variant(_lora(16, wide=False)),
        PEFT_VERA: Variant(_peft_vera(r, wide=True)),
        PEFT_VERA_HALF: Variant(_peft_vera(r, wide=False)),
    }
    for scheme in (DENSE_SCHEME, *structured_schemes(r, n, m)):
        found[f"{scheme} auto"] = Variant(_ours(r, scheme), compiled=True)
        found[f"{scheme} auto, memory=low"] = Variant(_ours(r, scheme, memory="low"))
        for route in routes_on(device, scheme, r, n, m):
            found[f"{scheme} {route}"] = Variant(_ours(r, scheme), RouteChoice(route))
            if ROUTES[route].reads_weight:
                found[f"{scheme} {route}, weight kept"] = Variant(_ours(r, scheme), RouteChoice(route, True))
    return found


def _lora(r: int, *, wide: bool) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        config = peft.LoraConfig(r=r, target_modules=_names(model))
        return peft.get_peft_model(model, config, autocast_adapter_dtype=wide)

    return make


def _peft_vera(r: int, *, wide: bool) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        config = peft.VeraConfig(r=r, target_modules=_names(model), save_projection=True)
        device = next(model.parameters()).device
        return peft.get_peft_model(model, config, autocast_adapter_dtype=wide).to(device)

    return make


def _ours(r: int, scheme: str, **settings: Any) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        config = veratune.VeraConfig(r=r, target_modules=_names(model), projection=scheme, **settings)
        return veratune.get_peft_model(model, config)

    return make


def _names(model: nn.Module) -> list[str]:
    """Return the last parts of all linear layers' names."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})


class Step:
    """One training step: forward, backward to the input and what is trainable, and AdamW."""

    def __init__(self, model: nn.Module, x: Tensor, gradient: Tensor, call: Callable[[nn.Module, Tensor], Tensor]):
        self.model, self.x, self.gradient, self.call = model, x, gradient, call
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = {"fused": True} if x.device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5, **fused) if self.trainable else None

    def __call__(self) -> None:
        self.clear()
        self.without_optimizer()
        if self.optimizer is not None:
            self.optimizer.step()

    def without_optimizer(self) -> None:
        self.call(self.model, self.x).backward(self.gradient)

    def clear(self) -> None:
        self.x.grad = None
        for parameter in self.trainable:
            parameter.grad = None


def held_bytes(model: nn.Module, base: nn.Module) -> int:
    """Return the bytes of what adapting has added: vectors, Adam's moments, other parameters and projections."""
    own = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in own]
    moments = 2 * sum(tensor.nbytes for tensor in model.parameters() if tensor.requires_grad)
    if isinstance(model, veratune.VeraModel):
        for layer in model.vera_layers().values():
            tensors += [
                values for entry in layer.entries.values() for v in entry.views for values in v.tensors.values()
            ]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return moments + sum(storages.values())
