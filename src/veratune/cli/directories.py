"""Directories that a command is to write: new or empty ones, and writable, before any work is done."""

import tempfile
from pathlib import Path

from veratune.checkpoint.files import CheckpointError


def check_new(directory: Path, otherwise: str = "choose another one") -> None:
    """Raise CheckpointError if something is in the directory, or nothing can be written into it.

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
