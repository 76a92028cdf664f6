"""Writing files in one step: whoever is killed at any moment leaves the old file or the new one."""

import hashlib
import os
import platform
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _machine() -> str:
    """Return eight digits for this machine, and for its set of process numbers where it has several (containers)."""
    try:
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        numbers = ""
    return hashlib.sha256(f"{platform.node()} {numbers}".encode()).hexdigest()[:8]


_HERE = _machine()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a new file beside `path`, then put it in the place of `path` in one step.

    A process that is killed leaves the old file or the new one. A new file that was not finished stays beside it
    under a name that starts with a dot and ends in `.tmp`, until the next one is written there.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the place of a new file beside `path`, and put it in the place of `path` in one step if nothing is raised.

    What writes there must have closed the file.
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
    """Return a name in the same directory, for a file that is not finished, which nobody else uses."""
    return path.with_name(f".{path.name}.{_HERE}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_abandoned(path: Path) -> None:
    """Remove the unfinished files for `path` that processes left which run no more.

    Only names that `temporary_beside` makes are looked at, and only those of this machine, since nobody can say from
    here whether a process of another one still runs. A number that another process has by now keeps its file.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.{_HERE}-(\d{{1,10}})-[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):
        for entry in os.scandir(path.parent):
            found = name.fullmatch(entry.name)
            if found and entry.is_file(follow_symlinks=False) and not _runs(int(found[1])):
                with suppress(OSError):
                    Path(entry.path).unlink()


def _runs(process: int) -> bool:
    """Return whether a process of this number runs; true where a system does not say."""
    if os.name != "posix":
        return True  # there a signal of 0 would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


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
