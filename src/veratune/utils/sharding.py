"""Parameters of which each process holds a part.

DeepSpeed's ZeRO-3 leaves nothing in a parameter between its uses: from `deepspeed.initialize` on, or, where
transformers loads a model for it, from the beginning.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def describe_sharding(tensor: Tensor | None) -> str | None:
    """Return how a tensor is spread over processes at the moment, or None if it is whole here."""
    found: Any = tensor
    if hasattr(found, "device_mesh"):  # tensor parallelism, FSDP2
        return str(tuple(found.placements))
    return "by DeepSpeed's ZeRO-3" if is_emptied(tensor) else None


def is_emptied(tensor: Tensor | None) -> bool:
    """Return whether ZeRO-3 has left nothing in a parameter."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def is_engines(module: nn.Module) -> bool:
    """Return whether `deepspeed.initialize` has taken a module over for ZeRO-3, too late for new parameters."""
    return type(module._parameters).__name__ == "ZeROOrderedDict"


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor, of one that is emptied too."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


@contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Have emptied parameters whole within this context; all processes have to enter it."""
    emptied = [parameter for parameter in parameters if is_emptied(parameter)]
    if not emptied:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(emptied):
        yield
