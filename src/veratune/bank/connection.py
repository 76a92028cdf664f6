"""Open an SQLite file that may be damaged or malicious, and explain SQLite's error codes.

The journal is SQLite's rollback journal, not its write-ahead log: a log would keep changes in a second file, which
copies omit and which SQLite would apply to any file put in the first one's place (docs/adr/0006-bank-in-sqlite.md).
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
REMEDY = "Put back a copy of it, or build it again from the adapters' directories"

# A connection must not be used or closed in a process that was forked from the one that opened it.
_of_other_processes: list[sqlite3.Connection] = []

# Identifies a file and its contents: device, inode, size and modification time.
Signature = tuple[int, int, int, int]

# More than any text in a bank's file; `allow_tensors` raises the limit once the layout is known.
_LONGEST_TEXT = 1 << 24


@dataclass
class _Held:
    """A connection that is kept open, and the file's signature when it was last used."""

    write: bool
    connection: sqlite3.Connection | None = None
    process: int = 0
    signature: Signature | None = None

    def close(self) -> None:
        """Close the connection, or in a forked process leave it alone."""
        connection, self.connection = self.connection, None
        if connection is None:
            return
        if self.process == os.getpid():
            connection.close()
        else:
            _of_other_processes.append(connection)


class FileConnections:
    """The connections to one file, one for reading and one for writing, which are reopened when it has changed.

    Attributes:
        path: the path that the user gave, for messages.
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
        """Close both; the caller must ensure that neither is in use."""
        self._closing()

    def reader(self, *, even_replaced: bool = False) -> sqlite3.Connection:
        """Return the connection for reading; only one thread at a time may call this and use it.

        Args:
            even_replaced: whether to keep reading an open file whose path is gone or now refers to another file.

        Raises:
            BankError: the file was closed, deleted, replaced or overwritten.
        """
        return self._current(self._reader, even_replaced=even_replaced)

    @contextmanager
    def writer(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection for writing; only one thread at a time may call this, and must finish its change inside.

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
                    held.signature = after  # SQLite notices its own changes

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
        # Another process has changed it. SQLite detects that by a few numbers in the file, which may be the same in
        # another bank that was copied over it.
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
            raise BankError(f"{self.path} cannot be read any more: {error.strerror}") from None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _close(*held: _Held) -> None:
    for each in held:
        each.close()


def connect(path: Path, shown: Path, *, write: bool) -> sqlite3.Connection:
    """Open a file and check that it is a bank's; nothing in it is executed.

    Args:
        path: the file, absolute and without symbolic links.
        shown: the path that the user gave, for messages.
        write: whether to allow changes.

    Raises:
        BankError: the file is not a bank's, or cannot be opened.
    """
    check_regular(path, shown)
    if os.path.lexists(f"{path}-wal"):
        raise BankError(
            f"{path}-wal exists, which no bank has: SQLite would apply it to {shown}. If another program has the"
            " bank open, close it; otherwise remove that file"
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
                f"{shown} is a bank's file in the first format, which is no longer supported: build it again from the"
                " adapters' directories"
            ) from None
        raise
    return connection


class NotSQLiteError(BankError):
    """The file is not a database."""


def check_regular(path: Path, shown: Path) -> None:
    """Raise BankError unless this is a regular file: opening a pipe would block until there is a writer."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise BankError(f"{shown} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise BankError(f"{shown} is {what}, not a bank's file")


def allow_tensors(connection: sqlite3.Connection, count: int, shown: Path) -> None:
    """Limit values to this many bytes.

    Raises:
        BankError: SQLite does not support values of this size.
    """
    wanted = count + _LONGEST_TEXT
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, wanted)
    if connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) < wanted:
        raise BankError(
            f"{shown}: a bank's file cannot hold adapters of {count} bytes: use a bank in memory, or one without"
            " modules_to_save"
        )


class explained:  # noqa: N801  # used for each adapter that is read; much faster than a generator
    """Convert errors from SQLite and the system, and damaged content, to BankError: `shown` "cannot be" `action`."""

    def __init__(self, shown: Path, action: str) -> None:
        self._shown = shown
        self._action = action

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        match error:
            case DamagedError():
                raise _damaged(self._shown, error) from None
            case UnicodeDecodeError():  # in a message that quotes the file
                raise _damaged(self._shown, "it contains text that is not UTF-8") from None
            case sqlite3.Error():
                raise _explanation(self._shown, self._action, error) from None
            case OSError():
                raise BankError(f"{self._shown} cannot be {self._action}: {error.strerror}") from None


def publish_bank(temporary: Path, path: Path) -> None:
    """Rename a finished file to its path.

    Raises:
        BankError: a file of that name exists, or the directory cannot be written to.
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
    text = str(error) if str(error).isprintable() else ascii(str(error))[1:-1]  # it may quote the file
    unchanged = "; it is unchanged" if action == "written to" else ""
    match None if code is None else code & 0xFF:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return BankError(
                f"{shown} cannot be {action}: another process has locked it for {PATIENCE:.0f} s. Try again when it has"
                " finished"
            )
        case sqlite3.SQLITE_READONLY if code == sqlite3.SQLITE_READONLY_ROLLBACK:
            return BankError(
                f"{shown} cannot be {action}: a process was killed while writing, and rolling its change back needs"
                " permission to write to the file. Open it once as a user who has it"
            )
        case sqlite3.SQLITE_READONLY:
            return BankError(f"{shown} cannot be {action}: Permission denied")
        case sqlite3.SQLITE_CANTOPEN if action == "written to":
            return BankError(
                f"{shown} cannot be written to: its journal, {shown}-journal, cannot be created. You need permission to"
                " write to the directory as well"
            )
        case sqlite3.SQLITE_NOTADB:
            return NotSQLiteError(f"{shown} is not a bank's file")
        case sqlite3.SQLITE_FULL:
            return BankError(f"{shown} cannot be {action}: No space left on the disk{unchanged}")
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_IOERR:
            return BankError(f"{shown} cannot be {action}: {text}{unchanged}")
        case _:  # damage, including text that is not UTF-8, for which there is no code
            return _damaged(shown, text)


def _prepare(connection: sqlite3.Connection, shown: Path, *, write: bool) -> None:
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_TEXT)
    for setting in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0"):
        connection.execute(f"PRAGMA {setting}").fetchall()
    # These come from the file's first bytes; no table is read before they are checked.
    if connection.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
        raise BankError(f"{shown} is not a bank's file")
    ((version,),) = connection.execute("PRAGMA user_version")
    if version != VERSION:
        raise BankError(f"{shown} has format version {version}; this veratune reads {VERSION}")
    if connection.execute("PRAGMA journal_mode").fetchone() != ("delete",):
        raise BankError(
            f"{shown} was put into SQLite's write-ahead mode by another program: undo that with"
            ' "PRAGMA journal_mode=DELETE"'
        )
    _check_tables(connection)
    if write:
        # A change is reported as done once it, and the end of its journal, are on the disk.
        connection.execute("PRAGMA synchronous=EXTRA").fetchall()
    else:
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.execute("PRAGMA query_only=ON").fetchall()


def _check_tables(connection: sqlite3.Connection) -> None:
    """Refuse views, triggers, virtual tables, and tables with other columns."""
    expected: set[tuple[str, str, str, str | None]] = {("table", name, name, sql) for name, sql in TABLES.items()}
    expected |= {("index", f"sqlite_autoindex_{name}_1", name, None) for name in ("adapters", "names")}
    found = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT 9").fetchall()
    if len(found) != len(expected) or set(found) != expected:
        raise DamagedError("its tables are not those of a bank")


def _is_of_the_first_format(path: Path) -> bool:
    with suppress(OSError), path.open("rb") as handle:
        return handle.read(8) == b"VERABANK"
    return False
