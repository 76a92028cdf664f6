"""A bank's file: one append-only file of immutable adapters, read through a memory map.

    "VERABANK", version (u32), 0 (u32)            the beginning
    committed length (u64), its complement (u64)  at byte 16
    records                                       from byte 64 on, each at a multiple of 64

A record is the length of its JSON header (u32), the length of its payload (u64), the first 16 bytes of the SHA-256 of
both lengths and the header, the header, and the payload at the next multiple of 64. There are three kinds of headers:

    {"kind": "bank", "layout": ..., "dtype": ..., "head_dtype": ...}                first and once
    {"kind": "adapter", "digest": ..., "source": ..., "rank": ..., "sha256": ...}   its row, then its row of heads
    {"kind": "name", "name": ..., "digest": ...}                                    what a name means from now on;
                                                                                    without a digest: nothing

What is behind the committed length does not exist. A writer appends records, has them written through, and then sets
the length: a process that is killed leaves the file as it was before, and a reader sees an adapter under its name or
not at all. Numbers are little-endian; nothing is ever pickled.
"""

import hashlib
import mmap
import os
import stat
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from veratune.atomic import sync_directory, temporary_beside, write_through
from veratune.bank.layout import AdapterRow, BankError, Layout, source_from_json, source_to_json
from veratune.bank.record import (
    BankHeader,
    DamagedRecordError,
    aligned,
    check_adapter,
    check_name,
    dtype_name,
    pack,
    read_bank_header,
    unpack,
)
from veratune.tensors import bytes_of

_MAGIC, _VERSION = b"VERABANK", 1
_START = struct.Struct("<8sII")
_COMMIT = struct.Struct("<QQ")
_COMMIT_AT, _FIRST = 16, 64
_TRIES = 100
_ALL_ONES = (1 << 64) - 1
_BINARY = getattr(os, "O_BINARY", 0)  # Windows has another mode


@dataclass(frozen=True)
class StoredAdapter:
    """Where an adapter stands in the file.

    Attributes:
        digest, source, rank: as in `AdapterRow`; the source as JSON values.
        sha256: of the payload, in hexadecimal digits.
        start, length: the payload's place.
        record_bytes: the length of all of the record.
    """

    digest: str
    source: dict[str, Any]
    rank: int
    sha256: str
    start: int
    length: int
    record_bytes: int


class BankFile:
    """An open bank file. Several processes may read it while one of them, at a time, writes.

    Attributes:
        path: the file.
        header: what its first record says: layout, dtype and head_dtype.
        adapters: digest to where it stands.
        names: name to digest.
        records_at: where the first record ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapters: dict[str, StoredAdapter] = {}
        self.names: dict[str, str] = {}
        self._read_to = _FIRST
        self._lock = threading.RLock()  # held for moments, to read
        self._write_lock = threading.Lock()  # held while the disk is waited for
        self._map: mmap.mmap | None = None
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
                what = "a directory" if path.is_dir() else "no file"
                raise BankError(f"{path} is {what}, and no bank's file")
            self._descriptor = os.open(path, os.O_RDONLY | _BINARY)
        except OSError as error:
            raise BankError(f"{path} cannot be opened: {error.strerror}") from None
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        try:
            self._check_start()
            self.header: BankHeader = self._first_record()
            self.records_at = self._read_to
            self.refresh()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, layout: Layout, dtype: torch.dtype, head_dtype: torch.dtype | None) -> "BankFile":
        """Make a bank file without adapters.

        Raises:
            BankError: there is a file of that name already, or none can be made there.
        """
        record = pack(
            {
                "kind": "bank",
                "layout": layout.describe(),
                "dtype": dtype_name(dtype),
                "head_dtype": None if head_dtype is None else dtype_name(head_dtype),
            }
        )
        start = _START.pack(_MAGIC, _VERSION, 0) + _commit_bytes(_FIRST + len(record))
        temporary = temporary_beside(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_through(temporary, start.ljust(_FIRST, b"\0") + record)
                publish(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise BankError(f"{path} cannot be made: {error.strerror}") from None
        return cls(path)

    def close(self) -> None:
        """Close the file; rows read from it stay valid."""
        with self._lock:
            if self._map is not None:
                self._map.close()
                self._map = None
            self._closing()

    # Reading

    def refresh(self) -> None:
        """Take in what other processes have added since.

        Raises:
            BankError: the file is damaged, was replaced by another or is gone; what was read of it before stays.
        """
        with self._lock:
            self._check_open()
            self._check_same(self._path_status())
            end = self._committed()
            if end < self._read_to:
                raise BankError(f"{self.path} was cut short: {self._read_to} bytes of it have been read before")
            while self._read_to < end:
                try:
                    header, payload, length, following = unpack(self._bytes, self._read_to, end)
                    self._take_in(header, payload, length, following - self._read_to)
                except DamagedRecordError as damage:
                    self._damaged(self._read_to, damage)
                self._read_to = following

    def row(self, digest: str) -> AdapterRow:
        """Read an adapter, and check what is read.

        Raises:
            BankError: there is none of this digest, or it is damaged, or its projections are drawn otherwise here.
        """
        stored = self.adapters.get(digest)
        if stored is None:
            raise BankError(f"{self.path} has no adapter {digest}")
        data = bytearray(self._payload(stored))
        vectors = torch.frombuffer(data, dtype=self.header.dtype, count=self.header.numbers)
        heads = None
        if self.header.head_dtype is not None:
            count, offset = self.header.head_numbers, self.header.heads_at
            heads = torch.frombuffer(data, dtype=self.header.head_dtype, count=count, offset=offset)
        return AdapterRow(digest, source_from_json(stored.source), stored.rank, vectors, heads)

    def _payload(self, stored: StoredAdapter) -> bytes:
        payload = self._bytes(stored.start, stored.length)
        if hashlib.sha256(payload).hexdigest() != stored.sha256:
            raise BankError(
                f"{self.path} is damaged: adapter {stored.digest} has another SHA-256 than when it was written"
            )
        return payload

    def check_layout(self, layout: Layout) -> None:
        """Raise BankError unless the file is for a bank of this layout."""
        own, wanted = self.header.layout, layout.describe()
        if own == wanted:
            return
        if own["rank"] != wanted["rank"]:
            detail = f"it has rank {own['rank']}, not {wanted['rank']}"
        else:
            part = "layers" if own["layers"] != wanted["layers"] else "heads"
            here, there = ({name: rest for name, *rest in x[part]} for x in (own, wanted))
            odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            differing = f"{part} that differ in {', '.join(odd[:3])}{more}"
            detail = f"it has {differing}" if odd else f"its {part} are in another order"
        raise BankError(f"{self.path} is for a bank of another layout: {detail}")

    def check_dtypes(self, dtype: torch.dtype, head_dtype: torch.dtype | None) -> None:
        """Raise BankError unless the file holds vectors and heads of these dtypes."""
        for what, own, wanted in (
            ("vectors", self.header.dtype, dtype),
            ("heads", self.header.head_dtype, head_dtype),
        ):
            if own != wanted:
                raise BankError(f"{self.path} holds {what} as {own}, and this bank would hold them as {wanted}")

    def end(self) -> tuple[int, int]:
        """Return how many bytes have been committed and read, and how many the file has."""
        self._check_open()
        return self._read_to, os.fstat(self._descriptor).st_size

    def _committed(self) -> int:
        for _ in range(_TRIES):
            end, complement = _COMMIT.unpack(self._bytes(_COMMIT_AT, _COMMIT.size))
            if end ^ _ALL_ONES == complement:
                break
            time.sleep(0.001)  # another process may be in the middle of setting it
        else:
            raise BankError(f"{self.path} is damaged: the record of its length contradicts itself")
        if end % _FIRST or end < _FIRST:
            raise BankError(f"{self.path} is damaged: its length cannot be {end} bytes")
        size = os.fstat(self._descriptor).st_size
        if size < end:
            raise BankError(f"{self.path} was cut short: it has {size} bytes and should have at least {end}")
        return int(end)

    def _check_start(self) -> None:
        size = os.fstat(self._descriptor).st_size
        magic, version, _ = _START.unpack(self._bytes(0, _START.size)) if size >= _FIRST else (b"", 0, 0)
        if magic != _MAGIC:
            raise BankError(f"{self.path} is no bank's file")
        if version != _VERSION:
            raise BankError(f"{self.path} has the format version {version}; this veratune reads {_VERSION}")

    def _first_record(self) -> BankHeader:
        try:
            header, _, _, self._read_to = unpack(self._bytes, _FIRST, self._committed())
            return read_bank_header(header)
        except DamagedRecordError as damage:
            self._damaged(_FIRST, damage)

    def _take_in(self, header: dict[str, Any], payload: int, length: int, record_bytes: int) -> None:
        kind = header["kind"]
        if kind == "adapter":
            check_adapter(header, length, self.header)
            fields = {name: header[name] for name in ("digest", "source", "rank", "sha256")}
            stored = StoredAdapter(**fields, start=payload, length=length, record_bytes=record_bytes)
            self.adapters[header["digest"]] = stored
        elif kind == "name":
            check_name(header, self.adapters)
            if header["digest"] is None:
                self.names.pop(header["name"], None)
            else:
                self.names[header["name"]] = header["digest"]
        else:
            raise DamagedRecordError(f"a record of the kind {kind!r} is unknown to this veratune")

    def _damaged(self, position: int, damage: DamagedRecordError) -> NoReturn:
        raise BankError(
            f"{self.path} is damaged at byte {position}: {damage}. Put back a copy of it, or build it anew from the"
            " adapters' directories"
        ) from None

    def _bytes(self, start: int, length: int) -> bytes:
        with self._lock:
            self._check_open()
            # Reading behind the end of a file that somebody has cut would end the process.
            size = os.fstat(self._descriptor).st_size
            if size < start + length:
                raise BankError(f"{self.path} was cut short: it has {size} bytes and should have {start + length}")
            if self._map is None or start + length > len(self._map):
                if self._map is not None:
                    self._map.close()
                    self._map = None
                try:
                    self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    raise BankError(f"{self.path} cannot be read: {error.strerror}") from None
            return self._map[start : start + length]

    def _check_open(self) -> None:
        if not self._closing.alive:
            raise BankError(f"{self.path} has been closed")

    def _path_status(self) -> os.stat_result:
        try:
            return self.path.stat()
        except OSError as error:
            raise BankError(f"{self.path} cannot be read any more: {error.strerror}") from None

    def _check_same(self, status: os.stat_result) -> None:
        if not os.path.samestat(status, os.fstat(self._descriptor)):
            raise BankError(f"{self.path} was replaced by another file meanwhile: open it anew")

    # Writing

    def add(self, name: str, row: AdapterRow, *, replacing: str | None) -> None:
        """Append an adapter, unless the file has it already, and let a name mean it.

        Args:
            name: the name.
            row: the adapter.
            replacing: the digest that the name has had, None where it is to be new.

        Raises:
            BankError: the name means something else than `replacing` by now, as another process has set it, or the
                file cannot be written to. The file is as it was then.
        """
        payload = payload_of(row)
        records = [pack({"kind": "name", "name": name, "digest": row.digest})]
        adapter = pack(_adapter_header(row, payload), payload)
        with self._writing() as descriptor:
            self._check_unchanged(name, replacing)
            if not self._has_whole(row.digest):
                records.insert(0, adapter)
            self._append(descriptor, b"".join(records))

    def remove(self, name: str, digest: str) -> None:
        """Let a name mean nothing. The adapter's values stay in the file.

        Raises:
            BankError: as for `add`.
        """
        with self._writing() as descriptor:
            self._check_unchanged(name, digest)
            self._append(descriptor, pack({"kind": "name", "name": name, "digest": None}))

    def _has_whole(self, digest: str) -> bool:
        """Return whether an adapter is there and undamaged; a damaged one is mended by another copy of it."""
        try:
            return digest in self.adapters and bool(self._payload(self.adapters[digest]))
        except BankError:
            return False

    def _check_unchanged(self, name: str, expected: str | None) -> None:
        if self.names.get(name) != expected:
            raise BankError(
                f"{name!r} was changed in {self.path} by another process meanwhile: refresh() and try again"
            )

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """Open the file for one writer, with everything taken in that others have written."""
        with self._write_lock:
            self._check_open()
            try:
                descriptor = os.open(self.path, os.O_RDWR | _BINARY)
            except OSError as error:
                raise BankError(f"{self.path} cannot be written to: {error.strerror}") from None
            try:
                try:
                    _exclude_other_writers(descriptor)
                except OSError as error:
                    raise BankError(f"{self.path} cannot be locked: {error.strerror}") from None
                self._check_same(os.fstat(descriptor))
                self.refresh()
                yield descriptor
                self.refresh()
            finally:
                os.close(descriptor)

    def _append(self, descriptor: int, records: bytes) -> None:
        end = self._committed()
        try:
            _write_at(descriptor, end, records)
            os.fsync(descriptor)
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(descriptor, end)  # gives back what a full disk still took
            self._not_written(error)
        try:
            _write_at(descriptor, _COMMIT_AT, _commit_bytes(end + len(records)))
        except OSError as error:
            with suppress(OSError):
                _write_at(descriptor, _COMMIT_AT, _commit_bytes(end))
                os.ftruncate(descriptor, end)
            self._not_written(error)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Others may have read it by now, so that it cannot be taken back.
            raise BankError(
                f"{self.path} was written to, but not known to be on the disk ({error.strerror}): refresh() shows what"
                " is in it"
            ) from None

    def _not_written(self, error: BaseException) -> NoReturn:
        if isinstance(error, OSError):
            raise BankError(f"{self.path} cannot be written to: {error.strerror}; it is as it was before") from None
        raise error


def is_there(path: Path) -> bool:
    """Return whether a path is taken; not so where the system refuses to look, as it will refuse to make it as well."""
    try:
        return path.exists()
    except OSError:
        return False


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, in one step and only if no file has it.

    Raises:
        BankError: there is a file of that name.
        OSError: the disk refuses.
    """
    try:
        os.link(temporary, path)  # fails where there is a file, unlike a renaming
    except FileExistsError:
        raise BankError(f"{path} exists already") from None
    temporary.unlink()
    sync_directory(path.parent)


def payload_of(row: AdapterRow) -> bytes:
    """Return a row's bytes: the vectors and, at the next multiple of 64, the heads."""
    vectors = bytes_of(row.vectors)
    return vectors if row.heads is None else vectors.ljust(aligned(len(vectors)), b"\0") + bytes_of(row.heads)


def _adapter_header(row: AdapterRow, payload: bytes) -> dict[str, Any]:
    return {
        "kind": "adapter",
        "digest": row.digest,
        "source": source_to_json(row.source),
        "rank": row.rank,
        "sha256": hashlib.sha256(payload).hexdigest(),
    }


def _commit_bytes(end: int) -> bytes:
    return _COMMIT.pack(end, end ^ _ALL_ONES)


def _write_at(descriptor: int, position: int, data: bytes) -> None:
    """Write all of this, however many pieces the system takes it in."""
    os.lseek(descriptor, position, os.SEEK_SET)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _exclude_other_writers(descriptor: int) -> None:
    """Wait until no other process writes; closing the descriptor lets the next one in."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX)
