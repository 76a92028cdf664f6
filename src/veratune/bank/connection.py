"""Open an SQLite file that may be damaged or malicious, and turn SQLite's error codes into clear messages.

The file uses SQLite's rollback journal, not its write-ahead log. The log would keep changes in a second file, which is
easily forgotten in copies, and SQLite would apply it to any file that replaces the first (see
docs/adr/0006-bank-in-sqlite.md).
"""

import os
import sqlite3
import stat
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from veratune.bank.layout import BankError
from veratune.bank.schema import APPLICATION_ID, TABLES, VERSION, DamagedError
from veratune.utils.atomic import publish

PATIENCE = 30.0  # seconds to wait for other processes
REMEDY = "Restore a copy, or rebuild it from the adapters' directories"

# A connection must not be used or closed in a process that was forked from the one that opened it.
_of_other_processes: list[sqlite3.Connection] = []

# Identifies a file and its contents: device, inode, size and modification time.
Signature = tuple[int, int, int, int]

# Larger than any text in a bank file; `allow_tensors` raises the limit once the layout is known.
_LONGEST_TEXT = 1 << 24


@dataclass
class _Held:
    """A connection that is kept open, and the file's signature when it was last used."""

    write: bool
    connection: sqlite3.Connection | None = None
    process: int = 0
    signature: Signature | None = None

    def close(self) -> None:
        """Close the connection; in a forked process, leave it open."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        if self.process == os.getpid():
            connection.close()
        else:
            _of_other_processes.append(connection)


class FileConnections:
    """A connection for reading a file and one for writing it; both are reopened when the file has changed.

    Attributes:
        path: the path given by the user, for error messages.
        check: called with each new connection.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.check: Callable[[sqlite3.Connection], None] = lambda connection: None
        self._file = Path(os.path.realpath(path))
        self._lock = threading.Lock()  # guards the signatures
        self._reader, self._writer = _Held(write=False), _Held(write=True)
        self._closing = weakref.finalize(self, _close, self._writer, self._reader)
        check_regular(self._file, path)
        self._inode = self._signature()[:2]

    def close(self) -> None:
        """Close both connections; the caller must ensure that neither is in use."""
        self._closing()

    def reader(self, *, even_replaced: bool = False) -> sqlite3.Connection:
        """Return the connection for reading; only one thread at a time may use it.

        Args:
            even_replaced: whether to keep reading the open file after it was deleted or replaced.

        Raises:
            BankError: the file was closed, deleted, replaced or overwritten.
        """
        return self._current(self._reader, even_replaced=even_replaced)

    @contextmanager
    def writer(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection for writing. Only one thread at a time may use it; its change must end in the context.

        Raises:
            BankError: as for `reader`.
        """
        connection = self._current(self._writer)
        before = self._writer.signature
        yield connection
        after = self._signature()
        with self._lock:
            for held in (self._reader, self._writer):
                if held.signature == before:
                    held.signature = after  # SQLite itself tracks changes made through it

    def _current(self, held: _Held, *, even_replaced: bool = False) -> sqlite3.Connection:
        if not self._closing.alive:
            raise BankError(f"{self.path} has been closed")
        if held.process != os.getpid():
            held.close()
        try:
            signature = self._signature()
            if signature[:2] != self._inode:
                raise BankError(f"{self.path} has been replaced by another file: open it again")
        except BankError:
            # The open file can still be read, unless SQLite would apply the other file's journal to it.
            if even_replaced and held.connection is not None and not os.path.lexists(f"{self._file}-journal"):
                return held.connection
            raise
        if held.connection is not None and held.signature == signature:
            return held.connection
        # Another process has changed the file. SQLite detects changes by a few counters in the file, which may be
        # equal in another bank that was copied over it.
        held.close()
        connection = connect(self._file, self.path, write=held.write)
        try:
            self.check(connection)
        except BaseException:
            connection.close()
            raise
        held.connection, held.process = connection, os.getpid()
        with self._lock:
            held.signature = signature
        return connection

    def _signature(self) -> Signature:
        try:
            status = self._file.stat()
        except OSError as error:
            raise BankError(f"{self.path} can no longer be read: {error.strerror}") from None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _close(*held: _Held) -> None:
    for each in held:
        each.close()


def connect(path: Path, shown: Path, *, write: bool) -> sqlite3.Connection:
    """Open a file and check that it is a bank file; nothing in it is executed.

    Args:
        path: the file's absolute path, without symbolic links.
        shown: the path given by the user, for error messages.
        write: whether to allow changes.

    Raises:
        BankError: the file is not a bank file, or cannot be opened.
    """
    check_regular(path, shown)
    if os.path.lexists(f"{path}-wal"):
        raise BankError(
            f"{path}-wal exists, but a bank has no write-ahead log, and SQLite would apply it to {shown}. If another"
            " program has the bank open, close that program; otherwise, delete the log"
        )
    with explained(shown, "opened"):
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode=rw", uri=True, timeout=PATIENCE, isolation_level=None, check_same_thread=False
        )
    try:
        with explained(shown, "opened"):
            _prepare(connection, shown, write=write)
    except BaseException as error:
        connection.close()
        if isinstance(error, NotSQLiteError) and _is_of_the_first_format(path):
            raise BankError(
                f"{shown} is a bank file in the first format, which is no longer supported: rebuild it from the"
                " adapters' directories"
            ) from None
        raise
    return connection


class NotSQLiteError(BankError):
    """The file is not an SQLite database."""


def check_regular(path: Path, shown: Path) -> None:
    """Raise BankError unless this is a regular file: opening a named pipe would block until it has a writer."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise BankError(f"{shown} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise BankError(f"{shown} is {what}: pass a bank file")


def allow_tensors(connection: sqlite3.Connection, count: int, shown: Path) -> None:
    """Set SQLite's limit on the size of values so that tensors of `count` bytes fit.

    Raises:
        BankError: SQLite does not support values of this size.
    """
    wanted = count + _LONGEST_TEXT
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, wanted)
    if connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) < wanted:
        raise BankError(
            f"{shown}: a bank file cannot hold adapters of {count} bytes: create the bank without a file, or without"
            " modules_to_save"
        )


class explained:  # noqa: N801  # entered for each adapter that is read; much faster than a generator
    """Convert SQLite errors, OS errors and damaged contents to BankError: "{shown} cannot be {action}: ..."."""

    def __init__(self, shown: Path, action: str) -> None:
        self._shown = shown
        self._action = action

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        match error:
            case DamagedError():
                raise _damaged(self._shown, error) from None
            case UnicodeDecodeError():  # raised for an SQLite message that quotes the file
                raise _damaged(self._shown, "it contains text that is not UTF-8") from None
            case sqlite3.Error():
                raise _explanation(self._shown, self._action, error) from None
            case OSError():
                raise BankError(f"{self._shown} cannot be {self._action}: {error.strerror}") from None


def publish_bank(temporary: Path, path: Path) -> None:
    """Rename a complete file to its final path.

    Raises:
        BankError: a file of that name already exists, or the directory cannot be written to.
    """
    with explained(path, "created"):
        try:
            publish(temporary, path)
        except FileExistsError:
            raise BankError(f"{path} already exists") from None


def _damaged(shown: Path, what: object) -> BankError:
    """Return the error for a damaged file."""
    return BankError(f"{shown} is damaged: {what}. {REMEDY}")


def _explanation(shown: Path, action: str, error: sqlite3.Error) -> BankError:
    code = getattr(error, "sqlite_errorcode", None)
    text = str(error) if str(error).isprintable() else ascii(str(error))[1:-1]  # SQLite may quote the file
    unchanged = "; the file is unchanged" if action == "written to" else ""
    match None if code is None else code & 0xFF:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return BankError(
                f"{shown} cannot be {action}: another process has kept it locked for {PATIENCE:.0f} s. Try again when"
                " that process has finished"
            )
        case sqlite3.SQLITE_READONLY if code == sqlite3.SQLITE_READONLY_ROLLBACK:
            return BankError(
                f"{shown} cannot be {action}: a process was killed while writing, and rolling back its change requires"
                " permission to write to the file. Open the file once as a user with that permission"
            )
        case sqlite3.SQLITE_READONLY:
            return BankError(f"{shown} cannot be {action}: Permission denied")
        case sqlite3.SQLITE_CANTOPEN if action == "written to":
            return BankError(
                f"{shown} cannot be written to: its journal, {shown}-journal, cannot be created. Permission to"
                " write to the directory is required as well"
            )
        case sqlite3.SQLITE_NOTADB:
            return NotSQLiteError(f"{shown} is not a bank file")
        case sqlite3.SQLITE_FULL:
            return BankError(f"{shown} cannot be {action}: No space left on disk{unchanged}")
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_IOERR:
            return BankError(f"{shown} cannot be {action}: {text}{unchanged}")
        case _:  # damage, including invalid UTF-8, which has no error code
            return _damaged(shown, text)


def _prepare(connection: sqlite3.Connection, shown: Path, *, write: bool) -> None:
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_TEXT)
    for setting in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0"):
        connection.execute(f"PRAGMA {setting}").fetchall()
    # These values are in the file's header; no table is read before they are checked.
    if connection.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
        raise BankError(f"{shown} is not a bank file")
    ((version,),) = connection.execute("PRAGMA user_version")
    if version != VERSION:
        raise BankError(f"{shown} has format version {version}; this version of veratune reads {VERSION}")
    if connection.execute("PRAGMA journal_mode").fetchone() != ("delete",):
        raise BankError(
            f"{shown} was switched to SQLite's write-ahead log by another program: switch it back with"
            ' "PRAGMA journal_mode=DELETE"'
        )
    _check_tables(connection)
    if write:
        # A commit returns once the change and the deletion of its journal are on disk.
        connection.execute("PRAGMA synchronous=EXTRA").fetchall()
    else:
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.execute("PRAGMA query_only=ON").fetchall()


def _check_tables(connection: sqlite3.Connection) -> None:
    """Reject views, triggers, virtual tables, and tables with unexpected columns."""
    expected: set[tuple[str, str, str, str | None]] = {("table", name, name, sql) for name, sql in TABLES.items()}
    expected |= {("index", f"sqlite_autoindex_{name}_1", name, None) for name in ("adapters", "names")}
    found = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT 9").fetchall()
    if len(found) != len(expected) or set(found) != expected:
        raise DamagedError("it does not have the tables of a bank")


def _is_of_the_first_format(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as handle:
        return handle.read(8) == b"VERABANK"
    return False
