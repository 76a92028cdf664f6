"""The adapters of a bank: which version a name refers to, and which versions are leased."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veratune.bank.layout import AdapterRow, BankError
from veratune.bank.projections import BankProjections
from veratune.bank.resident import Lease, ResidentRows, Version
from veratune.bank.schema import Metadata, check_spelling, scheme_of
from veratune.bank.store import AdapterGoneError, BankStore
from veratune.projections.schemes import Scheme

AdapterNames = Sequence[str | None]


@dataclass(frozen=True)
class AdapterInfo:
    """Information about an adapter in a bank.

    Attributes:
        name: its name.
        digest: 32 hexadecimal digits; equal for equal values.
        rank: its largest rank.
        fingerprint: its projections' fingerprint.
        resident: whether its vectors are currently on the device.
    """

    name: str
    digest: str
    rank: int
    fingerprint: str
    resident: bool


class Registry:
    """The adapters of a bank by name. Methods may be called by several threads.

    Attributes:
        names: name to version.
        versions: digest to version, for versions that have a name or a lease.
        is_closed: whether the bank was unloaded.
    """

    def __init__(self, rows: ResidentRows, projections: BankProjections, store: BankStore | None) -> None:
        self.names: dict[str, Version] = {}
        self.versions: dict[str, Version] = {}
        self.is_closed = False
        self._resident = rows
        self._projections = projections
        self._store = store

    # Names

    def info(self, name: str) -> AdapterInfo:
        """Return information about an adapter.

        Raises:
            BankError: the name is unknown.
        """
        with self._resident.lock:
            version = self.version(name)
            fingerprint = self._projections[version.scheme].fingerprint()
            return AdapterInfo(name, version.digest, version.rank, fingerprint, version.row is not None)

    def version(self, name: str) -> Version:
        """Return the version that a name refers to.

        Raises:
            BankError: the name is unknown.
        """
        version = self.names.get(name) if isinstance(name, str) else None
        if version is None:
            close = difflib.get_close_matches(str(name), self.names, n=3) if len(self.names) <= 1000 else []
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise BankError(f"there is no adapter {name!r} among the {len(self.names)} in this bank{hint}")
        return version

    def check_name(self, name: str, replace: bool) -> Version | None:
        """Return the version that a name refers to, if `replace` is true; otherwise check that the name is new.

        Raises:
            BankError: the name is invalid, already taken, or, if `replace` is true, unknown.
        """
        self.check_open()
        check_spelling(name)
        if replace:
            return self.version(name)
        if name in self.names:
            raise BankError(f"{name!r} is already in the bank: pass replace=True, or remove it first")
        return None

    def put(self, name: str, row: AdapterRow) -> AdapterInfo:
        """Bind a name to an adapter, and make the adapter resident if there is room."""
        with self._resident.lock:
            self._resident.release_abandoned()
            version = self._known(row.digest, row.scheme, row.rank)
            version.names += 1  # keeps its row
            try:
                if version.row is None and (self._store is None or self._resident.free):
                    self._resident.put(version, row)
            except BaseException:
                version.names -= 1
                self._forget(version)
                raise
            version.names -= 1
            self._bind(name, version)
            return self.info(name)

    def remove(self, name: str) -> None:
        """Remove a name."""
        with self._resident.lock:
            self._bind(name, None)

    def follow(self, names: Mapping[str, str], adapters: Mapping[str, Metadata]) -> None:
        """Bind names to the same adapters as in the file.

        Raises:
            BankError: this version of veratune draws an adapter's projections differently. Nothing is changed.
        """
        with self._resident.lock:
            changed = [
                (name, digest, adapters[digest].rank, scheme_of(adapters[digest].text))
                for name, digest in names.items()
                if name not in self.names or self.names[name].digest != digest
            ]
            for name in [name for name in self.names if name not in names]:
                self._bind(name, None)
            for name, digest, rank, scheme in changed:
                self._bind(name, self._known(digest, scheme, rank))

    def _known(self, digest: str, scheme: Scheme, rank: int) -> Version:
        """Return the version with this digest, creating it if it is new."""
        if digest not in self.versions:
            self.versions[digest] = Version(digest, self._projections.number_of(scheme), rank)
        return self.versions[digest]

    def _bind(self, name: str, version: Version | None) -> None:
        before = self.names.pop(name, None)
        if version is not None:
            self.names[name] = version
            self._resident.named(version, 1)
        if before is not None:
            self._resident.named(before, -1)
            self._forget(before)

    def _forget(self, version: Version) -> None:
        if version.names or version.leases or self.versions.pop(version.digest, None) is None:
            return
        if all(other.scheme != version.scheme for other in self.versions.values()):
            self._projections.drop(version.scheme)

    # Leases

    def lease(self, names: AdapterNames) -> Lease:
        """Return a lease of the versions that names refer to.

        Raises:
            AdapterGoneError: the file no longer contains one of the versions.
            BankError: a name is unknown, or there is no room for this many different adapters at once.
        """
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise BankError(f"adapters={names!r} is not allowed: pass a list with a name, or None, for each sequence")
        with self._resident.lock:
            return self.lease_versions([None if name is None else self.version(name) for name in names])

    def lease_versions(self, versions: Sequence[Version | None]) -> Lease:
        """Return a lease of versions, even if their names now refer to other versions.

        Raises:
            BankError: as for `lease`.
        """
        with self._resident.lock:
            self.check_open()
            self._resident.release_abandoned()
            leased: list[Version] = []
            try:
                for version in {id(v): v for v in versions if v is not None}.values():
                    self._resident.lease(version, self._read)
                    leased.append(version)
            except BaseException:
                for version in leased:
                    self._resident.release(version)
                raise
            return Lease(self._resident, versions, self._forget)

    def lease_again(self, lease: Lease) -> Lease:
        """Return another lease of the same versions, which may outlive the first one.

        Raises:
            BankError: the lease was released, or belongs to another bank.
        """
        with self._resident.lock:
            if not lease.is_of(self._resident):
                raise BankError("adapters: this lease belongs to another bank; get one from this bank's lease()")
            if not lease.is_open:
                raise BankError("adapters: this lease has been released")
            return self.lease_versions(lease.versions)

    def close(self) -> None:
        """Reject all further leases.

        Raises:
            BankError: requests are running, or leases are held.
        """
        with self._resident.lock:
            self._resident.release_abandoned()
            if self._resident.open_leases:
                raise BankError(
                    "the bank cannot be unloaded while requests are running or leases are held: wait for the requests"
                    " and release the leases"
                )
            self.is_closed = True

    def check_open(self) -> None:
        """Raise BankError if the bank was unloaded."""
        if self.is_closed:
            raise BankError("this bank was unloaded: create another bank")

    def _read(self, digest: str) -> AdapterRow:
        if self._store is None:
            raise AdapterGoneError(f"this bank no longer has the adapter {digest}")
        return self._store.row(digest)
