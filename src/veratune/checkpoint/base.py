"""The interface of checkpoint formats, and the adapter files that they read."""

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
    """The files in an adapter's directory. Each is opened on first use and read only once."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory, self._stack = directory, stack

    @cached_property
    def weights(self) -> TensorsFile:
        """`adapter_model.safetensors`.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return self._stack.enter_context(open_tensors(self.directory / WEIGHTS_NAME))

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The contents of `adapter_config.json`, or None if there is no such file.

        Raises:
            CheckpointError: the file is not a JSON object.
        """
        path = self.directory / CONFIG_NAME
        return read_json(path, largest=LARGEST_CONFIG) if os.path.lexists(path) else None

    @property
    def peft_type(self) -> Any:
        """The `peft_type` in `adapter_config.json`, or None if it is missing."""
        return None if self.config is None else self.config.get("peft_type")

    def ready(self, make: Ready) -> ReadyAdapter:
        """Create the adapter with `make`; for a large file, check names and shapes before reading the tensors.

        Args:
            make: called with the tensors, and with whether they are on the meta device and only their names and shapes
                can be checked.
        """
        return make(self.weights.tensors(lambda described: make(described, True)), False)


@contextmanager
def open_adapter(directory: Path) -> Iterator[AdapterFiles]:
    """Yield the adapter files in a directory, and close them on exit."""
    with ExitStack() as stack:
        yield AdapterFiles(directory, stack)


@dataclass(frozen=True)
class AdapterContents:
    """The contents of an adapter's files, read without the model. PEFT's common name prefix is removed.

    Attributes:
        path: the file that holds the tensors.
        format: the format's name.
        config: the settings in the files.
        vectors: layer name to the layer's tensors by name: `b` and `d`, or the matrices of a LoRA.
        others: tensors of modules_to_save, by their names in the file.
        projections: the tensors A and B, if the file has them.
        fingerprint: the projections' fingerprint, if the files state it.
        base: the files' information about the base model's class.
        format_version: the version of veratune's format, for files in that format.
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
        """Return whether an adapter's files, which include `weights_name`, are in this format."""

    @abstractmethod
    def contents(self, files: AdapterFiles) -> AdapterContents:
        """Read the files without a model.

        Raises:
            CheckpointError: the files are damaged.
        """

    def read(self, modules: Mapping[str, nn.Module], files: AdapterFiles) -> ReadyAdapter:
        """Read an adapter and check it against a model, which is not modified.

        Args:
            modules: the result of `base_modules` for the model.
            files: the adapter's files.

        Raises:
            CheckpointError: the files are damaged or for another model, or this format cannot be loaded.
        """
        raise CheckpointError(
            f"{files.directory / self.weights_name} is in the format {self.name!r}, which veratune can inspect but not"
            " load"
        )

    def base(self, files: AdapterFiles) -> dict[str, Any]:
        """Return the base model's `class`, `id2label` and `problem_type`, as far as the files state them."""
        return self.contents(files).base

    @property
    def is_written(self) -> bool:
        """Whether veratune can write this format."""
        return type(self).write is not Format.write

    def write(self, host: AdaptedModel, adapter_name: str, directory: Path) -> None:
        """Write a model's adapter to a directory.

        Raises:
            ValueError: this format cannot be written, or cannot hold this adapter.
        """
        raise ValueError(
            f"adapter {adapter_name!r} cannot be written in the format {self.name!r}, which veratune only reads:"
            " use save_pretrained, which writes veratune's format"
        )
