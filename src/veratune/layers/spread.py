"""Parameters of which each process holds a part."""

from typing import Any

from torch import Tensor


def how_spread(tensor: Tensor | None) -> str | None:
    """Return how a tensor is spread over processes at the moment, or None if it is whole here."""
    found: Any = tensor
    if hasattr(found, "device_mesh"):  # tensor parallelism, FSDP2
        return str(tuple(found.placements))
    return "by DeepSpeed's ZeRO-3" if is_emptied(tensor) else None


def is_emptied(tensor: Tensor | None) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has left nothing in a parameter here, as it does between its uses."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"
