"""A bank file: an SQLite database of immutable adapters, keyed by digest, and of the names that refer to them.

Each change is one transaction: if a process is killed, the file is in the state before or after the change, and readers
never see part of a change. Whenever rows are read, `schema` checks them, and tensors are checked against their digest.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from veratune.bank.connection import (
    FileConnections,
    allow_tensors,
    explained,
    publish_bank,
)
from veratune.bank.layout import AdapterRow, BankError, Layout, digest_of_bytes
from veratune.bank.schema import (
    BankHeader,
    DamagedError,
    Metadata,
    check_spelling,
    checksum_bytes,
    header_values,
    mark,
    mark_of_all,
    mark_of_rows,
    metadata_of,
    read_header,
    read_metadata,
    scheme_of,
)
from veratune.bank.tables import (
    NO_STATE,
    Contents,
    HeaderRow,
    State,
    header_row,
    read_contents,
    read_state,
    snapshot,
    write_tables,
)
from veratune.utils.atomic import is_there, temporary_beside
from veratune.utils.tensors import bytes_of


class AdapterGoneError(BankError):
    """The adapter is no longer in the file, because another process has removed or replaced it."""


class _AbandonedError(Exception):
    """Roll back a batch because of another error, which is then raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@dataclass
class _Change:
    """A transaction in progress.

    Attributes:
        connection: the connection that writes.
        checksum: the file's checksum after the statements so far.
        last: the largest ids after the statements so far.
    """

    connection: sqlite3.Connection
    checksum: int
    last: tuple[int, int]


class BankStore:
    """An open bank file. Several processes may read it while one at a time writes.

    Attributes:
        path: the file.
        header: the layout and dtypes of all adapters.
        adapters: digest to metadata.
        names: name to digest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapters: dict[str, Metadata] = {}
        self.names: dict[str, str] = {}
        self._lock = threading.RLock()  # held briefly, for reads
        self._write_lock = threading.Lock()  # held while waiting for the disk
        self._state = NO_STATE
        # The largest ids in `_state`; None if `names` belongs to another state.
        self._last: tuple[int, int] | None = None
        self._batch: _Change | None = None
        self._connections = FileConnections(path)
        try:
            with explained(self.path, "read"):
                connection = self._connections.reader()
                self._header_row = header_row(connection)
                self.header: BankHeader = read_header(*self._header_row)
            allow_tensors(connection, self.header.adapter_bytes, path)
            self._connections.check = partial(_check_header, self._header_row, self.header, path)
            self.refresh()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, layout: Layout, dtype: torch.dtype, saved_dtype: torch.dtype | None) -> "BankStore":
        """Create a bank file without adapters.

        Raises:
            BankError: a file of that name already exists, or cannot be created.
        """
        try:
            header = header_values(layout.describe(), dtype, saved_dtype)
        except DamagedError as problem:
            raise BankError(f"{path} cannot be created: {problem}") from None
        temporary = temporary_beside(Path(os.path.realpath(path)))
        with explained(path, "created"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.touch(exist_ok=False)  # raises an error with the reason, which SQLite does not report
                write_tables(temporary, header)
                cls(temporary).close()
                publish_bank(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return cls(path)

    def close(self) -> None:
        """Close the file; rows read from it remain valid."""
        with self._write_lock, self._lock:
            self._connections.close()

    # Reading

    def refresh(self) -> None:
        """Read the changes that other processes have made.

        Raises:
            BankError: the file is damaged, replaced or deleted. The contents read before are kept.
        """
        with self._lock, explained(self.path, "read"):
            connection = self._connections.reader()
            with snapshot(connection):
                state = read_state(connection)
                if state == self._state:
                    return
                contents = self._contents(connection, state)
            self.adapters, self.names = contents.adapters, contents.names
            self._state, self._last = state, contents.last

    def _contents(self, connection: sqlite3.Connection, state: State) -> Contents:
        """Read the rows added since the last refresh or, if anything else has changed, all rows."""
        if self._last is not None:
            with suppress(DamagedError):  # a new row may refer to a changed one
                added = read_contents(connection, self.header, self.adapters, self._last)
                marks = int.from_bytes(self._state[1], "big") ^ mark_of_rows(*added.marks())
                if checksum_bytes(marks) == state[1]:
                    return Contents(self.adapters | added.adapters, self.names | added.names, added.last)
        contents = read_contents(connection, self.header, self.adapters, None)
        if checksum_bytes(mark_of_all(self._header_row, *contents.marks())) != state[1]:
            raise DamagedError("its names and adapters do not match its checksum")
        return contents

    def row(self, digest: str) -> AdapterRow:
        """Read and check an adapter.

        Raises:
            BankError: no adapter has this digest, its row is damaged, or this version of veratune draws its projections
                differently.
        """
        with explained(self.path, "read"):
            with self._lock:
                query = "SELECT metadata, vectors, saved FROM adapters WHERE digest = ?"
                found = self._connections.reader(even_replaced=True).execute(query, (digest,)).fetchone()
            if found is None:
                raise AdapterGoneError(f"{self.path} has no adapter {digest}: call refresh()")
            text, *tensors = found
            lengths = [len(tensor) if isinstance(tensor, bytes) else tensor for tensor in tensors]
            if lengths != [self.header.vector_bytes, self.header.saved_bytes]:
                raise DamagedError(f"the tensors of adapter {digest} do not have the size that the bank requires")
            metadata = self.adapters.get(digest)
            if metadata is None or metadata.text != text:
                metadata = read_metadata(digest, text, self.header)
            scheme = scheme_of(text)
            if digest_of_bytes(scheme, self.header.dtype, filter(None, tensors)) != digest:
                raise DamagedError(f"the tensors of adapter {digest} do not match its digest")
            vectors = torch.frombuffer(bytearray(tensors[0]), dtype=self.header.dtype)
            saved = None
            if self.header.saved_dtype is not None:
                saved = torch.frombuffer(bytearray(tensors[1]), dtype=self.header.saved_dtype)
            return AdapterRow(digest, scheme, metadata.rank, vectors, saved)

    def check_layout(self, layout: Layout) -> None:
        """Raise BankError unless the file is for a bank with this layout."""
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
        raise BankError(f"{self.path} is for a bank with another layout: {detail}")

    def check_dtypes(self, dtype: torch.dtype, saved_dtype: torch.dtype | None) -> None:
        """Raise BankError unless the file's vectors and values of modules_to_save have these dtypes."""
        for what, stored, wanted in (
            ("vectors", self.header.dtype, dtype),
            ("modules_to_save", self.header.saved_dtype, saved_dtype),
        ):
            if stored != wanted:
                raise BankError(f"{self.path} stores {what} in {stored}, but this bank uses {wanted}")

    def sizes(self) -> tuple[int, int]:
        """Return the file's size and the free space in it, in bytes."""
        with self._lock, explained(self.path, "read"):
            connection = self._connections.reader()
            with snapshot(connection):
                page, count, free = (
                    connection.execute(f"PRAGMA {what}").fetchone()[0]
                    for what in ("page_size", "page_count", "freelist_count")
                )
        return page * count, page * free

    def structural_problems(self) -> list[str]:
        """Return the problems that SQLite finds in the file's pages and indices."""
        with self._lock, explained(self.path, "read"):
            found = self._connections.reader().execute("PRAGMA integrity_check(20)").fetchall()
        return [str(line) for (line,) in found if line != "ok"]

    # Writing

    def add(self, name: str, row: AdapterRow, *, replacing: str | None) -> None:
        """Store an adapter, unless the file already has it, and bind a name to it.

        Args:
            name: the name.
            row: the adapter.
            replacing: the digest that the name currently refers to, or None for a new name. The adapter with this
                digest is deleted if no other name refers to it.

        Raises:
            BankError: another process has changed the name, so it does not refer to `replacing`, or the file cannot be
                written to. The file is unchanged.
        """
        check_spelling(name)
        text = metadata_of(row)
        try:
            metadata = read_metadata(row.digest, text, self.header)
        except DamagedError as problem:
            raise BankError(f"{self.path} cannot hold {name!r}: {problem}") from None
        tensors = bytes_of(row.vectors), None if row.saved is None else bytes_of(row.saved)
        with self._changing() as change:
            execute = change.connection.execute
            self._check_unchanged(change, name, replacing)
            if replacing is None:
                number = execute("INSERT INTO names (name, digest) VALUES (?, ?)", (name, row.digest)).lastrowid
                change.last = change.last[0], max(change.last[1], number or 0)
            else:
                execute("UPDATE names SET digest = ? WHERE name = ?", (row.digest, name))
                change.checksum ^= mark("name", name, replacing)
            change.checksum ^= mark("name", name, row.digest)
            found = execute("SELECT vectors, saved FROM adapters WHERE digest = ?", (row.digest,)).fetchone()
            if found is None:
                insert = "INSERT INTO adapters (digest, metadata, vectors, saved) VALUES (?, ?, ?, ?)"
                number = execute(insert, (row.digest, text, *tensors)).lastrowid
                change.last = max(change.last[0], number or 0), change.last[1]
                change.checksum ^= mark("adapter", row.digest, text)
            elif found != tensors:  # the stored tensors are damaged
                execute("UPDATE adapters SET vectors = ?, saved = ? WHERE digest = ?", (*tensors, row.digest))
            self._drop(change, replacing)
        with self._lock:
            self.adapters.setdefault(row.digest, metadata)
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
        """Return the space of removed adapters to the file system.

        Raises:
            BankError: the file cannot be written to. It is unchanged.
        """
        with self._write_lock, explained(self.path, "written to"), self._connections.writer() as connection:
            connection.execute("VACUUM")

    def _check_unchanged(self, change: _Change, name: str, expected: str | None) -> None:
        found = change.connection.execute("SELECT digest FROM names WHERE name = ?", (name,)).fetchone()
        if found != (None if expected is None else (expected,)):
            raise BankError(
                f"{name!r} has been changed in {self.path} by another process: call refresh() and try again"
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
    def batch(self) -> Iterator[None]:
        """Make all changes in this context in one transaction, during which only the caller may use the store.

        On an exception, the file is unchanged, but `names` and `adapters` are not restored.
        """
        try:
            with self._changing() as change:
                self._batch = change
                try:
                    yield
                except Exception as error:  # unrelated to this file, so `explained` must not convert it
                    raise _AbandonedError(error) from error
                finally:
                    self._batch = None
        except _AbandonedError as abandoned:
            raise abandoned.error from None

    @contextmanager
    def _changing(self) -> Iterator[_Change]:
        """Run a transaction, which is rolled back on an exception; inside `batch`, yield the one in progress."""
        if self._batch is not None:
            with explained(self.path, "written to"):
                yield self._batch
            return
        with self._write_lock, explained(self.path, "written to"):
            with self._connections.writer() as connection:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    before = read_state(connection)
                    change = _Change(connection, int.from_bytes(before[1], "big"), self._last or (0, 0))
                    yield change
                    after = before[0] + 1, checksum_bytes(change.checksum)
                    connection.execute("UPDATE bank SET changes = ?, checksum = ?", after)
                    connection.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                    raise
            with self._lock:
                follows = self._last is not None and self._state == before
                self._state, self._last = (after, change.last) if follows else (self._state, None)


def _check_header(row: HeaderRow, header: BankHeader, path: Path, connection: sqlite3.Connection) -> None:
    """Raise BankError unless a new connection is to the same bank; allow values as large as the bank's tensors."""
    if header_row(connection) != row:
        raise BankError(f"{path} has been overwritten with another bank: open it again")
    allow_tensors(connection, header.adapter_bytes, path)


def open_store(path: Path, layout: Layout, dtype: torch.dtype, saved_dtype: torch.dtype | None) -> BankStore:
    """Open a bank file, or create it if it does not exist.

    Raises:
        BankError: the file is damaged, has another layout or dtype, or cannot be created.
    """
    if not is_there(path):
        try:
            return BankStore.create(path, layout, dtype, saved_dtype)
        except BankError:
            if not is_there(path):
                raise  # otherwise, another process has just created it
    store = BankStore(path)
    try:
        store.check_layout(layout)
        store.check_dtypes(dtype, saved_dtype)
    except BankError:
        store.close()
        raise
    return store
