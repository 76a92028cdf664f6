"""What a bank's file holds, and what it must say before anything of it is believed.

    bank      one row: the layout as JSON, the dtypes, how many changes were made, and a checksum
    adapters  digest, what is known of it as JSON ({"rank": ..., "source": ...}), its vectors, its modules_to_save
    names     name, digest

The checksum is the XOR of a hash of each row, of an adapter's without its tensors, which its digest is for. It is
updated by each change and checked whenever names are read: SQLite itself does not notice a flipped bit in a name.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from veratune.bank.layout import AdapterRow, BankError, scheme_to_json
from veratune.projections.blocks import MOST_BLOCKS
from veratune.utils.outside_files import parse_json

APPLICATION_ID = 0x56455242
VERSION = 2  # 1 was a format of veratune's own, which began with "VERABANK"
TABLES = {
    "bank": (
        "CREATE TABLE bank (layout TEXT NOT NULL, dtype TEXT NOT NULL, head_dtype TEXT,"
        " changes INTEGER NOT NULL, checksum BLOB NOT NULL)"
    ),
    "adapters": (
        "CREATE TABLE adapters (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL,"
        " vectors BLOB NOT NULL, heads BLOB)"
    ),
    "names": "CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, digest TEXT NOT NULL)",
}

# An empty file proves no size by what it holds, and A and B have a row for each rank.
_LARGEST_RANK = 1 << 16
_LARGEST_NUMBER = 1 << 40
_LONGEST_NAME = 256
_KEYS = range(-(1 << 63), 1 << 64)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_CHECKSUM_BYTES = 16

Values = dict[str, Any]


class DamagedError(ValueError):
    """Content that contradicts itself; the message is the middle of a BankError's."""


@dataclass(frozen=True)
class BankHeader:
    """What the file says of all adapters.

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
    def vector_bytes(self) -> int:
        return self.numbers * self.dtype.itemsize

    @property
    def head_bytes(self) -> int | None:
        return None if self.head_dtype is None else self.head_numbers * self.head_dtype.itemsize

    @property
    def adapter_bytes(self) -> int:
        """The bytes of every adapter's tensors."""
        return self.vector_bytes + (self.head_bytes or 0)


@dataclass(frozen=True)
class StoredAdapter:
    """What the file says of an adapter, without its tensors.

    Attributes:
        digest, rank: as in `AdapterRow`.
        scheme: its projections, as JSON values.
        metadata: the text in the file that says both.
    """

    digest: str
    rank: int
    scheme: Values
    metadata: str


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in the file."""
    return str(dtype).removeprefix("torch.")


# Names


def is_name(value: object) -> bool:
    """Return whether this may be an adapter's name."""
    return (
        isinstance(value, str)
        and value.isprintable()
        and 1 <= len(value) <= _LONGEST_NAME
        and len(value.encode()) <= _LONGEST_NAME
    )


def check_spelling(name: object) -> None:
    """Raise BankError unless this may be an adapter's name."""
    if not is_name(name):
        shown = (
            f"{name[:40]!r}... ({len(name)} characters)" if isinstance(name, str) and len(name) > 40 else f"{name!r}"
        )
        raise BankError(
            f"name={shown} is not allowed: it must be a text of printable characters, 1 to {_LONGEST_NAME} bytes in"
            " UTF-8"
        )


# Writing and reading rows


def header_values(layout: Values, dtype: torch.dtype, head_dtype: torch.dtype | None) -> tuple[str, str, str | None]:
    """Return the row that describes a bank.

    Raises:
        DamagedError: `read_header` would refuse it.
    """
    values = (
        json.dumps(layout, sort_keys=True),
        dtype_name(dtype),
        None if head_dtype is None else dtype_name(head_dtype),
    )
    read_header(*values)
    return values


def read_header(layout: object, dtype: object, head_dtype: object) -> BankHeader:
    """Return what the file says of all adapters.

    Raises:
        DamagedError: it does not describe a bank.
    """
    _require(isinstance(dtype, str) and dtype in _DTYPES, f"the bank's dtype is {_shown(dtype)}")
    _require(
        head_dtype is None or (isinstance(head_dtype, str) and head_dtype in _DTYPES),
        f"the heads' dtype is {_shown(head_dtype)}",
    )
    values = _json(layout, "the bank's layout")
    rank = values.get("rank")
    if type(rank) is int and rank > _LARGEST_RANK:
        raise DamagedError(f"it claims the rank {_shown(rank)}, and a bank's file holds at most {_LARGEST_RANK}")
    try:
        numbers, head_numbers = _sizes(values)
    except (KeyError, TypeError, ValueError):
        raise DamagedError("the bank's layout cannot be read") from None
    _require((head_dtype is not None) == bool(head_numbers), "the heads have a dtype and no numbers, or the reverse")
    heads = None if head_dtype is None else _DTYPES[str(head_dtype)]
    return BankHeader(values, _DTYPES[str(dtype)], heads, numbers, head_numbers)


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
        numbers = _whole(numbers + _whole(out_features) + rank * (len(parts) or 1))
    heads = 0
    for name, parameters in layout["heads"]:
        _text(name)
        for key, shape in parameters:
            _text(key)
            size = 1
            for length in shape:
                size = _whole(size * _whole(length))
            heads = _whole(heads + size)
    _whole(numbers)
    return numbers, heads


def metadata_of(row: AdapterRow) -> str:
    """Return the text that the file has for an adapter.

    Raises:
        BankError: projections that are known by their values alone.
    """
    return json.dumps({"rank": row.rank, "source": scheme_to_json(row.scheme)}, sort_keys=True)


def read_adapter(digest: object, metadata: object, header: BankHeader) -> StoredAdapter:
    """Return what the file says of an adapter.

    Raises:
        DamagedError: it contradicts itself or does not fit the bank.
    """
    if not isinstance(digest, str) or not _is_hex(digest, 32):
        raise DamagedError(f"an adapter's digest is {_shown(digest)}")
    values = _json(metadata, f"what is said of adapter {digest}")
    rank, largest = values.get("rank"), header.layout["rank"]
    if type(rank) is not int or not 1 <= rank <= largest:
        raise DamagedError(f"the rank of adapter {digest} is {_shown(rank)} in a bank of {largest}")
    scheme = values.get("source")
    if not isinstance(scheme, dict) or not _is_source(scheme, header.layout):
        raise DamagedError(f"the projections of adapter {digest} are {_shown(scheme)}")
    return StoredAdapter(digest, rank, scheme, str(metadata))


def _is_source(scheme: Values, layout: Values) -> bool:
    """Return whether these projections can be this layout's, before anything is drawn for them."""
    sizes: dict[str, int] = {}
    if scheme.get("scheme") == "peft":
        widest_in, widest_out = (max(layer[side] for layer in layout["layers"]) for side in (1, 2))
        sizes = {"r": layout["rank"], "max_in": widest_in, "max_out": widest_out}
    elif scheme.get("scheme") == "blocks":
        sizes = {"g": MOST_BLOCKS}
    elif scheme.get("scheme") != "per_dimension":
        return False
    return (
        type(scheme.get("key")) is int
        and scheme["key"] in _KEYS
        and all(type(scheme.get(name)) is int and 1 <= scheme[name] <= most for name, most in sizes.items())
        and _is_hex(scheme.get("fingerprint"), 16)
    )


# The checksum


def mark(*values: str | None) -> int:
    """Return the hash of a row, as a number to be combined with those of others by XOR."""
    text = "\0".join([value or "" for value in values])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:_CHECKSUM_BYTES], "big")


def mark_of_all(header: Iterable[str | None], adapters: Iterable[StoredAdapter], names: Values) -> int:
    """Return the checksum of a file that holds these."""
    checksum = mark("bank", *header)
    for adapter in adapters:
        checksum ^= mark("adapter", adapter.digest, adapter.metadata)
    for name, digest in names.items():
        checksum ^= mark("name", name, digest)
    return checksum


def checksum_bytes(checksum: int) -> bytes:
    """Return a checksum as the file has it."""
    return checksum.to_bytes(_CHECKSUM_BYTES, "big")


def _json(text: object, what: str) -> Values:
    try:
        values = parse_json(text) if isinstance(text, str) else None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise DamagedError(f"{what} cannot be read")
    return values


def _shown(value: object) -> str:
    """Return a value for a message, without control characters and not at length."""
    if type(value) is int and value.bit_length() > 64:
        return "a number of more than 64 bits"
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _require(fine: bool, otherwise: str) -> None:
    if not fine:
        raise DamagedError(otherwise)


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and not value.strip("0123456789abcdef")


def _whole(value: object) -> int:
    if type(value) is not int or not 1 <= value <= _LARGEST_NUMBER:
        raise ValueError
    return value


def _text(value: object) -> None:
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError
