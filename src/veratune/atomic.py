"""Writing files in one step: whoever is killed at any moment leaves the old file or the new one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a new file beside `path`, then put it in the place of `path` in one step.

    A process that is killed leaves the old file or the new one. A new file that was not finished stays beside it
    under a name that starts with a dot and ends in `.tmp`.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the place of a new file beside `path`, and put it in the place of `path` in one step if nothing is raised.

    What writes there must have closed the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def temporary_beside(path: Path) -> Path:
    """Return a name in the same directory, for a file that is not finished, which nobody else uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def is_there(path: Path) -> bool:
    """Return whether a path is taken; not so where the system refuses to look, as it will refuse to make it as well."""
    try:
        return path.exists()
    except OSError:
        return False


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, in one step and only if no file has it.

    Raises:
        FileExistsError: there is a file of that name.
        OSError: the disk refuses.
    """
    os.link(temporary, path)  # fails where there is a file, unlike a renaming
    temporary.unlink()
    sync_directory(path.parent)


def write_through(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    path.write_bytes(data)
    _sync(path)


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk, where a system can do that."""
    if os.name == "posix":  # elsewhere a directory cannot be opened
        _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
