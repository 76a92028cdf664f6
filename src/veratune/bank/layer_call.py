"""The state of one call to a bank's model: the stored rows, and the row that each sequence in the batch uses.

A model passes only inputs to its layers, so the `BankCall` is thread-local. A layer that is called without a `BankCall`
raises an error instead of computing with the wrong adapter or without an adapter.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AdapterGroup:
    """The sequences of a call (or tokens, if packed) that use the same adapter.

    Attributes:
        row: the adapter's row in the slab.
        scheme: the number of the adapter's projection scheme.
        sequences: int64 (n,), their positions in the batch.
        span: the positions as a slice if they are consecutive, otherwise None.
    """

    row: int
    scheme: int
    sequences: Tensor
    span: slice | None

    def of(self, x: Tensor) -> Tensor:
        """Return the group's sequences of a tensor."""
        return x.index_select(0, self.sequences) if self.span is None else x[self.span]


@dataclass(frozen=True)
class BankCall:
    """The data that layers read during one call of the model.

    Attributes:
        owner: identifies the bank; layers of other banks reject the call.
        slab: (rows, numbers), the vectors of all resident adapters; row 0, for the base model, is zero.
        saved: (rows, numbers), the values of modules_to_save; row 0 has the base model's. None without modules_to_save.
        rows: int64 (n,), the row of each sequence of the batch or, if `packed`, of each token.
        by_scheme: for each scheme in the call, its number and `rows` with 0 for sequences of other schemes. If the
            model is compiled, all schemes of the bank are listed, so that other combinations do not recompile it.
        packed: whether `rows` has one entry per token.
        groups: the sequences grouped by adapter, excluding those of the base model.
        largest: the size of the largest group.
        has_base: whether sequences of the base model may occur.
        copies: the possible numbers of consecutive copies of each sequence in a layer's input, from beams and returned
            sequences.
        flattened: whether inputs may be (sequences * tokens, in). False if sequences also have images or audio clips,
            whose number is unknown.
        held: an object that keeps the slab's rows in place during the call.
    """

    owner: object
    slab: Tensor
    saved: Tensor | None
    rows: Tensor
    by_scheme: tuple[tuple[int, Tensor], ...]
    packed: bool
    groups: tuple[AdapterGroup, ...]
    largest: int
    has_base: bool = True
    copies: tuple[int, ...] = (1,)
    flattened: bool = True
    held: object = None

    @property
    def plain(self) -> bool:
        """Whether all sequences use the base model."""
        return len(self.by_scheme) == 0  # written so that torch.compile can trace it

    @property
    def sequences(self) -> int:
        """The number of sequences or, if `packed`, of tokens."""
        return self.rows.shape[0]


class _Calls(threading.local):
    current: BankCall | None = None


_calls = _Calls()


@contextmanager
def serving(call: BankCall) -> Iterator[None]:
    """Make `call` the active call of this thread."""
    before = _calls.current
    _calls.current = call
    try:
        yield
    finally:
        _calls.current = before


def active_call() -> BankCall | None:
    """Return this thread's active call, of any bank, or None."""
    return _calls.current


def current_call(owner: object) -> BankCall:
    """Return this thread's active call, which must belong to this bank.

    Raises:
        RuntimeError: the model was not called through this bank.
    """
    call = active_call()
    if call is None or call.owner is not owner:
        raise RuntimeError(
            "this model serves the adapters of a bank but was called without adapters: call"
            " bank.model(..., adapters=[...]) or bank.model.generate(..., adapters=[...]), with None for the base"
            " model; bank.unload() restores the model"
        )
    return call


def by_sequence(x: Tensor, call: BankCall, layer: str) -> Tensor:
    """Reshape an input (..., in) to (sequences, n, in), where all n vectors of a sequence use the same adapter.

    Raises:
        RuntimeError: the input cannot be matched with adapters: its first dimension is neither the sequences (or their
            beams) nor sequences and tokens flattened.
    """
    tokens = math.prod(x.shape[:-1])
    if call.packed:
        if tokens != call.sequences:
            raise RuntimeError(
                f"{layer} received an input of shape {tuple(x.shape)} with {tokens} tokens, but adapter_lengths add up"
                f" to {call.sequences}"
            )
    elif x.ndim < 2 or not is_by_sequence(x, call):
        raise RuntimeError(
            f"{layer} received an input of shape {tuple(x.shape)}, whose first dimension is not the {call.sequences}"
            " sequences of this batch, so it cannot be matched with adapters. Exclude the layer from the bank"
            " (exclude_modules)"
        )
    return x.reshape(call.sequences, tokens // call.sequences, x.shape[-1])


def is_by_sequence(x: Tensor, call: BankCall) -> bool:
    """Return whether an input's first dimension is the sequences, their copies, or sequences and tokens flattened."""
    if x.ndim == 2 and call.flattened:
        return x.shape[0] % call.sequences == 0
    return any(x.shape[0] == call.sequences * copies for copies in call.copies)
