"""The contents of a bank file, and the checks on them before they are used.

    bank      one row: the layout as JSON, the dtypes, the number of changes, and a checksum
    adapters  digest, metadata as JSON ({"rank": ..., "scheme": ...}), the vectors, the values of modules_to_save
    names     name, digest

The checksum is the XOR of the hashes of all rows; tensors are left out because digests cover them. It is updated by
each change and checked when names are read: SQLite itself does not detect a flipped bit in a name.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from veratune.bank.layout import AdapterRow, BankError, scheme_from_json, scheme_to_json
from veratune.projections.schemes import SCHEMES, Scheme
from veratune.utils.outside_files import parse_json

APPLICATION_ID = 0x56455242
VERSION = 3  # 1 was a hand-written format that began with "VERABANK", 2 had other column names
TABLES = {
    "bank": (
        "CREATE TABLE bank (layout TEXT NOT NULL, dtype TEXT NOT NULL, saved_dtype TEXT,"
        " changes INTEGER NOT NULL, checksum BLOB NOT NULL)"
    ),
    "adapters": (
        "CREATE TABLE adapters (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL,"
        " vectors BLOB NOT NULL, saved BLOB)"
    ),
    "names": "CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, digest TEXT NOT NULL)",
}

# In a file without adapters, nothing confirms the sizes that it claims, and A and B grow with the rank.
_LARGEST_RANK = 1 << 16
_LARGEST_NUMBER = 1 << 40
_LONGEST_NAME = 256
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_CHECKSUM_BYTES = 16

Values = dict[str, Any]


class DamagedError(ValueError):
    """The contents are inconsistent; the message becomes part of a BankError's message."""


@dataclass(frozen=True)
class BankHeader:
    """The part of the file that applies to all adapters.

    Attributes:
        layout: as returned by `Layout.describe`.
        dtype: the dtype of the vectors.
        saved_dtype: the dtype of the values of modules_to_save; None without modules_to_save.
        numbers: the number of elements in an adapter's vectors.
        saved_numbers: the number of values in an adapter's modules_to_save.
    """

    layout: Values
    dtype: torch.dtype
    saved_dtype: torch.dtype | None
    numbers: int
    saved_numbers: int

    @property
    def vector_bytes(self) -> int:
        return self.numbers * self.dtype.itemsize

    @property
    def saved_bytes(self) -> int | None:
        return None if self.saved_dtype is None else self.saved_numbers * self.saved_dtype.itemsize

    @property
    def adapter_bytes(self) -> int:
        """The size of each adapter's tensors in bytes."""
        return self.vector_bytes + (self.saved_bytes or 0)


@dataclass(frozen=True)
class Metadata:
    """The parsed metadata of an adapter. Adapters with equal text share one object.

    Attributes:
        text: the JSON text in the file.
        rank: as in `AdapterRow`.
        scheme: the projections, as JSON values.
    """

    text: str
    rank: int
    scheme: Values


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name in the file."""
    return str(dtype).removeprefix("torch.")


# Names


def is_name(value: object) -> bool:
    """Return whether a value is a valid adapter name."""
    return (
        isinstance(value, str)
        and value.isprintable()
        and 1 <= len(value) <= _LONGEST_NAME
        and len(value.encode()) <= _LONGEST_NAME
    )


def check_spelling(name: object) -> None:
    """Raise BankError unless a value is a valid adapter name."""
    if not is_name(name):
        shown = (
            f"{name[:40]!r}... ({len(name)} characters)" if isinstance(name, str) and len(name) > 40 else f"{name!r}"
        )
        raise BankError(
            f"name={shown} is not allowed: it must be a string of printable characters, 1 to {_LONGEST_NAME} bytes in"
            " UTF-8"
        )


# Writing and reading rows


def header_values(layout: Values, dtype: torch.dtype, saved_dtype: torch.dtype | None) -> tuple[str, str, str | None]:
    """Return the row that describes a bank.

    Raises:
        DamagedError: `read_header` would reject it.
    """
    values = (
        json.dumps(layout, sort_keys=True),
        dtype_name(dtype),
        None if saved_dtype is None else dtype_name(saved_dtype),
    )
    read_header(*values)
    return values


def read_header(layout: object, dtype: object, saved_dtype: object) -> BankHeader:
    """Parse and check the row that describes a bank.

    Raises:
        DamagedError: the row does not describe a bank.
    """
    _require(isinstance(dtype, str) and dtype in _DTYPES, f"the bank's dtype is invalid: {_shown(dtype)}")
    _require(
        saved_dtype is None or (isinstance(saved_dtype, str) and saved_dtype in _DTYPES),
        f"the dtype of modules_to_save is invalid: {_shown(saved_dtype)}",
    )
    values = _json(layout, "the bank's layout")
    rank = values.get("rank")
    if type(rank) is int and rank > _LARGEST_RANK:
        raise DamagedError(f"it claims rank {_shown(rank)}, but the maximum in a bank file is {_LARGEST_RANK}")
    try:
        numbers, saved_numbers = _sizes(values)
    except (KeyError, TypeError, ValueError):
        raise DamagedError("the bank's layout cannot be read") from None
    _require(
        (saved_dtype is not None) == bool(saved_numbers), "modules_to_save has a dtype but no values, or vice versa"
    )
    saved = None if saved_dtype is None else _DTYPES[str(saved_dtype)]
    return BankHeader(values, _DTYPES[str(dtype)], saved, numbers, saved_numbers)


def _sizes(layout: Values) -> tuple[int, int]:
    """Return the numbers of vector elements and of values of modules_to_save in an adapter.

    Raises:
        KeyError, TypeError, ValueError: not a valid layout.
    """
    rank = _positive(layout["rank"])
    numbers = 0
    for name, in_features, out_features, parts in layout["layers"]:
        _check_text(name)
        _positive(in_features)
        if parts and sum(map(_positive, parts)) != out_features:
            raise ValueError
        numbers = _positive(numbers + _positive(out_features) + rank * (len(parts) or 1))
    saved = 0
    for name, parameters in layout["modules_to_save"]:
        _check_text(name)
        for key, shape in parameters:
            _check_text(key)
            size = 1
            for length in shape:
                size = _positive(size * _positive(length))
            saved = _positive(saved + size)
    _positive(numbers)
    return numbers, saved


def metadata_of(row: AdapterRow) -> str:
    """Return an adapter's metadata as the text that the file stores.

    Raises:
        BankError: the projections cannot be drawn from a key.
    """
    return json.dumps({"rank": row.rank, "scheme": scheme_to_json(row.scheme)}, sort_keys=True)


def read_metadata(digest: str, text: str, header: BankHeader) -> Metadata:
    """Parse and check an adapter's metadata.

    Raises:
        DamagedError: the row is inconsistent or does not fit the bank.
    """
    values = _json(text, f"the metadata of adapter {digest}")
    rank, largest = values.get("rank"), header.layout["rank"]
    if type(rank) is not int or not 1 <= rank <= largest:
        raise DamagedError(f"adapter {digest} has rank {_shown(rank)} in a bank of rank {largest}")
    scheme = values.get("scheme")
    if not isinstance(scheme, dict) or not _is_scheme(scheme, header.layout):
        raise DamagedError(f"adapter {digest} has invalid projections: {_shown(scheme)}")
    return Metadata(text, rank, scheme)


@functools.lru_cache(maxsize=1024)
def scheme_of(metadata: str) -> Scheme:
    """Return an adapter's projections, given its metadata.

    Raises:
        BankError: this version of veratune draws different values.
    """
    return scheme_from_json(json.loads(metadata)["scheme"])


def check_digest(digest: object) -> None:
    """Raise DamagedError unless a value is an adapter's digest."""
    if not _is_hex(digest, 32):
        raise DamagedError(f"an adapter has an invalid digest: {_shown(digest)}")


def _is_scheme(scheme: Values, layout: Values) -> bool:
    """Return whether these projections are valid for a layout; nothing is drawn."""
    name = scheme.get("scheme")
    registered = SCHEMES.get(name) if isinstance(name, str) else None
    if registered is None:
        return False
    widest_in, widest_out = (max(layer[side] for layer in layout["layers"]) for side in (1, 2))
    allowed = registered.allowed_values(layout["rank"], widest_in, widest_out)
    return all(
        type(scheme.get(field)) is int and scheme[field] in values for field, values in allowed.items()
    ) and _is_hex(scheme.get("fingerprint"), 16)


# The checksum


def mark(*values: str | None) -> int:
    """Return the hash of a row as an integer, to be combined with others by XOR."""
    text = "\0".join([value or "" for value in values])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:_CHECKSUM_BYTES], "big")


def mark_of_all(header: Iterable[str | None], adapters: Mapping[str, str], names: Mapping[str, str]) -> int:
    """Return the checksum of a file with these contents: the metadata of adapters by digest, and digests by name."""
    return mark("bank", *header) ^ mark_of_rows(adapters, names)


def mark_of_rows(adapters: Mapping[str, str], names: Mapping[str, str]) -> int:
    """Return the contribution of these rows to the checksum."""
    checksum = 0
    for digest, metadata in adapters.items():
        checksum ^= mark("adapter", digest, metadata)
    for name, digest in names.items():
        checksum ^= mark("name", name, digest)
    return checksum


def checksum_bytes(checksum: int) -> bytes:
    """Return a checksum as stored in the file."""
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
    """Format a value for an error message, shortened and without control characters."""
    if type(value) is int and value.bit_length() > 64:
        return "a number of more than 64 bits"
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise DamagedError(problem)


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and not value.strip("0123456789abcdef")


def _positive(value: object) -> int:
    if type(value) is not int or not 1 <= value <= _LARGEST_NUMBER:
        raise ValueError
    return value


def _check_text(value: object) -> None:
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError
