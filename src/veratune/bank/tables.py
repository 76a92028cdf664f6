"""Create and read a bank's tables; rows are checked before they are returned."""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from veratune.bank.schema import (
    APPLICATION_ID,
    TABLES,
    VERSION,
    BankHeader,
    DamagedError,
    Metadata,
    check_digest,
    checksum_bytes,
    is_name,
    mark_of_all,
    read_metadata,
)

HeaderRow = tuple[str, str, str | None]  # layout, dtype and saved_dtype
State = tuple[int, bytes]  # the number of changes, and the checksum

NO_STATE: State = (-1, b"")


def write_tables(path: Path, header: HeaderRow) -> None:
    """Create a bank's tables in an empty file, and wait until they are on disk."""
    connection = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, isolation_level=None)
    try:
        for setting in (f"application_id={APPLICATION_ID}", f"user_version={VERSION}", "journal_mode=OFF"):
            connection.execute(f"PRAGMA {setting}").fetchall()
        connection.execute("BEGIN")
        for sql in TABLES.values():
            connection.execute(sql)
        checksum = checksum_bytes(mark_of_all(header, {}, {}))
        connection.execute("INSERT INTO bank VALUES (?, ?, ?, 0, ?)", (*header, checksum))
        connection.execute("COMMIT")
    finally:
        connection.close()


def header_row(connection: sqlite3.Connection) -> HeaderRow:
    """Return the row that describes the bank, as arguments for `read_header`.

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
        DamagedError: the values are invalid.
    """
    rows = connection.execute("SELECT changes, checksum FROM bank LIMIT 2").fetchall()
    if [tuple(map(type, row)) for row in rows] != [(int, bytes)] or len(rows[0][1]) != len(checksum_bytes(0)):
        raise DamagedError("its checksum cannot be read")
    state: State = rows[0]
    return state


@dataclass(frozen=True)
class Contents:
    """Rows read from a file.

    Attributes:
        adapters: digest to metadata.
        names: name to digest, in the order in which names were added.
        last: the largest adapter id and the largest name id.
    """

    adapters: dict[str, Metadata]
    names: dict[str, str]
    last: tuple[int, int]

    def marks(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the arguments of `mark_of_rows`."""
        return {digest: metadata.text for digest, metadata in self.adapters.items()}, self.names


def read_contents(
    connection: sqlite3.Connection,
    header: BankHeader,
    known: Mapping[str, Metadata],
    after: tuple[int, int] | None,
) -> Contents:
    """Read all adapters and names, or only those added since an earlier state.

    Args:
        connection: a connection to the file.
        header: the file's header.
        known: adapters that were read earlier.
        after: `Contents.last` of the earlier state; None to read everything.

    Raises:
        DamagedError: a row is invalid, or inconsistent with another row.
    """
    smallest = -(1 << 63)
    start = (smallest, smallest) if after is None else after
    last_adapter, last_name = start
    adapters: dict[str, Metadata] = {}
    parsed: dict[str, Metadata] = {}
    query = "SELECT id, digest, metadata FROM adapters WHERE id > ? ORDER BY id"
    for last_adapter, digest, text in _rows(connection, query, start[0]):  # noqa: B007  # used below
        metadata = known.get(digest)
        if metadata is None or metadata.text != text:
            check_digest(digest)
            metadata = parsed.get(text) or read_metadata(digest, text, header)
            parsed[text] = metadata
        adapters[digest] = metadata
    names: dict[str, str] = {}
    query = "SELECT id, name, digest FROM names WHERE id > ? ORDER BY id"
    for last_name, name, digest in _rows(connection, query, start[1]):  # noqa: B007
        if not is_name(name):
            raise DamagedError("it has an invalid name")
        if digest not in adapters and (after is None or digest not in known):
            raise DamagedError(f"{name!r} refers to an adapter that is not in the file")
        names[name] = digest
    return Contents(adapters, names, (last_adapter, last_name))


def _rows(connection: sqlite3.Connection, query: str, after: int) -> Iterator[tuple[int, str, str]]:
    """Yield the rows of a query that selects an id and two text columns.

    Ids must increase, because the pages of a damaged file may form a cycle.

    Raises:
        DamagedError: ids do not increase, or a value is not text.
    """
    last = after
    for number, first, second in connection.execute(query, (after,)):
        if number <= last or not isinstance(first, str) or not isinstance(second, str):
            raise DamagedError("its rows are out of order or not text")
        last = number
        yield number, first, second


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Make all statements inside the context read the same state of the file."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
