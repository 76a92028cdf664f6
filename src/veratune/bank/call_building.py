"""Build the `BankCall` of a batch, which layers read, from the adapters of its sequences."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from veratune.bank.layer_call import AdapterGroup, BankCall
from veratune.bank.layout import BankError
from veratune.bank.resident import Lease


def make_call(
    owner: object,
    lease: Lease,
    lengths: Sequence[int] | None,
    schemes: Sequence[int] | None,
    *,
    copies: tuple[int, ...],
    flattened: bool,
) -> BankCall:
    """Return the `BankCall` for the adapters of a lease.

    Args:
        owner: as in `BankCall`.
        lease: the adapters of the sequences.
        lengths: for packed sequences, the number of tokens in each.
        schemes: the numbers of all schemes in the bank, for a compiled model; otherwise None.
        copies: as in `BankCall`.
        flattened: as in `BankCall`.

    Raises:
        BankError: there are no sequences, or `lengths` does not have one entry per sequence.
    """
    each = [(row, -1 if v is None else v.scheme) for row, v in zip(lease.rows, lease.versions, strict=True)]
    if lengths is not None:
        lengths = _checked_lengths(lengths, len(each))
        each = [pair for pair, length in zip(each, lengths, strict=True) for _ in range(length)]
    if not each:
        raise BankError("adapters is empty: pass a name, or None, for each sequence")
    device = lease.slab.device
    rows, scheme_of = (torch.tensor(values, device=device) for values in zip(*each, strict=True))
    occurring = sorted({scheme for _, scheme in each} - {-1}) if schemes is None else schemes
    members: dict[tuple[int, int], list[int]] = {}
    for sequence, (row, scheme) in enumerate(each):
        if row:
            members.setdefault((row, scheme), []).append(sequence)
    return BankCall(
        owner,
        lease.slab,
        lease.saved,
        rows,
        by_scheme=tuple((number, torch.where(scheme_of == number, rows, 0)) for number in occurring),
        packed=lengths is not None,
        groups=tuple(_group(row, scheme, found, device) for (row, scheme), found in members.items()),
        largest=max((len(found) for found in members.values()), default=0),
        has_base=schemes is not None or any(row == 0 for row, _ in each),
        copies=copies,
        flattened=flattened,
        held=lease,
    )


def trial_call(owner: object, scheme: int, slab: Tensor, saved: Tensor | None, rows: Tensor) -> BankCall:
    """Return a `BankCall` in which each sequence uses either the adapter in row 1 of a slab or the base model.

    Args:
        owner: as in `BankCall`.
        scheme: the number of the adapter's projection scheme.
        slab: (2, numbers).
        saved: the bank's values of modules_to_save; the adapter uses the base model's.
        rows: int64 (sequences,), 1 with the adapter and 0 without.
    """
    saved = None if saved is None else torch.stack([saved[0], saved[0]])
    group = AdapterGroup(1, scheme, rows.nonzero().flatten(), None)
    return BankCall(owner, slab, saved, rows, ((scheme, rows),), False, (group,), 0)


def _group(row: int, scheme: int, sequences: list[int], device: torch.device) -> AdapterGroup:
    consecutive = sequences[-1] - sequences[0] == len(sequences) - 1
    span = slice(sequences[0], sequences[-1] + 1) if consecutive else None
    return AdapterGroup(row, scheme, torch.tensor(sequences, device=device), span)


def _checked_lengths(lengths: Sequence[int], count: int) -> list[int]:
    """Return lengths as integers, one for each of `count` adapters, or raise BankError."""
    try:
        integers = [operator.index(length) for length in lengths]
    except TypeError:  # not a sequence of integers
        integers = []
    if len(integers) != count or any(length < 0 for length in integers):
        raise BankError(f"adapter_lengths={lengths} must have one non-negative integer for each of {count} adapters")
    return integers
