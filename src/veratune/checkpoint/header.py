"""The header of a safetensors file, checked before memory is allocated for the tensors that it describes."""

import json
import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from veratune.utils.outside_files import parse_json
from veratune.utils.text import clipped

_LARGEST_HEADER = 64 << 20
_LARGEST_NUMEL = 1 << 48
_MOST_DIMENSIONS = 8
# Several times the number of tensors in an adapter on every expert of the largest models.
_MOST_TENSORS = 1 << 18
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        entries: the tensors' dtypes and shapes by name.
        metadata: strings by name.
    """

    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    metadata: dict[str, str]

    def described(self) -> dict[str, Tensor]:
        """Return the tensors on the meta device, in the same order as `TensorsFile.tensors`."""
        return {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in sorted(self.entries.items())
        }


def read_header(file: BinaryIO, size: int) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        file: the file, at its beginning.
        size: its size in bytes.

    Raises:
        ValueError: the header is invalid or inconsistent.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError("it ends within its header")
    if length > _LARGEST_HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than the maximum of {_LARGEST_HEADER:,}")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("it ends within its header")
    count = text.count(b'"data_offsets"')
    if count > _MOST_TENSORS:
        raise ValueError(f"it has {count:,} tensors, more than the maximum of {_MOST_TENSORS:,}")
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError("its header is not a JSON object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ has values that are not strings")
    end = 0
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for (begin, stop), name, dtype, shape in sorted(
        (_entry(name, entry) for name, entry in values.items()), key=lambda found: found[0]
    ):
        if begin != end:
            raise ValueError(f"{_quoted(name)} begins at byte {begin:,} of the data, not {end:,}")
        end, entries[name] = stop, (dtype, shape)
    if end != size - 8 - length:
        raise ValueError(f"its header describes {end:,} bytes of data, but the file has {size - 8 - length:,}")
    return Header(entries, metadata)


def _entry(name: str, entry: Any) -> tuple[tuple[int, int], str, torch.dtype, tuple[int, ...]]:
    """Return the offsets of a tensor's data, its name, dtype and shape."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {_quoted(name)} is damaged")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{_quoted(name)} has unsupported dtype {clipped(json.dumps(dtype), 60)}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the entry of {_quoted(name)} is damaged")
    # A dimension of zero would make the product zero, however large the others are.
    if math.prod(max(length, 1) for length in shape) > _LARGEST_NUMEL:
        raise ValueError(f"{_quoted(name)} has shape {shape}, which is too large")
    begin, stop = offsets
    if stop - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ValueError(f"{_quoted(name)} has {stop - begin:,} bytes, which does not match its shape {shape}")
    return (begin, stop), name, _DTYPES[dtype], tuple(shape)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _quoted(name: str) -> str:
    return clipped(repr(name), 200)


def memory_of_machine() -> int:
    """Return this machine's memory in bytes, or a very large number if it is unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 62
