"""Read and write files safely: writes are atomic, and contents are checked before use."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from veratune.checkpoint.header import memory_of_machine, read_header
from veratune.utils.atomic import remove_abandoned, write_atomically
from veratune.utils.exchange import replace_together
from veratune.utils.outside_files import LARGEST_TEXT, OutsideFileError, opened, parse_json, read_bounded
from veratune.utils.sharding import all_gathered, is_emptied
from veratune.utils.text import clipped

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
LARGEST_CONFIG = 16 << 20
_LARGE = 16 << 20

Check = Callable[[dict[str, Tensor]], object]


class CheckpointError(ValueError):
    """A file cannot be used. The model that it was to be loaded into is unchanged.

    A message that is too long because of names or values from a file is shortened.
    """

    def __init__(self, message: str) -> None:
        super().__init__(clipped(message))


def write_pair(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write PEFT's two files, which do not reference each other, as one change.

    If the process is killed, the old pair or the new one remains. On a system that cannot exchange both at once, the
    configuration may be missing, which every reader rejects, but it never belongs to an adapter other than the weights.
    """
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        remove_abandoned(directory / name)
    replace_together(
        directory, {WEIGHTS_NAME: _tensor_bytes(tensors, {"format": "pt"}), CONFIG_NAME: _json_bytes(config)}
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    write_atomically(path, text.encode())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically, indented."""
    write_atomically(path, _json_bytes(value))


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    write_atomically(path, _tensor_bytes(tensors, metadata))


def _tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    # Copies, because the format does not support tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return save(copies, metadata)


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor detached and, if sharded (FSDP2, ZeRO-3), gathered; all processes must call this."""
    if is_emptied(tensor):
        with all_gathered([tensor]):
            return tensor.detach().clone()
    here = tensor.detach()
    gather = getattr(here, "full_tensor", None)
    return here if gather is None else gather()


def read_json(path: Path, *, finite: bool = True, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        finite: whether to reject NaN and infinity, which other libraries' logs may contain.
        largest: the maximum size in bytes.

    Raises:
        CheckpointError: the file is missing, or not a JSON object.
    """
    try:
        value = parse_json(read_bounded(path, largest), finite=finite)
    except OutsideFileError as error:
        raise CheckpointError(str(error)) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


class TensorsFile:
    """An open safetensors file whose header has been checked; its tensors are read on request."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self._file, self._size = path, file, size
        with self._errors():
            self._header = read_header(file, size)

    @property
    def metadata(self) -> dict[str, str]:
        return self._header.metadata

    def tensors(self, check: Check | None = None) -> dict[str, Tensor]:
        """Read the tensors into CPU memory.

        Args:
            check: called with the tensors of a large file on the meta device, before memory is allocated for them;
                raises an error to reject them.

        Raises:
            CheckpointError: the file is damaged, or larger than this machine's memory.
        """
        with self._errors():
            if check is not None and self._size > _LARGE:
                check(self._header.described())
            if self._size > memory_of_machine():
                raise CheckpointError(f"{self.path} has {self._size:,} bytes, more than this machine's memory")
            self._file.seek(0)
            return dict(sorted(load(self._file.read(self._size)).items()))  # `load` returns them in another order

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except MemoryError:
            raise CheckpointError(f"{self.path} does not fit into memory") from None
        except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path} is not a valid safetensors file: {error}") from None


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorsFile]:
    """Open a safetensors file and check its header.

    Raises:
        CheckpointError: the file is missing, truncated, or in another format.
    """
    with ExitStack() as stack:
        try:
            file, size = stack.enter_context(opened(path))
        except OutsideFileError as error:
            raise CheckpointError(str(error)) from None
        yield TensorsFile(path, file, size)
