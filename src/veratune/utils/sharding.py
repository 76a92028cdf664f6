"""Parameters that are sharded across processes.

DeepSpeed's ZeRO-3 keeps parameters empty between uses, starting with `deepspeed.initialize` or, if transformers loads
the model for ZeRO-3, from the beginning.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def describe_sharding(tensor: Tensor | None) -> str | None:
    """Describe how the tensor is sharded, or return None if this process holds all of it."""
    found: Any = tensor
    if hasattr(found, "device_mesh"):  # tensor parallelism, FSDP2
        return str(tuple(found.placements))
    return "by DeepSpeed's ZeRO-3" if is_emptied(tensor) else None


def is_emptied(tensor: Tensor | None) -> bool:
    """Return whether ZeRO-3 has emptied a parameter."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def is_engines(module: nn.Module) -> bool:
    """Return whether a DeepSpeed ZeRO-3 engine manages a module, which then accepts no new parameters."""
    return type(module._parameters).__name__ == "ZeROOrderedDict"


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor, even if ZeRO-3 has emptied it."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


@contextmanager
def all_gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gather emptied parameters within this context; all processes must enter it."""
    emptied = [parameter for parameter in parameters if is_emptied(parameter)]
    if not emptied:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(emptied):
        yield
