"""The state of one call of a bank's model: the stored rows, and which of them each sequence of the batch uses.

A model passes nothing but inputs to its layers, so the `BankCall` is stored per thread. A layer without one raises an
error rather than compute with the wrong adapter or with no adapter.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AdapterGroup:
    """The sequences of a call (or tokens, if packed) that have the same adapter.

    Attributes:
        row: the adapter's row in the slab.
        scheme: the number of its projections' scheme.
        sequences: int64 (n,), their positions in the batch.
        span: the same as a slice, if they are consecutive.
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
    """Everything that layers read about one call of the model.

    Attributes:
        owner: the bank; layers of another one refuse the call.
        slab: (rows, numbers), the vectors of all resident adapters; row 0 is zero, which is the base model.
        saved: (rows, numbers), the values of modules_to_save; row 0 is the base model's. None without modules_to_save.
        rows: int64 (n,), the row of each sequence of the batch or, if `packed`, of each token.
        by_scheme: for each scheme in the call, its number and `rows` with 0 for sequences of other schemes; for all
            schemes of the bank if the model is compiled, so that other combinations do not trigger recompilation.
        packed: whether `rows` has an entry per token.
        groups: the sequences by adapter, without those of the base model.
        largest: the size of the largest group.
        has_base: whether there may be sequences of the base model.
        copies: how many consecutive copies of a sequence a layer's input may have: beams and returned sequences.
        flattened: whether inputs may be (sequences * tokens, in). False if sequences also have images or sounds, whose
            number is unknown.
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
        """Whether all sequences are the base model's."""
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
    """Make this the active call of the thread."""
    before = _calls.current
    _calls.current = call
    try:
        yield
    finally:
        _calls.current = before


def active_call() -> BankCall | None:
    """Return the call that this thread is serving, for any bank."""
    return _calls.current


def current_call(owner: object) -> BankCall:
    """Return this thread's active call of a bank.

    Raises:
        RuntimeError: the model was not called through this bank.
    """
    call = active_call()
    if call is None or call.owner is not owner:
        raise RuntimeError(
            "this model serves the adapters of a bank and was called without any: call bank.model(..., adapters=[...])"
            " or bank.model.generate(..., adapters=[...]), with None for the base model; bank.unload() restores the"
            " model"
        )
    return call


def by_sequence(x: Tensor, call: BankCall, layer: str) -> Tensor:
    """Return an input (..., in) as (sequences, n, in), where the n vectors of each sequence belong to one adapter.

    Raises:
        RuntimeError: the input's first dimension is not the sequences (or their beams, or sequences and tokens
            flattened), so that they cannot be matched with adapters.
    """
    tokens = math.prod(x.shape[:-1])
    if call.packed:
        if tokens != call.sequences:
            raise RuntimeError(
                f"{layer} was given an input of shape {tuple(x.shape)}, {tokens} tokens, while adapter_lengths add up"
                f" to {call.sequences}"
            )
    elif x.ndim < 2 or not is_by_sequence(x, call):
        raise RuntimeError(
            f"{layer} was given an input of shape {tuple(x.shape)}, whose first dimension is not the {call.sequences}"
            " sequences of this batch, so its values cannot be matched with adapters. Exclude the layer from the bank"
            " (exclude_modules)"
        )
    return x.reshape(call.sequences, tokens // call.sequences, x.shape[-1])


def is_by_sequence(x: Tensor, call: BankCall) -> bool:
    """Return whether an input's first dimension is the sequences, their copies, or sequences and tokens flattened."""
    if x.ndim == 2 and call.flattened:
        return x.shape[0] % call.sequences == 0
    return any(x.shape[0] == call.sequences * copies for copies in call.copies)
