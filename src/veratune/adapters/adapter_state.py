"""The tensors of one adapter, and the rules for its name."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from veratune.layers.offloading import check_at_hand

_NAME = re.compile(r"[\w\-]{1,128}")
# A file name has at most 255 bytes, and the names of temporary files are longer than the final ones.
_MOST_NAME_BYTES = 255 - 32


@dataclass(frozen=True)
class AdapterState:
    """The tensors of one adapter, by their names in the model without adapters.

    Attributes:
        vectors: layer name to its vectors by name (`b`, `d`).
        saved: name of a module trained in full to the state dict of the adapter's copy.
        biases: parameter name to the adapter's copy of that bias.
    """

    vectors: dict[str, dict[str, Tensor]]
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def described(self) -> dict[str, Tensor]:
        """Return the tensors by descriptions for messages."""
        vectors = {
            f"vector {which} of {name}": vector for name, own in self.vectors.items() for which, vector in own.items()
        }
        saved = {f"{name}.{key}": tensor for name, state in self.saved.items() for key, tensor in state.items()}
        return vectors | saved | self.biases

    def check_values(self, operation: str) -> None:
        """Raise ValueError if any of the tensors is offloaded or on the meta device.

        Args:
            operation: the operation that needs the values, for the message.
        """
        check_at_hand(self.described(), operation)

    def parameters(self) -> Iterator[Tensor]:
        """Yield the tensors that are parameters of a model, each once."""
        return (tensor for tensor in self.tensors() if isinstance(tensor, nn.Parameter))

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors, each once, including the buffers of modules that are trained in full."""
        yield from {id(tensor): tensor for tensor in self.described().values()}.values()

    def detached(self) -> "AdapterState":
        """Return the same tensors without their history."""
        return AdapterState(
            {name: {which: v.detach() for which, v in vectors.items()} for name, vectors in self.vectors.items()},
            {name: {key: tensor.detach() for key, tensor in state.items()} for name, state in self.saved.items()},
            {name: bias.detach() for name, bias in self.biases.items()},
        )


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
