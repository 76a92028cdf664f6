"""Which adapters are resident, under which names, and who is using them: no row is written to while it is read."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from veratune.bank.layout import AdapterRow, BankError


@dataclass
class Version:
    """One immutable set of values, under any number of names.

    Attributes:
        digest: identifies it.
        scheme: the number of its projections within the bank.
        rank: its largest rank.
        slot: its row in the slab; None while it is not resident.
        names: how many names it has.
        leases: how many calls are using it.
    """

    digest: str
    scheme: int
    rank: int
    slot: int | None = None
    names: int = 0
    leases: int = 0


@dataclass
class Slots:
    """The slab and its rows. Whoever calls a method holds `lock`.

    Attributes:
        slab: (capacity + 1, numbers); row 0 is zero.
        heads: (capacity + 1, head numbers), or None; row 0 is the base model's.
        open_leases: how many requests run or hold adapters, those of the base model included.
        abandoned: leases that nobody refers to any more and nobody has released.
        grows: whether a full slab is enlarged; otherwise an unused adapter is evicted.
    """

    slab: Tensor
    heads: Tensor | None
    grows: bool
    lock: threading.RLock = field(default_factory=threading.RLock)
    open_leases: int = 0
    free: list[int] = field(default_factory=list)
    idle: OrderedDict[str, Version] = field(default_factory=OrderedDict)
    abandoned: deque["Lease"] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.free = list(range(self.capacity, 0, -1))

    @classmethod
    def empty(
        cls,
        capacity: int,
        numbers: int,
        dtype: torch.dtype,
        device: torch.device,
        base_heads: Tensor | None,
        grows: bool,
    ) -> "Slots":
        """Return slots without adapters. Memory that was never written to is not taken from the system."""
        with torch.inference_mode(False):  # whatever the caller is in, rows are written to later
            slab = _zeros(capacity + 1, numbers, dtype, device)
            heads = None
            if base_heads is not None:
                heads = _zeros(capacity + 1, base_heads.numel(), base_heads.dtype, device)
                heads[0] = base_heads
        return cls(slab, heads, grows)

    @property
    def capacity(self) -> int:
        return self.slab.shape[0] - 1

    def put(self, version: Version, row: AdapterRow) -> None:
        """Make a version resident.

        Raises:
            BankError: every row is in use.
        """
        if not self.free:
            self._make_room()
        slot = self.free.pop()
        try:
            self._settle()  # what was enqueued before may still read the row's former values
            self.slab[slot].copy_(row.vectors)
            if self.heads is not None and row.heads is not None:
                self.heads[slot].copy_(row.heads)
            self._settle()
        except BaseException:
            self.free.append(slot)
            raise
        version.slot = slot
        self._note(version)

    def _make_room(self) -> None:
        if self.grows:
            before, more = self.capacity, max(64, self.capacity // 2)
            # Calls that run at the moment keep the former tensors, whose rows have the same numbers. Without memory for
            # both, all stays as it is.
            slab, heads = _lengthened(self.slab, more), None if self.heads is None else _lengthened(self.heads, more)
            self.slab, self.heads, self.free = slab, heads, list(range(before + more, before, -1))
            return
        if not self.idle:
            raise BankError(
                f"all {self.capacity} adapters that this bank holds on the device at a time are in use: make it with a"
                " larger capacity, or send fewer different adapters at once"
            )
        _, version = self.idle.popitem(last=False)
        assert version.slot is not None
        self.free.append(version.slot)
        version.slot = None

    def _settle(self) -> None:
        if self.slab.is_cuda:
            torch.cuda.synchronize(self.slab.device)

    def lease(self, version: Version, read: Callable[[str], AdapterRow]) -> None:
        """Keep a version where it is, or make it resident with what `read` returns for its digest.

        Raises:
            BankError: every row is in use.
        """
        version.leases += 1
        try:
            if version.slot is None:
                self.put(version, read(version.digest))
        except BaseException:
            version.leases -= 1
            raise
        self._note(version)

    def release(self, version: Version) -> None:
        """Undo `lease`."""
        version.leases -= 1
        self._note(version)

    def release_abandoned(self) -> None:
        """Release the leases that were dropped without it."""
        while self.abandoned:
            self.abandoned.popleft().release()

    def named(self, version: Version, change: int) -> None:
        """Count a name that a version got or lost."""
        version.names += change
        self._note(version)

    def _note(self, version: Version) -> None:
        """Free the row of a version that nobody needs; of one that is not in use, remember when it was."""
        if version.slot is None:
            return
        if version.leases:
            self.idle.pop(version.digest, None)
        elif version.names:
            self.idle[version.digest] = version
            self.idle.move_to_end(version.digest)
        else:
            self.idle.pop(version.digest, None)
            self.free.append(version.slot)
            version.slot = None

    def move(self, device: torch.device) -> None:
        """Move everything to another device."""
        heads = None if self.heads is None else self.heads.to(device)
        self.slab, self.heads = self.slab.to(device), heads


def _zeros(rows: int, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(rows, numbers, dtype=dtype, device=device)
    # numpy asks the system for zeros, and gets memory when it is written to; torch writes them itself.
    return torch.from_numpy(np.zeros(rows * numbers * dtype.itemsize, np.uint8)).view(dtype).view(rows, numbers)


def _lengthened(tensor: Tensor, more: int) -> Tensor:
    with torch.inference_mode(False):
        longer = _zeros(len(tensor) + more, tensor.shape[1], tensor.dtype, tensor.device)
        longer[: len(tensor)] = tensor
    return longer


def _slot_of(version: Version | None) -> int:
    if version is None:
        return 0
    assert version.slot is not None
    return version.slot


class Lease:
    """Adapters that stay as they are until `release`: what a request has begun with, it ends with.

    One that is dropped without it is released when the bank is next asked for something.

    Attributes:
        versions: the version of each row, None for the base model.
        slots: the slot of each row.
        digests: the digest of each row, "" for the base model.
        slab, heads: the tensors in which the slots are.
        is_open: whether it has not been released yet.
    """

    is_open = False

    def __init__(self, owner: Slots, versions: Iterable[Version | None], forget: Callable[[Version], None]) -> None:
        self._owner = owner
        self._forget = forget
        self.versions = list(versions)
        self.slots = [_slot_of(version) for version in self.versions]
        self.digests = ["" if version is None else version.digest for version in self.versions]
        self.slab, self.heads = owner.slab, owner.heads
        self._held = list({id(version): version for version in self.versions if version is not None}.values())
        self.is_open = True
        owner.open_leases += 1

    def is_of(self, owner: Slots) -> bool:
        """Return whether it is a lease of these slots, rather than of another bank's."""
        return self._owner is owner

    def release(self) -> None:
        """Let go; a second time does nothing."""
        with self._owner.lock:
            held, self._held = self._held, []
            self._owner.open_leases -= self.is_open
            self.is_open = False
            for version in held:
                self._owner.release(version)
                self._forget(version)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        # Garbage is collected at any moment, also in the middle of a change, whose lock a thread may take twice.
        if self.is_open:
            self._owner.abandoned.append(self)
