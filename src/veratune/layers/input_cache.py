"""x A^T for the layers that read the same x with the same A (query, key and value; gate and up): computed once."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veratune.utils.torch_private import modes_active, transformations_active


def _can_be_remembered(x: Tensor) -> bool:
    """Return whether what is computed from x now is what a sibling would compute from it a moment later.

    While tracing, the compiler merges equal products. An inference tensor does not tell when it was written to, and
    some optimizers do not say that they write to a parameter. Under transformations and modes x may stand for another.
    """
    if torch.compiler.is_compiling() or transformations_active() or modes_active():
        return False
    return type(x) is Tensor and not x.is_inference() and not (x.is_leaf and x.requires_grad)


class _Entry(NamedTuple):
    x: "weakref.ref[Tensor]"
    version: int
    a_projection: Tensor
    xa: Tensor
    served: set[str]


class InputCache:
    """The last product of a group of layers, handed to the others of the group that ask for the same one.

    It is a memo by identity: whoever comes with another tensor, or with one that was written to since, or with other
    projections, gets a product of its own, and so does a layer that comes a second time, as that is another pass. So
    it is right under checkpointing (which brings new tensors), in several threads (which at worst compute twice) and
    in replicas. It lives no longer than x itself, and is no part of copies or pickles.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def get(self, layer: str, x: Tensor, a_projection: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Return the product for x, from memory or from `compute`.

        Args:
            layer: the name of the layer that asks.
            x: its input, as it came.
            a_projection: A.
            compute: makes the product.
        """
        if not _can_be_remembered(x):
            return compute()
        entry = self._entry
        if (
            entry is not None
            and entry.x() is x
            and entry.version == x._version
            and entry.a_projection is a_projection
            and layer not in entry.served
        ):
            entry.served.add(layer)
            return entry.xa
        xa = compute()
        me = weakref.ref(self)

        def forget(reference: "weakref.ref[Tensor]") -> None:
            memo = me()
            if memo is not None and memo._entry is not None and memo._entry.x is reference:
                memo._entry = None

        self._entry = _Entry(weakref.ref(x, forget), x._version, a_projection, xa, {layer})
        return xa

    def __getstate__(self) -> dict[str, Any]:
        return {"_entry": None}
