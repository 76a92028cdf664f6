"""The interface of checkpoint formats, and the files of an adapter that they read."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from veratune.adapters.adapted_model import AdaptedModel
from veratune.checkpoint.files import (
    CONFIG_NAME,
    LARGEST_CONFIG,
    WEIGHTS_NAME,
    CheckpointError,
    TensorsFile,
    open_tensors,
    read_json,
)
from veratune.checkpoint.validate import ReadyAdapter

Ready = Callable[[dict[str, Tensor], bool], ReadyAdapter]


class AdapterFiles:
    """The files in an adapter's directory. Each is opened when it is first needed, and read once."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory, self._stack = directory, stack

    @cached_property
    def weights(self) -> TensorsFile:
        """`adapter_model.safetensors`.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return self._stack.enter_context(open_tensors(self.directory / WEIGHTS_NAME))

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The contents of `adapter_config.json`, or None if there is no such file.

        Raises:
            CheckpointError: it is not a JSON object.
        """
        path = self.directory / CONFIG_NAME
        return read_json(path, largest=LARGEST_CONFIG) if os.path.lexists(path) else None

    @property
    def peft_type(self) -> Any:
        """The `peft_type` in `adapter_config.json`, or None without one."""
        return None if self.config is None else self.config.get("peft_type")

    def ready(self, make: Ready) -> ReadyAdapter:
        """Make the adapter with `make`; for a large file, check names and shapes before reading its tensors.

        Args:
            make: called with the tensors, and with whether they are on the meta device, so that only names and shapes
                can be checked.
        """
        return make(self.weights.tensors(lambda described: make(described, True)), False)


@contextmanager
def open_adapter(directory: Path) -> Iterator[AdapterFiles]:
    """Yield the files of a directory, and close them at the end."""
    with ExitStack() as stack:
        yield AdapterFiles(directory, stack)


@dataclass(frozen=True)
class AdapterContents:
    """The contents of an adapter's files, read without the model. PEFT's common prefix of names is removed.

    Attributes:
        path: the file that holds the tensors.
        format: the format's name.
        config: the settings in the files.
        vectors: layer name to its tensors by name: `b` and `d`, or the matrices of a LoRA.
        others: tensors of modules_to_save, by their names in the file.
        projections: the tensors A and B, if the file has them.
        fingerprint: the projections' fingerprint, if a file has it.
        base: information in the files on the base model's class.
        format_version: the version of veratune's format.
    """

    path: Path
    format: str
    config: dict[str, Any]
    vectors: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor] = field(default_factory=dict)
    projections: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: str | None = None
    base: dict[str, Any] = field(default_factory=dict)
    format_version: int | None = None


class Format(ABC):
    """A checkpoint format: everything that depends on the format of an adapter's files.

    Attributes:
        name: its key in `FORMATS`.
        weights_name: the file that every adapter in this format has.
        about: a note that `veratune inspect` prints with the contents; may be empty.
    """

    name: ClassVar[str]
    weights_name: ClassVar[str] = WEIGHTS_NAME
    about: ClassVar[str] = ""

    @abstractmethod
    def detect(self, files: AdapterFiles) -> bool:
        """Return whether files, which include `weights_name`, are in this format."""

    @abstractmethod
    def contents(self, files: AdapterFiles) -> AdapterContents:
        """Read the files without a model.

        Raises:
            CheckpointError: they are damaged.
        """

    def read(self, modules: Mapping[str, nn.Module], files: AdapterFiles) -> ReadyAdapter:
        """Read an adapter and check it against a model, which is not changed.

        Args:
            modules: what `base_modules` returns for the model.
            files: the adapter's files.

        Raises:
            CheckpointError: the files are damaged, or for another model, or this format cannot be loaded.
        """
        raise CheckpointError(
            f"{files.directory / self.weights_name} is in the format {self.name!r}, which veratune can inspect but not"
            " load"
        )

    def base(self, files: AdapterFiles) -> dict[str, Any]:
        """Return those of the base model's `class`, `id2label` and `problem_type` that the files state."""
        return self.contents(files).base

    @property
    def is_written(self) -> bool:
        """Whether veratune can write this format."""
        return type(self).write is not Format.write

    def write(self, host: AdaptedModel, adapter_name: str, directory: Path) -> None:
        """Write an adapter of a model into a directory.

        Raises:
            ValueError: this format cannot be written, or cannot hold this adapter.
        """
        raise ValueError(
            f"adapter {adapter_name!r} cannot be written in the format {self.name!r}, which veratune only reads:"
            " save_pretrained writes veratune's format"
        )
