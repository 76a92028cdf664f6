"""The header of veratune's own files: format version, configuration, fingerprint, and a SHA-256 over everything."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from veratune.checkpoint.files import CheckpointError
from veratune.utils.outside_files import parse_json
from veratune.utils.tensors import bytes_of

FORMAT_VERSION = 1
METADATA_KEY = "veratune"


def checked_header(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor] | None) -> dict[str, Any]:
    """Return the header of a file; if tensors are given, check the digest first."""
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path} was not written by veratune: its metadata has no {METADATA_KEY!r} entry, only {sorted(metadata)}"
        )
    try:
        header = parse_json(metadata[METADATA_KEY])
        version, digest = header["format_version"], header.pop("sha256")
        config, fingerprint = header["config"], header["fingerprint"]
        base, inputs = header.get("base", {}), header.get("inputs", {})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: the {METADATA_KEY!r} entry of its metadata is damaged") from None
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}; this version of veratune reads {FORMAT_VERSION}: install a newer"
            " version"
        )
    well_typed = all(isinstance(value, dict) for value in (config, base, inputs)) and isinstance(fingerprint, str)
    if not well_typed or not all(type(size) is int for size in inputs.values()):
        raise CheckpointError(f"{path}: the {METADATA_KEY!r} entry of its metadata is damaged")
    if tensors is not None and digest != digest_of(header, tensors):
        raise CheckpointError(f"{path} is damaged or was edited by hand: its SHA-256 does not match its contents")
    return dict(header)


def digest_of(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    # hashlib releases the GIL for large updates and may wait to reacquire it, so make few, large updates.
    pending = bytearray(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        # The same text as json.dumps of a list of the three, in half the time.
        pending += f'[{json.dumps(name)}, "{tensor.dtype}", {list(tensor.shape)}]'.encode()
        pending += bytes_of(tensor)
        if len(pending) > 1 << 20:
            sha.update(pending)
            pending.clear()
    sha.update(pending)
    return sha.hexdigest()
