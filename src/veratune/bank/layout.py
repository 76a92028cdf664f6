"""The layout of a bank's rows, each of which holds the values of one adapter in the same order."""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from veratune.adapters.names import unwrapped
from veratune.adapters.target import Target
from veratune.bank.layers import BANKED_LAYERS, Columns, part_slices
from veratune.checkpoint.validate import ReadyAdapter
from veratune.layers.registry import layer_class
from veratune.projections import schemes
from veratune.projections.schemes import Scheme
from veratune.utils.tensors import bytes_of, float32_of
from veratune.utils.torch_private import name_in_wrapper


class BankError(ValueError):
    """A bank rejected an operation; the message gives the reason. The bank and its file are unchanged."""


@dataclass(frozen=True)
class LayerColumns:
    """One layer of a bank and the columns of its vectors in a row.

    Attributes:
        name: the layer's name in the model.
        in_features, out_features: the layer's dimensions.
        parts: the outputs of each part; empty if the layer is not fused.
        columns: the columns of each part's vectors.
    """

    name: str
    in_features: int
    out_features: int
    parts: tuple[int, ...]
    columns: tuple[Columns, ...]


@dataclass(frozen=True)
class ModuleColumns:
    """A module in modules_to_save, and the columns of its parameters in the row of saved values.

    Attributes:
        name: the module's name in the model.
        parameters: parameter name to (first column, shape).
    """

    name: str
    parameters: dict[str, tuple[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    """The order of the values in a row.

    Attributes:
        rank: the largest supported rank; d of a smaller rank is padded with zeros.
        layers: the layers, by name.
        modules_to_save: the modules trained in full, by name.
        numbers: the number of vector elements in a row.
        saved_numbers: the number of values of modules_to_save.
    """

    rank: int
    layers: dict[str, LayerColumns]
    modules_to_save: dict[str, ModuleColumns]
    numbers: int
    saved_numbers: int

    def describe(self) -> dict[str, Any]:
        """Return the layout as JSON values, which are equal if and only if the layouts are equal.

        Layers and modules_to_save are lists because their order determines the order of a row.
        """
        return {
            "rank": self.rank,
            "layers": [
                [layer.name, layer.in_features, layer.out_features, list(layer.parts)] for layer in self.layers.values()
            ],
            "modules_to_save": [
                [module.name, [[key, list(shape)] for key, (_, shape) in module.parameters.items()]]
                for module in self.modules_to_save.values()
            ],
        }


def make_layout(targets: Sequence[Target], rank: int, modules_to_save: dict[str, nn.Module]) -> Layout:
    """Lay out the vectors of these layers and the parameters of these modules.

    Raises:
        BankError: a layer or module cannot have a different adapter for each sequence.
    """
    layers: dict[str, LayerColumns] = {}
    position = 0
    for target in targets:
        check_kind(target, f"{target.name} cannot be in a bank")
        columns = []
        for outputs in part_slices(target.parts, target.out_features):
            width = outputs.stop - outputs.start
            columns.append(Columns(position, position + rank, outputs))
            position += rank + width
        layers[target.name] = LayerColumns(
            target.name, target.in_features, target.out_features, target.parts, tuple(columns)
        )
    columns_of: dict[str, ModuleColumns] = {}
    saved_position = 0
    for name, module in modules_to_save.items():
        _check_module(name, module)
        parameters = {}
        for key, parameter in module.named_parameters():
            parameters[key] = saved_position, tuple(parameter.shape)
            saved_position += parameter.numel()
        columns_of[name] = ModuleColumns(name, parameters)
    return Layout(rank, layers, columns_of, position, saved_position)


def check_kind(target: Target, refusal: str) -> None:
    """Raise BankError, starting with `refusal`, if a layer cannot have different vectors for each sequence."""
    module = unwrapped(target.module)
    if target.parameter is not None:
        reason = f"its module {type(module).__name__} reads the parameter itself"
    elif layer_class(module) not in BANKED_LAYERS:
        reason = f"it is a {type(module).__name__}"
    elif "experts" in target.name.split("."):
        reason = "an expert receives selected tokens, which cannot be matched with sequences"
    else:
        return
    raise BankError(
        f"{refusal}: {target.name} is adapted, but {reason}, and only linear layers and Conv1D can have different"
        " vectors for each sequence. Add it to exclude_modules"
    )


def _check_module(name: str, module: nn.Module) -> None:
    if any(name_in_wrapper(inner) is not None for inner in module.modules()):
        raise BankError(
            f"modules_to_save: {name} contains a torch wrapper (torch.compile, checkpoint_wrapper,"
            " DataParallel) that renames parameters: create the bank before wrapping modules"
        )
    if any(True for _ in module.buffers()):
        raise BankError(f"modules_to_save: {name} has buffers, but a bank does not support per-adapter buffers")
    if len({parameter.dtype for parameter in module.parameters()}) > 1:
        raise BankError(f"modules_to_save: the parameters of {name} have several dtypes")
    for inner in module.modules():
        if inner is not module and isinstance(inner, nn.Embedding):
            raise BankError(f"modules_to_save: {name} contains an embedding, which a bank does not support")


@dataclass(frozen=True)
class AdapterRow:
    """One adapter as stored in a bank.

    Attributes:
        digest: 32 hexadecimal digits of a hash of its values and its scheme.
        scheme: the scheme of its projections.
        rank: its largest rank.
        vectors: (numbers,), on the CPU, in the bank's dtype.
        saved: (saved_numbers,), the values of modules_to_save; None without modules_to_save.
    """

    digest: str
    scheme: Scheme
    rank: int
    vectors: Tensor
    saved: Tensor | None


def make_row(layout: Layout, ready: ReadyAdapter, dtype: torch.dtype, base_saved: Tensor | None) -> AdapterRow:
    """Return an adapter's row.

    Args:
        layout: the bank's layout.
        ready: the adapter, checked against the model.
        dtype: the dtype of the bank's vectors.
        base_saved: the base model's values of modules_to_save, used for modules that the adapter does not train.

    Raises:
        BankError: the adapter does not fit this bank.
    """
    loaded, scheme = ready.loaded, ready.plan.scheme
    _check_fits(layout, ready)
    row = np.zeros(layout.numbers, np.float32)  # for slices this small, numpy is several times faster than torch
    rank = 0
    for target in ready.plan.targets:
        layer = layout.layers[target.name]
        vectors_of_layer = loaded.vectors[target.name]
        values = float32_of(vectors_of_layer["b"])
        scaled = float32_of(vectors_of_layer["d"]).reshape(-1, target.r) * scheme.scale(target.r)
        rank = max(rank, target.r)
        for columns, part in zip(layer.columns, scaled, strict=True):
            row[columns.d : columns.d + target.r] = part
            row[columns.b : columns.b + columns.outputs.stop - columns.outputs.start] = values[columns.outputs]
    saved = None
    if base_saved is not None:
        saved = base_saved.detach().cpu().clone()
        for name, state in loaded.saved.items():
            for key, (start, shape) in layout.modules_to_save[name].parameters.items():
                saved[start : start + math.prod(shape)] = state[key].reshape(-1).to(saved.dtype)
    vectors = torch.from_numpy(row).to(dtype)
    for what, tensor in (("vectors", vectors), ("modules_to_save", saved)):
        if tensor is not None and not tensor.abs().amax().isfinite():
            raise BankError(f"{loaded.origin}: its {what} are not finite in the bank's dtype {tensor.dtype}")
    return AdapterRow(digest_of(scheme, vectors, saved), scheme, rank, vectors, saved)


def digest_of(scheme: Scheme, vectors: Tensor, saved: Tensor | None) -> str:
    """Return the digest of a row."""
    tensors = [bytes_of(tensor) for tensor in (vectors, saved) if tensor is not None]
    return digest_of_bytes(scheme, vectors.dtype, tensors)


def digest_of_bytes(scheme: Scheme, dtype: torch.dtype, tensors: Iterable[bytes]) -> str:
    """Return the digest of a row, given its vectors and its values of modules_to_save, if any, as bytes."""
    sha = hashlib.sha256(_digest_prefix(scheme.fingerprint(), dtype))
    for tensor in tensors:
        sha.update(tensor)
    return sha.hexdigest()[:32]


@functools.lru_cache(maxsize=256)
def _digest_prefix(fingerprint: str, dtype: torch.dtype) -> bytes:
    return json.dumps([fingerprint, str(dtype)]).encode()


def saved_row(layout: Layout, modules: dict[str, nn.Module]) -> Tensor | None:
    """Return the base model's values of modules_to_save as one row; None without modules_to_save."""
    parameters = [p.detach().reshape(-1) for name in layout.modules_to_save for p in modules[name].parameters()]
    if not parameters:
        return None
    if len({parameter.dtype for parameter in parameters}) > 1:
        raise BankError("modules_to_save: the modules have several dtypes")
    if any(parameter.is_meta for parameter in parameters):
        raise BankError(
            f"modules_to_save: {list(layout.modules_to_save)} are on the meta device (offloaded), but adapters that do"
            " not train them need their values"
        )
    return torch.cat(parameters)


def _check_fits(layout: Layout, ready: ReadyAdapter) -> None:
    origin = ready.loaded.origin
    if ready.loaded.biases:
        raise BankError(
            f"{origin} trains biases (bias={ready.plan.config.bias!r}), but a bank does not support per-adapter biases"
        )
    for target in ready.plan.targets:
        layer = layout.layers.get(target.name)
        if layer is None:
            saved = next((name for name in layout.modules_to_save if f"{target.name}.".startswith(f"{name}.")), None)
            if saved is not None:
                raise BankError(
                    f"{origin} adapts {target.name}, but this bank holds {saved} in full for each adapter: create it"
                    f" without {saved!r} in modules_to_save"
                )
            raise BankError(
                f"{origin} adapts {target.name}, which is not one of the {len(layout.layers)} layers of this bank:"
                " create the bank with target_modules that include it"
            )
        if target.r > layout.rank:
            raise BankError(f"{origin} has rank {target.r} on {target.name}, but this bank's maximum is {layout.rank}")
        if target.parts != layer.parts:
            raise BankError(
                f"{origin} splits the outputs of {target.name} into {shown_parts(target.parts)}, but this bank into"
                f" {shown_parts(layer.parts)}: create the bank with the adapter's fused_parts"
            )
    missing = sorted(ready.loaded.saved.keys() - layout.modules_to_save.keys())
    if missing:
        raise BankError(
            f"{origin} trains {missing} in full, which this bank does not hold for each adapter: create it with"
            f" modules_to_save={missing}"
        )


def shown_parts(parts: tuple[int, ...]) -> str:
    """Return the parts of a layer's outputs for a message."""
    return f"parts of {list(parts)}" if parts else "one part"


def scheme_to_json(scheme: Scheme) -> dict[str, Any]:
    """Return JSON values from which `scheme_from_json` restores the scheme.

    Raises:
        BankError: the projections cannot be drawn from a key.
    """
    try:
        return scheme.to_json()
    except ValueError as error:
        raise BankError(f"{error}, so a bank file cannot hold the adapter. Create the bank without a file") from None


def scheme_from_json(values: dict[str, Any]) -> Scheme:
    """Restore the scheme from the values that `scheme_to_json` returned.

    Raises:
        BankError: this version of veratune draws different values.
    """
    try:
        return schemes.scheme_from_json(values)
    except ValueError as error:
        raise BankError(str(error)) from None
