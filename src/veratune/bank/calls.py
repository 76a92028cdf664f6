"""Build the `BankCall` that layers read, from the adapters of a batch's rows."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from veratune.bank.layer_call import BankCall, RowGroup
from veratune.bank.layout import BankError
from veratune.bank.slots import Lease


def make_call(
    owner: object,
    lease: Lease,
    lengths: Sequence[int] | None,
    kinds: Sequence[int] | None,
    *,
    copies: tuple[int, ...],
    flattened: bool,
) -> BankCall:
    """Return the call that serves the adapters of a lease.

    Args:
        owner: as in `BankCall`.
        lease: the adapters of the rows.
        lengths: for packed sequences, the number of tokens of each.
        kinds: the numbers of all projections that the bank has, for a compiled model; otherwise None.
        copies: as in `BankCall`.
        flattened: as in `BankCall`.

    Raises:
        BankError: there are no rows, or not one length for each row.
    """
    slots, schemes = lease.slots, [-1 if v is None else v.scheme for v in lease.versions]
    if lengths is not None:
        lengths = _checked(lengths, len(slots))
        slots = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
        schemes = [scheme for scheme, length in zip(schemes, lengths, strict=True) for _ in range(length)]
    if not slots:
        raise BankError("adapters is empty: give a name, or None, for each row")
    device = lease.slab.device
    rows, scheme_of = torch.tensor(slots, device=device), torch.tensor(schemes, device=device)
    occurring = sorted(set(schemes) - {-1}) if kinds is None else kinds
    members: dict[tuple[int, int], list[int]] = {}
    for row, (slot, scheme) in enumerate(zip(slots, schemes, strict=True)):
        if slot:
            members.setdefault((slot, scheme), []).append(row)
    return BankCall(
        owner,
        lease.slab,
        lease.heads,
        rows,
        by_scheme=tuple((number, torch.where(scheme_of == number, rows, 0)) for number in occurring),
        packed=lengths is not None,
        groups=tuple(_group(slot, scheme, own, device) for (slot, scheme), own in members.items()),
        largest=max((len(own) for own in members.values()), default=0),
        has_base=kinds is not None or 0 in slots,
        copies=copies,
        flattened=flattened,
        held=lease,
    )


def trial_call(owner: object, number: int, slab: Tensor, heads: Tensor | None, slots: Tensor) -> BankCall:
    """Return a call whose rows have the adapter in row 1 of a slab, or none.

    Args:
        owner: as in `BankCall`.
        number: of its projections.
        slab: (2, numbers).
        heads: the bank's; the adapter has those of the base model.
        slots: int64 (rows,), 1 for rows that have it and 0 for others.
    """
    heads = None if heads is None else torch.stack([heads[0], heads[0]])
    group = RowGroup(1, number, slots.nonzero().flatten(), None)
    return BankCall(owner, slab, heads, slots, ((number, slots),), False, (group,), 0)


def _group(slot: int, scheme: int, rows: list[int], device: torch.device) -> RowGroup:
    together = rows[-1] - rows[0] == len(rows) - 1
    span = slice(rows[0], rows[-1] + 1) if together else None
    return RowGroup(slot, scheme, torch.tensor(rows, device=device), span)


def _checked(lengths: Sequence[int], count: int) -> list[int]:
    """Return lengths as whole numbers, one for each of so many adapters, or raise BankError."""
    try:
        whole = [operator.index(length) for length in lengths]
    except TypeError:  # no sequence, or one of something else; of tensors, that is an error of the same kind
        whole = []
    if len(whole) != count or any(length < 0 for length in whole):
        raise BankError(f"adapter_lengths={lengths} must have a length for each of {count} adapters, a whole number")
    return whole
