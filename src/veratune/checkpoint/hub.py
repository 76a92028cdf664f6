"""Find an adapter's directory locally or on the Hugging Face Hub, and upload adapters."""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from veratune.checkpoint.files import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, CheckpointError
from veratune.checkpoint.formats import adapter_directory, file_names
from veratune.utils.text import shown

_HUB_NAME = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*)?")
_REVISION = re.compile(r"\w[\w./+\-]{0,254}")


def find_directory(
    path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the local directory of an adapter, downloaded from the Hub unless `path` is a directory.

    The output directory of `veratune train` means the adapter in it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `subfolder` is outside the directory, or `revision` is not a valid name.
        CheckpointError: no such directory or repository exists.
    """
    for argument, value in (("path", os.fspath(path)), ("subfolder", subfolder or None), ("revision", revision)):
        _check_text(argument, value)
    inside = _checked_subfolder(subfolder)
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ValueError(f"revision={shown(revision)} is not allowed: it must be a branch, a tag or a commit")
    local = Path(path)
    try:
        is_directory = local.is_dir()
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"{shown(str(path))} cannot be opened: {error.strerror}") from None
    if is_directory:
        found = local / inside
        if not found.is_dir():
            raise CheckpointError(f"{local} has no subfolder {subfolder!r}")
        return adapter_directory(found)
    if local.exists():
        raise CheckpointError(f"{local} is a file; pass the directory that contains {WEIGHTS_NAME}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    prefix = f"{inside}/" if subfolder else ""
    try:
        snapshot = snapshot_download(
            str(path),
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[prefix + name for name in file_names()],
        )
    except HFValidationError:
        raise CheckpointError(f"{path} is neither a local directory nor the name of a Hub repository") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a local directory, and could not be downloaded from the Hub: {error}"
        ) from error
    return Path(snapshot) / inside


def _check_text(argument: str, value: object) -> None:
    """Raise an error unless an argument that becomes part of a path or URL is None or printable text."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{argument}={shown(value)} is not allowed: it must be a string")
    if value is not None and (not value or not value.isprintable()):
        raise ValueError(f"{argument}={shown(value)} is not allowed: it is empty or contains control characters")


def _checked_subfolder(subfolder: str | None) -> PurePosixPath:
    inside = PurePosixPath((subfolder or ".").replace("\\", "/"))
    # The Hub client interprets parts of the path as patterns.
    if inside.is_absolute() or ".." in inside.parts or any(mark in str(inside) for mark in ":*?[]"):
        raise ValueError(f"subfolder={subfolder!r} is not allowed: it must stay inside the adapter's directory")
    return inside


def hub_name(base: str | None) -> str | None:
    """Return a base model's name if it is a Hub repository name, or None if it is a local path."""
    if base and _HUB_NAME.fullmatch(base) and not Path(base).exists():
        return base
    return None


def upload_directory(directory: Path, repo_id: str, **settings: Any) -> str:
    """Upload a directory's adapter files to a Hub repository, created if needed, and return the commit's URL.

    Args:
        directory: the directory.
        repo_id: "owner/name" on the Hub.
        settings: `private`, `token`, `revision`, `commit_message`, `create_pr`, as in `huggingface_hub`.
    """
    from huggingface_hub import HfApi

    private, token = settings.pop("private", None), settings.pop("token", None)
    unknown = set(settings) - {"revision", "commit_message", "create_pr"}
    if unknown:
        raise TypeError(f"push_to_hub got unexpected arguments {sorted(unknown)}")
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    names = [CARD_NAME, CONFIG_NAME, WEIGHTS_NAME]
    patterns = [*names, *(f"*/{name}" for name in names)]
    commit = api.upload_folder(repo_id=repository, folder_path=directory, allow_patterns=patterns, **settings)
    return str(commit.commit_url)
