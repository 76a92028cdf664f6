"""A bank's file: an SQLite database of immutable adapters, by digest, and of the names that refer to them.

Each change is one transaction: a process that is killed leaves the file in the state before or after, and a reader sees
an adapter under its name or not at all. Rows are checked by `schema` whenever they are read, tensors by their digest.
"""

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from veratune.bank.connection import (
    HeldConnection,
    Signature,
    allow_tensors,
    check_regular,
    connect,
    explained,
    publish_bank,
)
from veratune.bank.layout import AdapterRow, BankError, Layout, digest_of_bytes, scheme_from_json
from veratune.bank.schema import (
    BankHeader,
    DamagedError,
    StoredAdapter,
    check_spelling,
    checksum_bytes,
    header_values,
    mark,
    mark_of_all,
    metadata_of,
    read_adapter,
    read_header,
)
from veratune.bank.tables import NO_STATE, header_row, read_all, read_state, snapshot, write_tables
from veratune.utils.atomic import is_there, temporary_beside
from veratune.utils.tensors import bytes_of


class AdapterGoneError(BankError):
    """An adapter that the file no longer has, as another process has removed or replaced it."""


@dataclass
class _Change:
    """A transaction in progress."""

    connection: sqlite3.Connection
    checksum: int


class BankStore:
    """An open bank file. Several processes may read it while one of them, at a time, writes.

    Attributes:
        path: the file.
        header: the layout and dtypes of all adapters.
        adapters: digest to adapter, without tensors.
        names: name to digest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapters: dict[str, StoredAdapter] = {}
        self.names: dict[str, str] = {}
        self._file = Path(os.path.realpath(path))
        self._lock = threading.RLock()  # held briefly, to read
        self._write_lock = threading.Lock()  # held while waiting for the disk
        self._reader, self._writer = HeldConnection(write=False), HeldConnection(write=True)
        self._closing = weakref.finalize(self, _close, self._writer, self._reader)
        self._state = NO_STATE
        check_regular(self._file, path)
        self._inode = self._signature()[:2]
        try:
            connection = connect(self._file, path, write=False)
            self._reader.connection, self._reader.process = connection, os.getpid()
            self._reader.signature = self._signature()
            with explained(self.path, "read"):
                self._header_row = header_row(connection)
                self.header: BankHeader = read_header(*self._header_row)
            allow_tensors(connection, self.header.adapter_bytes, path)
            self.refresh()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, layout: Layout, dtype: torch.dtype, saved_dtype: torch.dtype | None) -> "BankStore":
        """Create a bank's file without adapters.

        Raises:
            BankError: a file of that name exists already, or cannot be created there.
        """
        try:
            header = header_values(layout.describe(), dtype, saved_dtype)
        except DamagedError as problem:
            raise BankError(f"{path} cannot be created: {problem}") from None
        temporary = temporary_beside(Path(os.path.realpath(path)))
        with explained(path, "created"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.touch(exist_ok=False)  # raises the reason, which SQLite does not report
                write_tables(temporary, header)
                cls(temporary).close()
                publish_bank(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return cls(path)

    def close(self) -> None:
        """Close the file; rows read from it stay valid."""
        with self._write_lock, self._lock:
            self._closing()

    # Reading

    def refresh(self) -> None:
        """Read the changes that other processes have made.

        Raises:
            BankError: the file is damaged, was replaced by another or is gone. What was read before is kept.
        """
        with self._lock, explained(self.path, "read"):
            connection = self._connection(self._reader)
            with snapshot(connection):
                state = read_state(connection)
                if state == self._state:
                    return
                adapters, names = read_all(connection, self.header, self.adapters)
            if checksum_bytes(mark_of_all(self._header_row, adapters.values(), names)) != state[1]:
                raise DamagedError("its names and adapters are not those that were written last")
            self.adapters, self.names, self._state = adapters, names, state

    def row(self, digest: str) -> AdapterRow:
        """Read an adapter and check it.

        Raises:
            BankError: no adapter has this digest, it is damaged, or this version draws its projections differently.
        """
        with explained(self.path, "read"):
            with self._lock:
                query = "SELECT metadata, vectors, saved FROM adapters WHERE digest = ?"
                found = self._connection(self._reader, even_replaced=True).execute(query, (digest,)).fetchone()
            if found is None:
                raise AdapterGoneError(f"{self.path} has no adapter {digest}: call refresh()")
            metadata, *tensors = found
            lengths = [len(tensor) if isinstance(tensor, bytes) else tensor for tensor in tensors]
            if lengths != [self.header.vector_bytes, self.header.saved_bytes]:
                raise DamagedError(f"the tensors of adapter {digest} are not as long as the bank's")
            stored = self.adapters.get(digest)
            if stored is None or stored.metadata != metadata:
                stored = read_adapter(digest, metadata, self.header)
            scheme = scheme_from_json(stored.scheme)
            if digest_of_bytes(scheme, self.header.dtype, filter(None, tensors)) != digest:
                raise DamagedError(f"the tensors of adapter {digest} have another digest")
            vectors = torch.frombuffer(bytearray(tensors[0]), dtype=self.header.dtype)
            saved = None
            if self.header.saved_dtype is not None:
                saved = torch.frombuffer(bytearray(tensors[1]), dtype=self.header.saved_dtype)
            return AdapterRow(digest, scheme, stored.rank, vectors, saved)

    def check_layout(self, layout: Layout) -> None:
        """Raise BankError unless the file is for a bank of this layout."""
        stored, wanted = self.header.layout, layout.describe()
        if stored == wanted:
            return
        if stored["rank"] != wanted["rank"]:
            detail = f"it has rank {stored['rank']}, not {wanted['rank']}"
        else:
            part = "layers" if stored["layers"] != wanted["layers"] else "modules_to_save"
            here, there = ({name: rest for name, *rest in x[part]} for x in (stored, wanted))
            odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            differing = f"{part} that differ in {', '.join(odd[:3])}{more}"
            detail = f"it has {differing}" if odd else f"its {part} are in another order"
        raise BankError(f"{self.path} is for a bank of another layout: {detail}")

    def check_dtypes(self, dtype: torch.dtype, saved_dtype: torch.dtype | None) -> None:
        """Raise BankError unless the file has vectors and values of modules_to_save of these dtypes."""
        for what, stored, wanted in (
            ("vectors", self.header.dtype, dtype),
            ("modules_to_save", self.header.saved_dtype, saved_dtype),
        ):
            if stored != wanted:
                raise BankError(f"{self.path} has {what} in {stored}, but this bank would use {wanted}")

    def sizes(self) -> tuple[int, int]:
        """Return how many bytes the file has, and how many of them wait to be used again."""
        with self._lock, explained(self.path, "read"):
            connection = self._connection(self._reader)
            with snapshot(connection):
                page, count, free = (
                    connection.execute(f"PRAGMA {what}").fetchone()[0]
                    for what in ("page_size", "page_count", "freelist_count")
                )
        return page * count, page * free

    def structural_problems(self) -> list[str]:
        """Return the problems that SQLite finds in the file's pages and indices."""
        with self._lock, explained(self.path, "read"):
            found = self._connection(self._reader).execute("PRAGMA integrity_check(20)").fetchall()
        return [str(line) for (line,) in found if line != "ok"]

    # Writing

    def add(self, name: str, row: AdapterRow, *, replacing: str | None) -> None:
        """Store an adapter, unless the file has it already, and point a name to it.

        Args:
            name: the name.
            row: the adapter.
            replacing: the digest that the name refers to now, or None if it is to be new. That adapter is deleted if no
                other name refers to it.

        Raises:
            BankError: the name does not refer to `replacing`, as another process has changed it, or the file cannot be
                written to. The file is unchanged then.
        """
        check_spelling(name)
        metadata = metadata_of(row)
        try:
            stored = read_adapter(row.digest, metadata, self.header)
        except DamagedError as problem:
            raise BankError(f"{self.path} cannot hold {name!r}: {problem}") from None
        tensors = bytes_of(row.vectors), None if row.saved is None else bytes_of(row.saved)
        with self._changing() as change:
            execute = change.connection.execute
            self._check_unchanged(change, name, replacing)
            if replacing is None:
                execute("INSERT INTO names (name, digest) VALUES (?, ?)", (name, row.digest))
            else:
                execute("UPDATE names SET digest = ? WHERE name = ?", (row.digest, name))
                change.checksum ^= mark("name", name, replacing)
            change.checksum ^= mark("name", name, row.digest)
            found = execute("SELECT vectors, saved FROM adapters WHERE digest = ?", (row.digest,)).fetchone()
            if found is None:
                insert = "INSERT INTO adapters (digest, metadata, vectors, saved) VALUES (?, ?, ?, ?)"
                execute(insert, (row.digest, metadata, *tensors))
                change.checksum ^= mark("adapter", row.digest, metadata)
            elif found != tensors:  # damaged
                execute("UPDATE adapters SET vectors = ?, saved = ? WHERE digest = ?", (*tensors, row.digest))
            self._drop(change, replacing)
        with self._lock:
            self.adapters.setdefault(row.digest, stored)
            self.names[name] = row.digest

    def remove(self, name: str, digest: str) -> None:
        """Remove a name, and its adapter if no other name refers to it.

        Raises:
            BankError: as for `add`.
        """
        with self._changing() as change:
            self._check_unchanged(change, name, digest)
            change.connection.execute("DELETE FROM names WHERE name = ?", (name,))
            change.checksum ^= mark("name", name, digest)
            self._drop(change, digest)
        with self._lock:
            self.names.pop(name, None)

    def compact(self) -> None:
        """Return the space of removed adapters to the disk.

        Raises:
            BankError: the file cannot be written to; it is unchanged then.
        """
        with self._writing() as connection:
            connection.execute("VACUUM")

    def _check_unchanged(self, change: _Change, name: str, expected: str | None) -> None:
        found = change.connection.execute("SELECT digest FROM names WHERE name = ?", (name,)).fetchone()
        if found != (None if expected is None else (expected,)):
            raise BankError(
                f"{name!r} was changed in {self.path} by another process meanwhile: call refresh() and try again"
            )

    def _drop(self, change: _Change, digest: str | None) -> None:
        """Delete an adapter if no name refers to it."""
        execute = change.connection.execute
        if digest is None or execute("SELECT 1 FROM names WHERE digest = ?", (digest,)).fetchone():
            return
        for (metadata,) in execute("SELECT metadata FROM adapters WHERE digest = ?", (digest,)).fetchall():
            execute("DELETE FROM adapters WHERE digest = ?", (digest,))
            change.checksum ^= mark("adapter", digest, metadata)

    @contextmanager
    def _changing(self) -> Iterator[_Change]:
        """Run a transaction, which is rolled back on an exception."""
        with self._writing() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                before = read_state(connection)
                change = _Change(connection, int.from_bytes(before[1], "big"))
                yield change
                after = before[0] + 1, checksum_bytes(change.checksum)
                connection.execute("UPDATE bank SET changes = ?, checksum = ?", after)
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
        with self._lock:
            if self._state == before:
                self._state = after

    # Connections

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock, explained(self.path, "written to"):
            connection = self._connection(self._writer)
            before = self._writer.signature
            yield connection
            after = self._signature()
            with self._lock:
                for held in (self._reader, self._writer):
                    if held.signature == before:
                        held.signature = after  # SQLite has noticed its own change

    def _connection(self, held: HeldConnection, *, even_replaced: bool = False) -> sqlite3.Connection:
        """Return the reading or the writing connection; the caller holds its lock.

        Raises:
            BankError: the file was closed, is gone, or was replaced.
        """
        if not self._closing.alive:
            raise BankError(f"{self.path} has been closed")
        if held.process != os.getpid():
            held.close()
        try:
            signature = self._signature()
            if signature[:2] != self._inode:
                raise BankError(f"{self.path} was replaced by another file meanwhile: open it again")
        except BankError:
            # The open file can still be read, unless SQLite would apply the other file's journal to it.
            if even_replaced and held.connection is not None and not os.path.lexists(f"{self._file}-journal"):
                return held.connection
            raise
        if held.connection is not None and held.signature == signature:
            return held.connection
        # Another process has changed it. SQLite detects that by a few numbers in the file, which may be the same in
        # another bank that was copied over it.
        held.close()
        connection = connect(self._file, self.path, write=held.write)
        try:
            if header_row(connection) != self._header_row:
                raise BankError(f"{self.path} was overwritten with another bank meanwhile: open it again")
            allow_tensors(connection, self.header.adapter_bytes, self.path)
        except BaseException:
            connection.close()
            raise
        held.connection, held.process, held.signature = connection, os.getpid(), signature
        return connection

    def _signature(self) -> Signature:
        try:
            status = self._file.stat()
        except OSError as error:
            raise BankError(f"{self.path} cannot be read any more: {error.strerror}") from None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_store(path: Path, layout: Layout, dtype: torch.dtype, saved_dtype: torch.dtype | None) -> BankStore:
    """Open a bank's file, or create it if it does not exist.

    Raises:
        BankError: the file is damaged, has another layout or dtype, or cannot be created.
    """
    if not is_there(path):
        try:
            return BankStore.create(path, layout, dtype, saved_dtype)
        except BankError:
            if not is_there(path):
                raise  # otherwise another process has just created it
    store = BankStore(path)
    try:
        store.check_layout(layout)
        store.check_dtypes(dtype, saved_dtype)
    except BankError:
        store.close()
        raise
    return store


def _close(*held: HeldConnection) -> None:
    for each in held:
        each.close()
