"""What every checkpoint format implements, and what it reads: an adapter's open files."""

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
    """The files in an adapter's directory. Each is opened when first needed, and read once."""

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
        """What `adapter_config.json` holds, or None if there is no such file.

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
        """Check the tensors with `make`, those of a large file by their names and shapes before they are read.

        Args:
            make: called with tensors and with whether they are on the meta device, so that only names and shapes can
                be checked.
        """
        return make(self.weights.tensors(lambda described: make(described, True)), False)


@contextmanager
def open_adapter(directory: Path) -> Iterator[AdapterFiles]:
    """Yield the files of a directory, closed at the end."""
    with ExitStack() as stack:
        yield AdapterFiles(directory, stack)


@dataclass(frozen=True)
class AdapterContents:
    """What an adapter's files hold, read without the model. Names in PEFT's files are without their common prefix.

    Attributes:
        path: the file that holds the tensors.
        format: the format's name.
        config: the settings, as the files have them.
        vectors: layer name to its tensors by name: `b` and `d`, or the matrices of a LoRA.
        others: tensors of the modules trained in full, by their names in the file.
        projections: tensors of A and B, where the file has them.
        fingerprint: of the projections, where a file says it.
        base: what the files state about the base model's class.
        format_version: of veratune's own format.
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
    """A checkpoint format. Everything that depends on the format of an adapter's files is asked here.

    Attributes:
        name: its key in `FORMATS`.
        weights_name: the file that every adapter in this format has.
        about: what `veratune inspect` says of it besides its contents; may be empty.
    """

    name: ClassVar[str]
    weights_name: ClassVar[str] = WEIGHTS_NAME
    about: ClassVar[str] = ""

    @abstractmethod
    def detect(self, files: AdapterFiles) -> bool:
        """Return whether files are in this format. `weights_name` exists among them."""

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
            f"{files.directory / self.weights_name} is in the format {self.name!r}, which veratune lists but does not"
            " load"
        )

    def base(self, files: AdapterFiles) -> dict[str, Any]:
        """Return the base model's `class`, `id2label` and `problem_type`, those that the files state."""
        return self.contents(files).base

    @property
    def is_written(self) -> bool:
        """Whether veratune writes this format, and does not only read it."""
        return type(self).write is not Format.write

    def write(self, host: AdaptedModel, adapter_name: str, directory: Path) -> None:
        """Write an adapter of a model into a directory.

        Raises:
            ValueError: this format cannot be written, or cannot hold this adapter.
        """
        raise ValueError(
            f"adapter {adapter_name!r} cannot be written in the format {self.name!r}, which veratune only reads:"
            " save_pretrained writes veratune's own format"
        )
