"""The records of a bank's file: their bytes, and what their headers must say before anything of them is believed."""

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ALIGNMENT = 64
_LENGTHS = struct.Struct("<IQ")
_CHECK = 16
PREFIX = _LENGTHS.size + _CHECK
_LARGEST_HEADER = 1 << 26
_LARGEST_NUMBER = 1 << 40

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_SOURCE_NUMBERS = {"per_dimension": ("key",), "peft": ("key", "r", "max_in", "max_out")}

Values = dict[str, Any]


class DamagedRecordError(ValueError):
    """Bytes that are no record, or a record that contradicts itself; the message is for a BankError to go on with."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in the file."""
    return str(dtype).removeprefix("torch.")


def aligned(position: int) -> int:
    """Return the next multiple of 64, or the position if it is one."""
    return -(-position // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class BankHeader:
    """What the first record says of all others.

    Attributes:
        layout: what `Layout.describe` returned.
        dtype, head_dtype: of the vectors and of the heads; None without heads.
        numbers, head_numbers: the length of a row and of a row of heads.
    """

    layout: Values
    dtype: torch.dtype
    head_dtype: torch.dtype | None
    numbers: int
    head_numbers: int

    @property
    def heads_at(self) -> int:
        """Where the heads begin in a payload."""
        return aligned(self.numbers * self.dtype.itemsize)

    @property
    def payload_bytes(self) -> int:
        """The length of every adapter's payload."""
        if self.head_dtype is None:
            return self.numbers * self.dtype.itemsize
        return self.heads_at + self.head_numbers * self.head_dtype.itemsize


def pack(header: Values, payload: bytes = b"") -> bytes:
    """Return a record's bytes, a multiple of 64."""
    text = json.dumps(header, sort_keys=True).encode()
    lengths = _LENGTHS.pack(len(text), len(payload))
    head = lengths + _check_of(lengths + text) + text
    return head.ljust(aligned(len(head)), b"\0") + payload.ljust(aligned(len(payload)), b"\0")


def unpack(read: Callable[[int, int], bytes], position: int, end: int) -> tuple[Values, int, int, int]:
    """Read the record at a position.

    Args:
        read: returns so many bytes from a position on.
        position: where the record begins.
        end: what it must not reach beyond.

    Returns:
        (header, place of the payload, its length, place of the next record).

    Raises:
        DamagedRecordError: what stands there is no record.
    """
    begin = position + PREFIX
    if begin > end:
        raise DamagedRecordError("what stands there is no record")
    prefix = read(position, PREFIX)
    header_length, length = _LENGTHS.unpack(prefix[: _LENGTHS.size])
    payload = aligned(begin + header_length)
    following = aligned(payload + length)
    if header_length > _LARGEST_HEADER or following > end:
        raise DamagedRecordError("what stands there is no record")
    text = read(begin, header_length)
    if _check_of(prefix[: _LENGTHS.size] + text) != prefix[_LENGTHS.size :]:
        raise DamagedRecordError("what stands there is no record")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedRecordError("its header is not JSON") from None
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise DamagedRecordError("its header says no kind")
    return header, payload, length, following


def _check_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECK]


def read_bank_header(header: Values) -> BankHeader:
    """Return what the first record says.

    Raises:
        DamagedRecordError: it does not describe a bank.
    """
    dtype, head_dtype = header.get("dtype"), header.get("head_dtype")
    _require(header["kind"] == "bank", "the first record does not describe a bank")
    _require(isinstance(dtype, str) and dtype in _DTYPES, f"the bank's dtype is {dtype!r}")
    _require(
        head_dtype is None or (isinstance(head_dtype, str) and head_dtype in _DTYPES),
        f"the heads' dtype is {head_dtype!r}",
    )
    try:
        numbers, head_numbers = _sizes(header["layout"])
    except (KeyError, TypeError, ValueError):
        raise DamagedRecordError("the bank's layout cannot be read") from None
    _require((head_dtype is not None) == bool(head_numbers), "the heads have a dtype and no numbers, or the reverse")
    heads = None if head_dtype is None else _DTYPES[head_dtype]
    return BankHeader(header["layout"], _DTYPES[str(dtype)], heads, numbers, head_numbers)


def _sizes(layout: Values) -> tuple[int, int]:
    """Return the length of a row and of a row of heads.

    Raises:
        KeyError, TypeError, ValueError: it is no layout.
    """
    rank = _whole(layout["rank"])
    numbers = 0
    for name, in_features, out_features, parts in layout["layers"]:
        _text(name)
        _whole(in_features)
        if parts and sum(map(_whole, parts)) != out_features:
            raise ValueError
        numbers += _whole(out_features) + rank * (len(parts) or 1)
    heads = 0
    for name, parameters in layout["heads"]:
        _text(name)
        for key, shape in parameters:
            _text(key)
            heads += math.prod(map(_whole, shape))
    if not numbers or numbers > _LARGEST_NUMBER or heads > _LARGEST_NUMBER:
        raise ValueError
    return numbers, heads


def check_adapter(header: Values, length: int, bank: BankHeader) -> None:
    """Raise DamagedRecordError unless an adapter's record is whole and fits the bank."""
    _require(_is_hex(header.get("digest"), 32), f"the adapter's digest is {header.get('digest')!r}")
    _require(_is_hex(header.get("sha256"), 64), "the adapter's SHA-256 is none")
    rank, largest = header.get("rank"), bank.layout["rank"]
    _require(type(rank) is int and 1 <= rank <= largest, f"the adapter's rank is {rank!r} in a bank of {largest}")
    _require(length == bank.payload_bytes, f"the adapter has {length} bytes, not {bank.payload_bytes}")
    source = header.get("source")
    known = isinstance(source, dict) and _SOURCE_NUMBERS.get(str(source.get("scheme")))
    _require(
        isinstance(source, dict)
        and bool(known)
        and all(type(source.get(name)) is int for name in known or ())
        and all(source[name] >= 1 for name in known or () if name != "key")
        and _is_hex(source.get("fingerprint"), 16),
        f"the adapter's projections are {source!r}",
    )


def check_name(header: Values, adapters: Values) -> None:
    """Raise DamagedRecordError unless a name's record is whole and means an adapter that there is, or nothing."""
    name, digest = header.get("name"), header.get("digest")
    _require(isinstance(name, str), f"the name is {name!r}")
    _require("digest" in header and (digest is None or isinstance(digest, str)), f"{name!r} means {digest!r}")
    _require(digest is None or digest in adapters, f"{name!r} means the adapter {digest}, which is not in the file")


def _require(fine: bool, otherwise: str) -> None:
    if not fine:
        raise DamagedRecordError(otherwise)


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and not set(value) - set("0123456789abcdef")


def _whole(value: object) -> int:
    if type(value) is not int or not 1 <= value <= _LARGEST_NUMBER:
        raise ValueError
    return value


def _text(value: object) -> None:
    if not isinstance(value, str):
        raise TypeError
