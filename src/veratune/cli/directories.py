"""Check that output directories are new or empty, and writable, before any work is done."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veratune.checkpoint.files import CheckpointError
from veratune.cli.output import bytes_text

# A disk with less free space than this is treated as full.
_NEARLY_NOTHING = 1 << 20
# Messages of torch, safetensors and others that replace an OSError.
_NOT_WRITTEN = ("iostream error", "file write failed", "unexpected pos", "os error 28", "No space left", "os error 27")
_OF_SPACE = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file is too large"}


def check_new(directory: Path, otherwise: str = "choose another one") -> None:
    """Raise CheckpointError if the directory is not empty or not writable.

    Args:
        directory: what will be written; it and its parents need not exist, and are not left behind.
        otherwise: what to do about a directory that is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not an empty directory; nothing is overwritten: {otherwise}")
    made: list[Path] = []
    try:
        for path in reversed([directory, *directory.parents]):
            if not path.exists():
                path.mkdir()
                made.append(path)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written ({error.strerror}): choose another directory") from None
    finally:
        for path in reversed(made):
            path.rmdir()


def check_new_file(path: Path) -> None:
    """Raise CheckpointError if a file exists or cannot be created."""
    if os.path.lexists(path):
        raise CheckpointError(f"{path} exists; nothing is overwritten: choose another file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}): choose another file") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the path to errors of a full disk that are raised in this context.

    Raises:
        CheckpointError: the disk is full, or a write failed.
    """
    try:
        yield
    except Exception as error:
        reason = why_not_written(error, path)
        if reason is None:
            raise
        raise CheckpointError(reason) from error


@contextmanager
def writing_new(directory: Path) -> Iterator[None]:
    """Write a directory that `check_new` found empty; if an exception ends this context, empty it again."""
    there = directory.exists()
    try:
        with writing(directory):
            yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        if there:
            directory.mkdir(exist_ok=True)
        raise


def why_not_written(error: Exception, path: Path | None = None) -> str | None:
    """Return a message if an error was caused by a full or failing disk, otherwise None."""
    number = error.errno if isinstance(error, OSError) else None
    words = str(error)
    if number not in _OF_SPACE and not any(theirs in words for theirs in _NOT_WRITTEN):
        return None
    named = getattr(error, "filename", None)
    where = Path(os.fsdecode(named)) if named is not None else path
    known = path or (where.parent if where is not None else None)
    free = None if known is None else _free_bytes(known)
    if number is None and (
        (free is not None and free < _NEARLY_NOTHING) or "os error 28" in words or "No space left" in words
    ):
        number = errno.ENOSPC
    reason = _OF_SPACE[number] if number is not None else "a write failed, as on a full disk"
    left = "" if free is None else f" ({bytes_text(free)} left)"
    return f"{where or 'the output'} cannot be written: {reason}{left}"


def _free_bytes(path: Path) -> int | None:
    try:
        absolute = path.absolute()
        return shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free
    except OSError:
        return None
