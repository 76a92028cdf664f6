"""Training steps of a base model in several variants, as timed by `veratune bench`."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from veratune.config import VeraConfig
from veratune.model import get_peft_model
from veratune.ops.planning import ROUTE_NAMES

FROZEN, FULL, PEFT_VERA, LORA = "frozen model", "full fine-tuning", "PEFT VeRA", "PEFT LoRA r=8"
OURS = {route: "veratune" if route == "auto" else f"veratune, route={route}" for route in ROUTE_NAMES}
VARIANTS = (FROZEN, FULL, *OURS.values(), PEFT_VERA, LORA)

# AdamW holds two moments for each parameter, in addition to the parameter and its gradient.
_COPIES_IN_FULL = 4


def make_variant(name: str, base: nn.Module, rank: int) -> nn.Module:
    """Return a model that shares the frozen base model's weights, made trainable in one of VARIANTS.

    Full fine-tuning gets a copy of the weights.

    Raises:
        ImportError: the variant needs peft, which is missing.
        Exception: whatever peft raises for a model that it cannot adapt.
    """
    if name == FULL:
        return copy.deepcopy(base).requires_grad_(True)
    # Parameters and buffers are frozen, so that all variants can share them.
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, shared)
    if name == FROZEN:
        return model
    if name in OURS.values():
        route = next(route for route, own in OURS.items() if own == name)
        config = VeraConfig(r=rank, target_modules="all-linear", modules_to_save=[], route=route)
        return get_peft_model(model, config)
    import peft

    if name == PEFT_VERA:
        settings: Any = peft.VeraConfig(r=rank, target_modules="all-linear")
    else:
        settings = peft.LoraConfig(r=8, target_modules="all-linear")
    to_adapt: Any = model
    adapted: nn.Module = peft.get_peft_model(to_adapt, settings)
    return adapted


class Step:
    """One training step: forward, backward to the input and the trainable parameters, and AdamW.

    In every variant the inputs are embeddings (or pixels) that require a gradient, so that backward passes through all
    layers, and the frozen model's step is a lower bound for any method that fine-tunes all of them.

    Args:
        model: the model.
        inputs: what `random_inputs` returned.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self._model = model
        self._inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
        self._gradient: Tensor | None = None
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in trainable)
        self._optimizer = torch.optim.AdamW(trainable, lr=1e-6) if trainable else None

    def __call__(self) -> None:
        output = self._model(**self._inputs)
        result: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
        if self._gradient is None:
            self._gradient = torch.full_like(result, 1.0 / result.numel())
        torch.autograd.backward(result, self._gradient)
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()
        for tensor in self._inputs.values():
            tensor.grad = None


def random_inputs(model: nn.Module, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Return random inputs of a transformers model: embeddings (batch, length, hidden), or pixels of (batch) images.

    Raises:
        ValueError: the model takes neither.
    """
    described: Any = model
    config: Any = described.config
    kind = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    if kind == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        sizes = (batch, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return {kind: torch.randn(sizes, generator=generator).to(device, dtype)}
    if kind != "input_ids":
        raise ValueError(f"{type(model).__name__} takes {kind}, but bench only makes texts and images")
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        raise ValueError(f"--length {length} is more than the model's {positions} positions")
    width = described.get_input_embeddings().weight.shape[1]
    values = torch.randn((batch, length, width), generator=generator).to(device, dtype)
    names = ["inputs_embeds", "decoder_inputs_embeds"] if config.is_encoder_decoder else ["inputs_embeds"]
    return dict.fromkeys(names, values)


def fits_in_full(base: nn.Module, device: torch.device) -> bool:
    """Return whether full fine-tuning's weights, gradients and moments fit into free memory, with a margin."""
    needed = _COPIES_IN_FULL * sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    free = _free_bytes(device)
    return free is None or 1.25 * needed < free


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None  # unknown on this system
