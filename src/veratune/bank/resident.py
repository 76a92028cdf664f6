"""The adapters on the device, one row each, and the leases on them: no row is written to while it may be read."""

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
    """The immutable values of an adapter, to which any number of names may refer.

    Attributes:
        digest: identifies the values.
        scheme: the number of its projection scheme in the bank.
        rank: its largest rank.
        row: its row in the slab; None while it is not resident.
        names: the number of names that refer to it.
        leases: the number of leases that hold it.
    """

    digest: str
    scheme: int
    rank: int
    row: int | None = None
    names: int = 0
    leases: int = 0


@dataclass
class ResidentRows:
    """The slab and its rows. Callers of its methods must hold `lock`.

    Attributes:
        slab: (capacity + 1, numbers); row 0 is zero.
        saved: (capacity + 1, numbers), the values of modules_to_save, or None; row 0 has the base model's.
        open_leases: the number of open leases, including those without adapters.
        free: the rows without an adapter.
        idle: the resident versions that no call uses, least recently used first.
        abandoned: leases that were garbage-collected without being released.
        grows: whether to enlarge a full slab instead of evicting an unused adapter.
    """

    slab: Tensor
    saved: Tensor | None
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
        base_saved: Tensor | None,
        grows: bool,
    ) -> "ResidentRows":
        """Create free rows. On a CPU, the operating system allocates their memory when they are first written to."""
        with torch.inference_mode(False):  # rows are also written to outside the caller's inference mode
            slab = _zeros(capacity + 1, numbers, dtype, device)
            saved = None
            if base_saved is not None:
                saved = _zeros(capacity + 1, base_saved.numel(), base_saved.dtype, device)
                saved[0] = base_saved
        return cls(slab, saved, grows)

    @property
    def capacity(self) -> int:
        return self.slab.shape[0] - 1

    def put(self, version: Version, adapter: AdapterRow) -> None:
        """Make a version resident.

        Raises:
            BankError: every row is in use.
        """
        if not self.free:
            self._make_room()
        row = self.free.pop()
        try:
            self._synchronize()  # enqueued kernels may still read the row's old values
            self.slab[row].copy_(adapter.vectors)
            if self.saved is not None and adapter.saved is not None:
                self.saved[row].copy_(adapter.saved)
            self._synchronize()
        except BaseException:
            self.free.append(row)
            raise
        version.row = row
        self._note(version)

    def _make_room(self) -> None:
        if self.grows:
            former, more = self.capacity, max(64, self.capacity // 2)
            # Running calls keep the old tensors, in which versions have the same rows. Both new tensors are allocated
            # before either is assigned, so running out of memory changes nothing.
            slab, saved = _lengthened(self.slab, more), None if self.saved is None else _lengthened(self.saved, more)
            self.slab, self.saved, self.free = slab, saved, list(range(former + more, former, -1))
            return
        if not self.idle:
            raise BankError(
                f"all {self.capacity} adapters that this bank can hold on the device are in use: increase capacity, or"
                " use fewer different adapters at once"
            )
        _, version = self.idle.popitem(last=False)
        assert version.row is not None
        self.free.append(version.row)
        version.row = None

    def _synchronize(self) -> None:
        if self.slab.is_cuda:
            torch.cuda.synchronize(self.slab.device)

    def lease(self, version: Version, read: Callable[[str], AdapterRow]) -> None:
        """Keep a version resident; if it is not resident yet, `read` is called with its digest and returns its row.

        Raises:
            BankError: every row is in use.
        """
        version.leases += 1
        try:
            if version.row is None:
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
        """Release the leases that were garbage-collected without being released."""
        while self.abandoned:
            self.abandoned.popleft().release()

    def named(self, version: Version, change: int) -> None:
        """Add `change` to the number of names that refer to a version."""
        version.names += change
        self._note(version)

    def _note(self, version: Version) -> None:
        """Update `idle` and `free`: an unleased version moves to the end of `idle`, or its row is freed."""
        if version.row is None:
            return
        if version.leases:
            self.idle.pop(version.digest, None)
        elif version.names:
            self.idle[version.digest] = version
            self.idle.move_to_end(version.digest)
        else:
            self.idle.pop(version.digest, None)
            self.free.append(version.row)
            version.row = None

    def move(self, device: torch.device) -> None:
        """Move everything to another device."""
        saved = None if self.saved is None else self.saved.to(device)
        self.slab, self.saved = self.slab.to(device), saved


def _zeros(rows: int, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(rows, numbers, dtype=dtype, device=device)
    # numpy gets zeroed pages from the operating system when they are written to; torch would write zeros immediately.
    return torch.from_numpy(np.zeros(rows * numbers * dtype.itemsize, np.uint8)).view(dtype).view(rows, numbers)


def _lengthened(tensor: Tensor, more: int) -> Tensor:
    with torch.inference_mode(False):
        longer = _zeros(len(tensor) + more, tensor.shape[1], tensor.dtype, tensor.device)
        longer[: len(tensor)] = tensor
    return longer


def _row_of(version: Version | None) -> int:
    if version is None:
        return 0
    assert version.row is not None
    return version.row


class Lease:
    """Adapters that stay unchanged until `release`, so that a request sees one version of each throughout.

    A lease that is garbage-collected without a call to `release` is released during the bank's next operation.

    Attributes:
        versions: the version of each sequence, None for the base model.
        rows: the row of each sequence's version, 0 for the base model.
        digests: the digest of each sequence's version, "" for the base model.
        slab, saved: the tensors that contain these rows.
        is_open: whether the lease has not been released yet.
    """

    is_open = False

    def __init__(
        self, owner: ResidentRows, versions: Iterable[Version | None], forget: Callable[[Version], None]
    ) -> None:
        self._owner = owner
        self._forget = forget
        self.versions = list(versions)
        self.rows = [_row_of(version) for version in self.versions]
        self.digests = ["" if version is None else version.digest for version in self.versions]
        self.slab, self.saved = owner.slab, owner.saved
        self._held = list({id(version): version for version in self.versions if version is not None}.values())
        self.is_open = True
        owner.open_leases += 1

    def is_of(self, owner: ResidentRows) -> bool:
        """Return whether this is a lease of these rows, not of another bank's."""
        return self._owner is owner

    def release(self) -> None:
        """Release the adapters; a second call does nothing."""
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
        # Release it later: garbage collection may interrupt a change in a thread that holds the reentrant lock.
        if self.is_open:
            self._owner.abandoned.append(self)
