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

What is behind the committed length does not exist. A writer appends a record, has it written through, and then sets the
length: a process that is killed leaves the file as it was before, and a reader sees a record whole or not at all.
Numbers are little-endian; nothing is ever pickled.
"""

import hashlib
import json
import mmap
import os
import struct
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from veratune.bank.layout import AdapterRow, BankError, Layout, source_from_json, source_to_json

_MAGIC, _VERSION = b"VERABANK", 1
_START = struct.Struct("<8sII")
_COMMIT = struct.Struct("<QQ")
_COMMIT_AT, _FIRST, _ALIGNMENT = 16, 64, 64
_LENGTHS = struct.Struct("<IQ")
_CHECK = 16
_TRIES = 100
_LARGEST_HEADER = 1 << 26
_ALL_ONES = (1 << 64) - 1

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in the file."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class StoredAdapter:
    """Where an adapter stands in the file.

    Attributes:
        digest, source, rank: as in `AdapterRow`; the source as JSON values.
        sha256: of the payload, in hexadecimal digits.
        start, length: the payload's place.
    """

    digest: str
    source: dict[str, Any]
    rank: int
    sha256: str
    start: int
    length: int


class BankFile:
    """An open bank file. Several processes may read it while one of them, at a time, writes.

    Attributes:
        path: the file.
        header: its first record: layout, dtype and head_dtype.
        adapters: digest to where it stands.
        names: name to digest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapters: dict[str, StoredAdapter] = {}
        self.names: dict[str, str] = {}
        self._read_to = _FIRST
        self._lock = threading.RLock()
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise BankError(f"{path} cannot be opened: {error.strerror}") from None
        weakref.finalize(self, self._file.close)
        try:
            self._map: mmap.mmap | None = None
            self._remap()
            self._check_start()
            self.header = self._first_record()
            self.refresh()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, layout: Layout, dtype: torch.dtype, head_dtype: torch.dtype | None) -> "BankFile":
        """Make a bank file without adapters.

        Raises:
            BankError: there is a file of that name already.
        """
        header = {
            "kind": "bank",
            "layout": layout.describe(),
            "dtype": dtype_name(dtype),
            "head_dtype": None if head_dtype is None else dtype_name(head_dtype),
        }
        record = _record(header, b"")
        end = _FIRST + len(record)
        start = _START.pack(_MAGIC, _VERSION, 0) + _COMMIT.pack(end, end ^ _ALL_ONES)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("xb") as handle:
                handle.write(start.ljust(_FIRST, b"\0") + record)
                handle.flush()
                os.fsync(handle.fileno())
            os.link(temporary, path)  # fails where there is a file, unlike a renaming
        except FileExistsError:
            raise BankError(f"{path} exists already") from None
        finally:
            temporary.unlink(missing_ok=True)
        return cls(path)

    def close(self) -> None:
        """Close the file; rows read from it stay valid."""
        if self._map is not None:
            self._map.close()
            self._map = None
        self._file.close()

    # Reading

    def refresh(self) -> None:
        """Take in what other processes have added since.

        Raises:
            BankError: a record is damaged.
        """
        with self._lock:
            end = self._committed()
            while self._read_to < end:
                header, payload, length, following = self._record_at(self._read_to, end)
                self._take_in(header, payload, length)
                self._read_to = following

    def row(self, digest: str) -> AdapterRow:
        """Read an adapter, and check what is read.

        Raises:
            BankError: there is none of this digest, or it is damaged, or its projections are drawn otherwise here.
        """
        stored = self.adapters.get(digest)
        if stored is None:
            raise BankError(f"{self.path} has no adapter {digest}")
        with self._lock:
            payload = self._bytes(stored.start, stored.length)
        if hashlib.sha256(payload).hexdigest() != stored.sha256:
            raise BankError(f"{self.path} is damaged: adapter {digest} has another SHA-256 than when it was written")
        dtype = _DTYPES[self.header["dtype"]]
        head_dtype = self.header["head_dtype"]
        size = _payload_sizes(self.header)
        data = bytearray(payload)
        vectors = torch.frombuffer(data, dtype=dtype, count=size[0])
        heads = None
        if head_dtype is not None:
            offset = _aligned(size[0] * dtype.itemsize)
            heads = torch.frombuffer(data, dtype=_DTYPES[head_dtype], count=size[1], offset=offset)
        return AdapterRow(digest, source_from_json(stored.source), stored.rank, vectors, heads)

    def check_layout(self, layout: Layout) -> None:
        """Raise BankError unless the file is for a bank of this layout."""
        own, wanted = self.header["layout"], json.loads(json.dumps(layout.describe()))
        if own == wanted:
            return
        for part in ("rank", "layers", "heads"):
            if own[part] == wanted[part]:
                continue
            if part == "rank":
                detail = f"rank {own[part]}, not {wanted[part]}"
            else:
                odd = sorted(
                    name for name in {*own[part], *wanted[part]} if own[part].get(name) != wanted[part].get(name)
                )
                detail = f"{part} that differ in {', '.join(odd[:3])}" + (f" and {len(odd) - 3} more" * (len(odd) > 3))
            raise BankError(f"{self.path} is for a bank of another layout: it has {detail}")

    def check_dtypes(self, dtype: torch.dtype, head_dtype: torch.dtype | None) -> None:
        """Raise BankError unless the file holds vectors and heads of these dtypes."""
        own = [self.header["dtype"], self.header["head_dtype"]]
        wanted = [dtype_name(dtype), None if head_dtype is None else dtype_name(head_dtype)]
        if own != wanted:
            raise BankError(f"{self.path} holds vectors and heads as {own}, and this bank would hold them as {wanted}")

    def _committed(self) -> int:
        for _ in range(_TRIES):  # another process may be in the middle of setting it
            end, complement = _COMMIT.unpack(self._bytes(_COMMIT_AT, _COMMIT.size))
            if end ^ _ALL_ONES == complement:
                break
        else:
            raise BankError(f"{self.path} is damaged: the record of its length contradicts itself")
        if os.fstat(self._file.fileno()).st_size < end:
            raise BankError(f"{self.path} was cut short: it should have at least {end} bytes")
        return int(end)

    def _check_start(self) -> None:
        magic, version, _ = _START.unpack(self._bytes(0, _START.size)) if self._size() >= _FIRST else (b"", 0, 0)
        if magic != _MAGIC:
            raise BankError(f"{self.path} is no bank's file")
        if version != _VERSION:
            raise BankError(f"{self.path} has the format version {version}; this veratune reads {_VERSION}")

    def _first_record(self) -> dict[str, Any]:
        header, _, _, following = self._record_at(_FIRST, self._committed())
        if header.get("kind") != "bank" or header.get("dtype") not in _DTYPES:
            raise BankError(f"{self.path} is damaged: its first record does not describe a bank")
        self._read_to = following
        return header

    def _record_at(self, position: int, end: int) -> tuple[dict[str, Any], int, int, int]:
        """Return (header, place of the payload, its length, place of the next record)."""
        prefix = self._bytes(position, _LENGTHS.size + _CHECK)
        header_length, length = _LENGTHS.unpack(prefix[: _LENGTHS.size])
        begin = position + len(prefix)
        payload = _aligned(begin + header_length)
        following = _aligned(payload + length)
        damaged = BankError(f"{self.path} is damaged at byte {position}: what stands there is no record")
        if header_length > _LARGEST_HEADER or following > end:
            raise damaged
        text = self._bytes(begin, header_length)
        if _check_of(prefix[: _LENGTHS.size] + text) != prefix[_LENGTHS.size :]:
            raise damaged
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            raise damaged from None
        return header, payload, length, following

    def _take_in(self, header: dict[str, Any], payload: int, length: int) -> None:
        if header["kind"] == "adapter":
            fields = {name: header[name] for name in ("digest", "source", "rank", "sha256")}
            self.adapters[header["digest"]] = StoredAdapter(**fields, start=payload, length=length)
        elif header["kind"] == "name":
            if header["digest"] is None:
                self.names.pop(header["name"], None)
            else:
                self.names[header["name"]] = header["digest"]

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _bytes(self, start: int, length: int) -> bytes:
        if self._map is None or start + length > len(self._map):
            self._remap()
        assert self._map is not None
        found = self._map[start : start + length]
        if len(found) < length:
            raise BankError(f"{self.path} was cut short")
        return found

    def _remap(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        if not self._size():
            raise BankError(f"{self.path} is empty, and no bank's file")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    # Writing

    def add(self, name: str, row: AdapterRow, *, replacing: str | None) -> None:
        """Append an adapter, unless the file has it already, and let a name mean it.

        Args:
            name: the name.
            row: the adapter.
            replacing: the digest that the name has had, None where it is to be new.

        Raises:
            BankError: the name means something else than `replacing` by now, as another process has set it.
        """
        with self._writing() as handle:
            self._check_unchanged(name, replacing)
            if row.digest not in self.adapters:
                self._append(handle, _adapter_header(row), payload_of(row))
            self._append(handle, {"kind": "name", "name": name, "digest": row.digest}, b"")

    def remove(self, name: str, digest: str) -> None:
        """Let a name mean nothing. The adapter's values stay in the file.

        Raises:
            BankError: as for `add`.
        """
        with self._writing() as handle:
            self._check_unchanged(name, digest)
            self._append(handle, {"kind": "name", "name": name, "digest": None}, b"")

    def _check_unchanged(self, name: str, expected: str | None) -> None:
        if self.names.get(name) != expected:
            raise BankError(
                f"{name!r} was changed in {self.path} by another process meanwhile: refresh() and try again"
            )

    @contextmanager
    def _writing(self) -> Iterator[BinaryIO]:
        """Open the file for one writer, with everything taken in that others have written."""
        with self._lock:
            try:
                handle = self.path.open("r+b")
            except OSError as error:
                raise BankError(f"{self.path} cannot be written to: {error.strerror}") from None
            with handle:
                _exclude_other_writers(handle)
                self.refresh()
                yield handle
                self.refresh()

    def _append(self, handle: BinaryIO, header: dict[str, Any], payload: bytes) -> None:
        end = self._committed()
        handle.seek(end)
        record = _record(header, payload)
        handle.write(record)
        handle.flush()
        os.fsync(handle.fileno())
        end += len(record)
        handle.seek(_COMMIT_AT)
        handle.write(_COMMIT.pack(end, end ^ _ALL_ONES))
        handle.flush()
        os.fsync(handle.fileno())


def payload_of(row: AdapterRow) -> bytes:
    """Return a row's bytes: the vectors and, at the next multiple of 64, the heads."""
    parts = [
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for tensor in (row.vectors, row.heads)
        if tensor is not None
    ]
    return parts[0] if len(parts) == 1 else parts[0].ljust(_aligned(len(parts[0])), b"\0") + parts[1]


def _adapter_header(row: AdapterRow) -> dict[str, Any]:
    return {
        "kind": "adapter",
        "digest": row.digest,
        "source": source_to_json(row.source),
        "rank": row.rank,
        "sha256": hashlib.sha256(payload_of(row)).hexdigest(),
    }


def _payload_sizes(header: dict[str, Any]) -> tuple[int, int]:
    """Return the length of a row and of a row of heads."""
    layout = header["layout"]
    numbers = 0
    for _, out_features, parts in layout["layers"].values():
        numbers += out_features + layout["rank"] * (len(parts) or 1)
    heads = 0
    for parameters in layout["heads"].values():
        for shape in parameters.values():
            count = 1
            for size in shape:
                count *= size
            heads += count
    return numbers, heads


def _record(header: dict[str, Any], payload: bytes) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    lengths = _LENGTHS.pack(len(text), len(payload))
    head = lengths + _check_of(lengths + text) + text
    return head.ljust(_aligned(len(head)), b"\0") + payload.ljust(_aligned(len(payload)), b"\0")


def _check_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECK]


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _exclude_other_writers(handle: BinaryIO) -> None:
    """Wait until no other process writes; closing the handle lets the next one in."""
    if sys.platform == "win32":
        import msvcrt

        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
        return
    import fcntl

    fcntl.flock(handle.fileno(), fcntl.LOCK_EX)
