"""Create and read a bank's tables; rows are checked before they are returned."""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from veratune.bank.schema import (
    APPLICATION_ID,
    TABLES,
    VERSION,
    BankHeader,
    DamagedError,
    StoredAdapter,
    checksum_bytes,
    is_name,
    mark_of_all,
    read_adapter,
)

HeaderRow = tuple[str, str, str | None]  # layout, dtype and saved_dtype
State = tuple[int, bytes]  # how many changes were made, and the checksum

NO_STATE: State = (-1, b"")


def write_tables(path: Path, header: HeaderRow) -> None:
    """Create a bank's tables in an empty file, and wait until they are on the disk."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None)
    try:
        for setting in (f"application_id={APPLICATION_ID}", f"user_version={VERSION}", "journal_mode=OFF"):
            connection.execute(f"PRAGMA {setting}").fetchall()
        connection.execute("BEGIN")
        for sql in TABLES.values():
            connection.execute(sql)
        checksum = checksum_bytes(mark_of_all(header, (), {}))
        connection.execute("INSERT INTO bank VALUES (?, ?, ?, 0, ?)", (*header, checksum))
        connection.execute("COMMIT")
    finally:
        connection.close()


def header_row(connection: sqlite3.Connection) -> HeaderRow:
    """Return the arguments of `read_header`.

    Raises:
        DamagedError: there is not exactly one row.
    """
    rows = connection.execute("SELECT layout, dtype, saved_dtype FROM bank LIMIT 2").fetchall()
    if len(rows) != 1:
        raise DamagedError("it does not describe a bank")
    row: HeaderRow = rows[0]
    return row


def read_state(connection: sqlite3.Connection) -> State:
    """Return the number of changes and the checksum, which identify a state of the file.

    Raises:
        DamagedError: they are invalid.
    """
    rows = connection.execute("SELECT changes, checksum FROM bank LIMIT 2").fetchall()
    if [tuple(map(type, row)) for row in rows] != [(int, bytes)] or len(rows[0][1]) != len(checksum_bytes(0)):
        raise DamagedError("its checksum cannot be read")
    state: State = rows[0]
    return state


def read_all(
    connection: sqlite3.Connection, header: BankHeader, known: Mapping[str, StoredAdapter]
) -> tuple[dict[str, StoredAdapter], dict[str, str]]:
    """Return all adapters by digest, and the digests of all names in the order in which they were added.

    Args:
        connection: to the file.
        header: the file's header.
        known: adapters that were read before.

    Raises:
        DamagedError: a row that is inconsistent, or contradicts another one.
    """
    adapters: dict[str, StoredAdapter] = {}
    for digest, metadata in _rows(connection, "SELECT id, digest, metadata FROM adapters ORDER BY id"):
        before = known.get(digest)
        same = before is not None and before.metadata == metadata
        adapters[digest] = before if before is not None and same else read_adapter(digest, metadata, header)
    names: dict[str, str] = {}
    for name, digest in _rows(connection, "SELECT id, name, digest FROM names ORDER BY id"):
        if not is_name(name):
            raise DamagedError("it has an invalid name")
        if digest not in adapters:
            raise DamagedError(f"{name!r} refers to an adapter that is not in the file")
        names[name] = digest
    return adapters, names


def _rows(connection: sqlite3.Connection, query: str) -> Iterator[tuple[str, str]]:
    """Yield the rows of a query for an id and two texts, without the id.

    Ids must increase, as pages of a damaged file may form a cycle.

    Raises:
        DamagedError: ids do not increase, or a value is not text.
    """
    last = None
    for number, first, second in connection.execute(query):
        if (last is not None and number <= last) or not isinstance(first, str) or not isinstance(second, str):
            raise DamagedError("its rows are out of order, or not text")
        last = number
        yield first, second


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Make all statements read the same state of the file."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
