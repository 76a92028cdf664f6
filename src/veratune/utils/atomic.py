"""Atomic writes: a process killed at any moment leaves either the old file or the new one."""

import hashlib
import os
import platform
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _machine() -> str:
    """Return eight hexadecimal digits that identify this machine and PID namespace (containers have different ones)."""
    try:
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{platform.node()} {numbers}".encode()).hexdigest()[:8]


_HERE = _machine()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a temporary file next to `path`, then atomically rename it to `path`.

    A process that is killed leaves the old file or the new one. Its unfinished file has a name that starts with a dot
    and ends in `.tmp`; the next write to `path` removes it.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; atomically rename it to `path` on success.

    The caller must close the file before the context ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def temporary_beside(path: Path) -> Path:
    """Return an unused name in the same directory for an unfinished file."""
    return path.with_name(f".{path.name}.{_HERE}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_abandoned(path: Path) -> None:
    """Remove unfinished files for `path` that were left by processes no longer running.

    Only names made by `temporary_beside` on this machine are considered, since processes on other machines cannot be
    checked from here. If the PID has been reused, the file is kept.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.{_HERE}-(\d{{1,10}})-[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        for entry in os.scandir(path.parent):
            found = name.fullmatch(entry.name)
            if found and entry.is_file(follow_symlinks=False) and not _runs(int(found[1])):
                with suppress(OSError):
                    Path(entry.path).unlink()


def _runs(process: int) -> bool:
    """Return whether a process with this PID is running, or True if that cannot be determined."""
    if os.name != "posix":
        return True  # on Windows, os.kill with signal 0 would terminate the process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def is_there(path: Path) -> bool:
    """Return whether a path exists; False if access is denied, because creating the path will then fail as well."""
    try:
        return path.exists()
    except OSError:
        return False


def publish(temporary: Path, path: Path) -> None:
    """Atomically move a finished file to `path`, without overwriting an existing file.

    Raises:
        FileExistsError: `path` exists.
        OSError: the file system reported an error.
    """
    os.link(temporary, path)  # fails if `path` exists, unlike a rename
    temporary.unlink()
    sync_directory(path.parent)


def write_through(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk."""
    path.write_bytes(data)
    _sync(path)


def sync_directory(directory: Path) -> None:
    """Flush the entries of a directory to disk, where the system supports it."""
    if os.name == "posix":  # on other systems, directories cannot be opened
        _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
