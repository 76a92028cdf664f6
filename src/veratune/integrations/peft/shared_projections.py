"""The A and B that all layers of an adapter share in PEFT: `vera_A` and `vera_B` of models and layers."""

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from veratune.layers import AdapterEntry
from veratune.projections.schemes import PeftShared, Side, Stored

PeftScheme = PeftShared | Stored

# Held weakly: while a tensor is in use, all adapters with these projections share it.
_tensors: WeakValueDictionary[tuple[Side, PeftScheme, int], Tensor] = WeakValueDictionary()


def shared_projection(side: Side, entry: AdapterEntry) -> Tensor:
    """Return PEFT's A, (r, max_in), or its B, (max_out, r), of an adapter on one of its layers, in float32 on the CPU.

    The result is an inference tensor: the layers use a separate copy, and torch refuses to write to this one.
    """
    scheme: Any = entry.a.projection.scheme
    key = side, scheme, entry.r
    tensor = _tensors.get(key)
    if tensor is None:
        with torch.inference_mode():
            drawn = scheme.draw(side, range(entry.r), scheme.storage_width(side, 0), torch.device("cpu"))
            tensor = drawn.clone() if side == "A" else (drawn * scheme.scale(entry.r)).t().contiguous()
        _tensors[key] = tensor
    return tensor


class SharedProjections(Mapping[str, Tensor]):
    """PEFT's A or B by adapter name. Only adapters of PEFT's own `VeraConfig` or `projection="peft"` have them."""

    def __init__(self, side: Side, entries: Mapping[str, AdapterEntry]) -> None:
        self._side, self._entries = side, entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        if not isinstance(entry.a.projection.scheme, PeftScheme):
            raise KeyError(f"adapter {name!r} has separate projections for each width, not PEFT's")
        return shared_projection(self._side, entry)

    def __iter__(self) -> Iterator[str]:
        return (name for name, entry in self._entries.items() if isinstance(entry.a.projection.scheme, PeftScheme))

    def __len__(self) -> int:
        return len(list(iter(self)))
