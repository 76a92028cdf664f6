"""Replace several files of a directory at once: a process killed at any moment leaves all old or all new files."""

import ctypes
import os
import secrets
import shutil
import sys
from pathlib import Path

from veratune.utils.atomic import sync_directory, temporary_beside, write_atomically, write_through

# Arguments of renameat2 (Linux) and renamex_np (macOS) for exchanging two names.
_AT_FDCWD, _EXCHANGE, _SWAP = -100, 2, 2


def replace_together(directory: Path, files: dict[str, bytes]) -> None:
    """Replace files of a directory, atomically where the system supports it.

    The new files are first written to a temporary directory next to this one, along with hard links to its other files.
    Then the two directories are exchanged. Where this is impossible (a directory with subdirectories, a mount point, a
    file system without exchange), the last of the files is removed first and written last: a process killed in between
    leaves a directory without the last file, never new files along with the old last file.

    Args:
        directory: the destination; created if it does not exist.
        files: name to contents. The last file must be one that every reader requires.
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
    """Write the files by exchanging directories; return False, with nothing changed, if that is impossible."""
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
    """Return whether a directory holds only regular files and does not contain the working directory."""
    working = Path.cwd()
    inside = working == directory or directory in working.parents
    return not inside and all(path.is_file() and not path.is_symlink() for path in directory.iterdir())


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories atomically; return whether it succeeded."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        swap = getattr(libc, "renamex_np", None)
        return swap is not None and swap(*names, _SWAP) == 0
    swap = getattr(libc, "renameat2", None)
    return swap is not None and swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0


def _remove(staged: Path, directory: Path, files: dict[str, bytes]) -> None:
    """Remove the replaced directory; move files that were added to it in the meantime to the new directory."""
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
