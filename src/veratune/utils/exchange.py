"""Replacing several files of a directory at once: whoever is killed at any moment leaves all old or all new ones."""

import ctypes
import os
import secrets
import shutil
import sys
from pathlib import Path

from veratune.utils.atomic import sync_directory, temporary_beside, write_atomically, write_through

# What renameat2 (Linux) and renamex_np (macOS) call the exchange of two names.
_AT_FDCWD, _EXCHANGE, _SWAP = -100, 2, 2


def replace_together(directory: Path, files: dict[str, bytes]) -> None:
    """Write files into a directory in place of those that are there, in one step where the system can do that.

    The files are complete on the disk, in a directory next to this one, before anything old is touched. Then the two
    directories change places; what else was in the old one is in both. Where they cannot (a directory with folders in
    it, a mount point, a file system without such an exchange), the last of the files goes first and comes last: a
    process killed in between leaves none of it, and never the new ones with the old last one.

    Args:
        directory: where to; made if need be.
        files: name to contents, the one without which the others are not read last.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    changed = {name: data for name, data in files.items() if not _holds(directory / name, data)}
    if len(changed) <= 1 and directory.is_dir():
        for name, data in changed.items():
            write_atomically(directory / name, data)
    elif not _exchanged(directory, files):
        _one_by_one(directory, files)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def _exchanged(directory: Path, files: dict[str, bytes]) -> bool:
    """Write the files by exchanging directories; return False, with nothing changed, where that is not possible."""
    if directory.exists() and not _exchangeable(directory):
        return False
    staged = directory.with_name(f".{directory.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        staged.mkdir()
    except OSError:
        return False
    try:
        for name, data in files.items():
            write_through(staged / name, data)
        if directory.exists():
            shutil.copymode(directory, staged)
            for path in directory.iterdir():
                if path.name not in files:
                    os.link(path, staged / path.name)
            sync_directory(staged)
            done = _exchange(staged, directory)
        else:
            sync_directory(staged)
            staged.rename(directory)
            done = True
    except OSError:
        done = False
    finally:
        _remove(staged, directory, files)
    if done:
        sync_directory(directory.parent)
    return done


def _exchangeable(directory: Path) -> bool:
    """Return whether a directory holds nothing but files, and is not where this process works."""
    working = Path.cwd()
    inside = working == directory or directory in working.parents
    return not inside and all(path.is_file() and not path.is_symlink() for path in directory.iterdir())


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step; return whether they have."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        swap = getattr(libc, "renamex_np", None)
        return swap is not None and swap(*names, _SWAP) == 0
    swap = getattr(libc, "renameat2", None)
    return swap is not None and swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0


def _remove(staged: Path, directory: Path, files: dict[str, bytes]) -> None:
    """Remove what is in the other directory now; what somebody has put there in the meantime goes to the right one."""
    if not staged.is_dir():
        return
    for path in list(staged.iterdir()):
        if path.name in files or (directory / path.name).exists():
            path.unlink()
        else:
            path.replace(directory / path.name)
    staged.rmdir()


def _one_by_one(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    new = {name: temporary_beside(directory / name) for name in files}
    last = list(files)[-1]
    try:
        for name, data in files.items():
            write_through(new[name], data)
        (directory / last).unlink(missing_ok=True)
        sync_directory(directory)
        for name in files:
            new[name].replace(directory / name)
            sync_directory(directory)
    finally:
        for path in new.values():
            path.unlink(missing_ok=True)
