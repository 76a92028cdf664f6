"""The parameters of one adapter, and the rules for its name."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from veratune.adapters.names import public_state
from veratune.layers.offloading import check_at_hand

_NAME = re.compile(r"[\w\-]{1,128}")
# A file name has at most 255 bytes, and the names of temporary files are longer than the final ones.
_MOST_NAME_BYTES = 255 - 32


@dataclass(frozen=True)
class AdapterState:
    """The parameters of one adapter, by their names in the model without adapters.

    Attributes:
        vectors: layer name to its vectors by name (`b`, `d`).
        saved: module name to the adapter's copy of that module.
        biases: parameter name to the adapter's copy of that bias.
    """

    vectors: dict[str, dict[str, Tensor]]
    saved: dict[str, nn.Module]
    biases: dict[str, nn.Parameter]

    def check_values(self, operation: str) -> None:
        """Raise ValueError if any of the tensors is offloaded or on the meta device.

        Args:
            operation: the operation that needs the values, for the message.
        """
        named = {
            f"vector {which} of {name}": v for name, vectors in self.vectors.items() for which, v in vectors.items()
        }
        for name, module in self.saved.items():
            named.update({f"{name}.{key}": tensor for key, tensor in public_state(module).items()})
        check_at_hand({**named, **self.biases}, operation)

    def parameters(self) -> Iterator[Tensor]:
        for vectors in self.vectors.values():
            yield from vectors.values()
        for module in self.saved.values():
            yield from module.parameters()
        yield from self.biases.values()

    def tensors(self) -> Iterator[Tensor]:
        """Yield the parameters and the buffers of modules that are trained in full."""
        yield from self.parameters()
        for module in self.saved.values():
            yield from module.buffers()


def check_adapter_name(name: str) -> None:
    """Raise ValueError unless the name can be part of a parameter name and the name of a directory."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"adapter_name={name!r} is not allowed: it must be 1 to 128 letters, digits, '_' or '-', because it"
            " becomes part of parameter names and the name of a directory"
        )
    if len(name.encode("utf-8", "surrogatepass")) > _MOST_NAME_BYTES:
        raise ValueError(
            f"adapter_name={name!r} is not allowed: it has {len(name.encode())} bytes in UTF-8, but the name of a"
            f" directory may have at most {_MOST_NAME_BYTES}"
        )
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise ValueError(f"adapter_name={name!r} is not allowed: torch.nn.Module uses this name; choose another")


def as_names(names: str | Sequence[str]) -> list[str]:
    """Return adapter names as a list; a string is a single name."""
    return [names] if isinstance(names, str) else list(names)
