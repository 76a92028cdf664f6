"""The state of one call of a bank's model: the vectors, and which rows have which adapter.

A model passes nothing but inputs to its layers, so the `BankCall` is stored per thread. A layer without one raises an
error rather than compute with another adapter, or with none.
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
        slot: the adapter's index in the slab.
        scheme: the number of its projections' scheme.
        rows: int64 (n,), the rows of the batch.
        span: the same as a slice, if they are consecutive.
    """

    slot: int
    scheme: int
    rows: Tensor
    span: slice | None

    def of(self, x: Tensor) -> Tensor:
        """Return the group's rows of a tensor."""
        return x.index_select(0, self.rows) if self.span is None else x[self.span]


@dataclass(frozen=True)
class BankCall:
    """Everything that layers read about one call of the model.

    Attributes:
        owner: the bank; layers of another one refuse the call.
        slab: (slots, numbers), the vectors of all resident adapters; row 0 is zero, which is the base model.
        heads: (slots, numbers), the values of modules_to_save; row 0 is the base model's. None without modules_to_save.
        rows: int64 (n,), the index in the slab for each row of the batch or, if `packed`, for each token.
        by_scheme: for each scheme in the call, its number and `rows` with 0 for rows of other schemes; for all schemes
            of the bank if the model is compiled, so that other combinations do not trigger recompilation.
        packed: whether `rows` are tokens.
        groups: the rows by adapter, without those of the base model.
        largest: the number of rows of the most frequent adapter.
        has_base: whether there may be rows of the base model.
        copies: how many consecutive copies of a row a layer's input may have: beams and returned sequences.
        flattened: whether inputs may be (rows * tokens, in). False if rows also have images or sounds, whose number is
            unknown.
        held: an object that keeps the slab's rows in place during the call.
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
        return len(self.by_scheme) == 0  # written so that torch.compile can trace it


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
    """Return the call that this thread is serving, whichever bank's it is."""
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
            " or bank.model.generate(..., adapters=[...]), with None for rows of the base model; bank.unload() gives"
            " the model back"
        )
    return call


def by_rows(x: Tensor, call: BankCall, what: str) -> Tensor:
    """Return an input (..., in) as (rows, n, in), where the n vectors of each row belong to one adapter.

    Raises:
        RuntimeError: the input's first dimension is not the rows (or their beams, or rows and tokens flattened), so
            that rows cannot be matched with adapters.
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
    """Return whether an input's first dimension is the rows, their copies, or rows and tokens flattened."""
    rows = call.rows.shape[0]
    if x.ndim == 2 and call.flattened:
        return x.shape[0] % rows == 0
    return any(x.shape[0] == rows * copies for copies in call.copies)
