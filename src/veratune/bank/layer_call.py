"""What one call of a model that serves many adapters at once computes with, and which rows have which adapter.

It is found in a `BankCall` of the calling thread, as a model hands its layers nothing but their inputs. A layer that
finds none refuses to compute, rather than let some other adapter, or none, stand in for the one wanted.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowGroup:
    """The rows of a call that have the same adapter.

    Attributes:
        slot: the adapter's row in the slab.
        scheme: which projections it has.
        rows: int64 (n,), the rows.
        span: the same as a slice, if they stand together.
    """

    slot: int
    scheme: int
    rows: Tensor
    span: slice | None

    def of(self, x: Tensor) -> Tensor:
        """Return its rows of a tensor."""
        return x.index_select(0, self.rows) if self.span is None else x[self.span]


@dataclass(frozen=True)
class BankCall:
    """What the layers have to know of one call of the model.

    Attributes:
        owner: the bank; layers of another one refuse the call.
        slab: (slots, numbers), the vectors of all resident adapters; row 0 is zero, which is the base model.
        heads: (slots, numbers), what adapters train in full; row 0 is the base model's own. None without heads.
        rows: int64 (n,), the slot of each row of the batch or, if `packed`, of each token.
        by_scheme: for each kind of projections that occurs the same, with 0 in rows of other kinds; for all kinds that
            the bank has if the model is compiled, so that it need not be compiled anew for other combinations.
        packed: whether `rows` are tokens.
        groups: the rows by adapter, the base model left out.
        largest: the number of rows that the commonest adapter has.
        has_base: whether there may be rows of the base model.
        copies: how often a row may stand in a layer's input, one behind the other: beams and returned sequences.
        flattened: whether layers may be given (rows * tokens, in). Not so where a row also has images or sounds, whose
            number nothing tells.
        held: what keeps the slots as they are while the call is there.
    """

    owner: object
    slab: Tensor
    heads: Tensor | None
    rows: Tensor
    by_scheme: tuple[tuple[int, Tensor], ...]
    packed: bool
    groups: tuple[RowGroup, ...]
    largest: int
    has_base: bool = True
    copies: tuple[int, ...] = (1,)
    flattened: bool = True
    held: object = None

    @property
    def plain(self) -> bool:
        """Whether all rows are the base model's."""
        return len(self.by_scheme) == 0  # in words that a compiler can follow


class _Calls(threading.local):
    current: BankCall | None = None


_calls = _Calls()


@contextmanager
def serving(call: BankCall) -> Iterator[None]:
    """Let the layers that this thread calls serve this call."""
    before = _calls.current
    _calls.current = call
    try:
        yield
    finally:
        _calls.current = before


def active_call() -> BankCall | None:
    """Return the call that this thread is serving, whichever bank's it is."""
    return _calls.current


def current_call(owner: object) -> BankCall:
    """Return what this thread's call of a bank's model serves.

    Raises:
        RuntimeError: the model was not called through this bank.
    """
    call = active_call()
    if call is None or call.owner is not owner:
        raise RuntimeError(
            "this model serves the adapters of a bank and was called without any: call bank.model(..., adapters=[...])"
            " or bank.model.generate(..., adapters=[...]), with None for rows of the base model; bank.unload() gives"
            " the model back"
        )
    return call


def by_rows(x: Tensor, call: BankCall, what: str) -> Tensor:
    """Return an input (..., in) as (rows, n, in), where the n vectors of each row belong to one adapter.

    Raises:
        RuntimeError: the input's first dimension does not stand for the rows (or their beams, or rows and tokens in
            one), so that nothing tells what belongs to which adapter.
    """
    rows = call.rows.shape[0]
    tokens = math.prod(x.shape[:-1])
    if call.packed:
        if tokens != rows:
            raise RuntimeError(
                f"{what} was given an input of shape {tuple(x.shape)}, {tokens} tokens, while adapter_lengths add up to"
                f" {rows}"
            )
    elif x.ndim < 2 or not is_by_rows(x, call):
        raise RuntimeError(
            f"{what} was given an input of shape {tuple(x.shape)}, whose first dimension does not stand for the {rows}"
            " rows of this batch: it cannot be told which adapter belongs to what. Leave that layer out of the bank"
        )
    return x.reshape(rows, tokens // rows, x.shape[-1])


def is_by_rows(x: Tensor, call: BankCall) -> bool:
    """Return whether an input's first dimension is that of the rows, or of their copies, or rows and tokens in one."""
    rows = call.rows.shape[0]
    if x.ndim == 2 and call.flattened:
        return x.shape[0] % rows == 0
    return any(x.shape[0] == rows * copies for copies in call.copies)
