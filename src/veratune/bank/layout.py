"""The layout of a bank's adapters: one row of numbers each, in the same order for all of them."""

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
    """An operation that a bank refuses, with the reason. The bank and its file are unchanged."""


@dataclass(frozen=True)
class LayerPlace:
    """One layer of a bank and the columns of its vectors in a row.

    Attributes:
        name: the layer's name in the model.
        in_features, out_features: its dimensions.
        parts: the outputs of each part; empty if the layer is not fused.
        columns: the columns of each part's vectors.
    """

    name: str
    in_features: int
    out_features: int
    parts: tuple[int, ...]
    columns: tuple[Columns, ...]


@dataclass(frozen=True)
class HeadPlace:
    """A module of modules_to_save, and the columns of its parameters in a row of heads.

    Attributes:
        name: the module's name in the model.
        parameters: parameter name to (first column, shape).
    """

    name: str
    parameters: dict[str, tuple[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    """The order of a row.

    Attributes:
        rank: the largest rank that fits; d of a smaller one is followed by zeros.
        layers: the layers, by name.
        heads: modules_to_save, by name.
        numbers: the length of a row.
        head_numbers: the length of a row of heads.
    """

    rank: int
    layers: dict[str, LayerPlace]
    heads: dict[str, HeadPlace]
    numbers: int
    head_numbers: int

    def describe(self) -> dict[str, Any]:
        """Return the layout as JSON values, which are equal if and only if the layouts are.

        Layers and modules_to_save are lists, since their order is that of a row.
        """
        return {
            "rank": self.rank,
            "layers": [
                [place.name, place.in_features, place.out_features, list(place.parts)] for place in self.layers.values()
            ],
            "heads": [
                [place.name, [[key, list(shape)] for key, (_, shape) in place.parameters.items()]]
                for place in self.heads.values()
            ],
        }


def make_layout(targets: Sequence[Target], rank: int, heads: dict[str, nn.Module]) -> Layout:
    """Lay out the vectors of these layers and the parameters of these modules.

    Raises:
        BankError: a layer or module cannot have a different adapter for each row.
    """
    layers: dict[str, LayerPlace] = {}
    position = 0
    for target in targets:
        check_kind(target, f"{target.name} cannot be in a bank")
        columns = []
        for outputs in part_slices(target.parts, target.out_features):
            width = outputs.stop - outputs.start
            columns.append(Columns(position, position + rank, outputs))
            position += rank + width
        layers[target.name] = LayerPlace(
            target.name, target.in_features, target.out_features, target.parts, tuple(columns)
        )
    head_places: dict[str, HeadPlace] = {}
    head_position = 0
    for name, module in heads.items():
        _check_head(name, module)
        places = {}
        for key, parameter in module.named_parameters():
            places[key] = head_position, tuple(parameter.shape)
            head_position += parameter.numel()
        head_places[name] = HeadPlace(name, places)
    return Layout(rank, layers, head_places, position, head_position)


def check_kind(target: Target, refusal: str) -> None:
    """Raise BankError, beginning with `refusal`, for a layer that cannot have different vectors for each row."""
    module = unwrapped(target.module)
    if target.parameter is not None:
        reason = f"its module {type(module).__name__} reads the parameter itself"
    elif layer_class(module) not in BANKED_LAYERS:
        reason = f"it is a {type(module).__name__}"
    elif "experts" in target.name.split("."):
        reason = "an expert is given chosen tokens, which do not say which row they are of"
    else:
        return
    raise BankError(
        f"{refusal}: {target.name} is adapted, but {reason}, and only linear layers and Conv1D can be given other"
        " vectors for each row. Name it in exclude_modules"
    )


def _check_head(name: str, module: nn.Module) -> None:
    if any(name_in_wrapper(inner) is not None for inner in module.modules()):
        raise BankError(
            f"modules_to_save: {name} has one of torch's wrappers in it (torch.compile, checkpoint_wrapper,"
            " DataParallel), whose parameters files have other names for: make the bank before you wrap modules"
        )
    if any(True for _ in module.buffers()):
        raise BankError(f"modules_to_save: {name} has buffers, which a bank cannot hold for each adapter")
    if len({parameter.dtype for parameter in module.parameters()}) > 1:
        raise BankError(f"modules_to_save: the parameters of {name} are of several dtypes")
    for inner in module.modules():
        if inner is not module and isinstance(inner, nn.Embedding):
            raise BankError(
                f"modules_to_save: {name} has an embedding in it, which a bank cannot hold for each adapter"
            )


@dataclass(frozen=True)
class AdapterRow:
    """One adapter as stored in a bank.

    Attributes:
        digest: 32 hexadecimal digits of a hash over all of it.
        scheme: its projections.
        rank: its largest rank.
        vectors: (numbers,), on the CPU, in the bank's dtype.
        heads: (head_numbers,), the values of modules_to_save, or None if the bank has none.
    """

    digest: str
    scheme: Scheme
    rank: int
    vectors: Tensor
    heads: Tensor | None


def make_row(layout: Layout, ready: ReadyAdapter, dtype: torch.dtype, base_heads: Tensor | None) -> AdapterRow:
    """Return an adapter's row.

    Args:
        layout: the bank's.
        ready: the adapter, checked against the model.
        dtype: the dtype of the bank's vectors.
        base_heads: the base model's row of heads, whose values fill in for modules that the adapter does not train.

    Raises:
        BankError: the adapter does not fit this bank.
    """
    loaded, scheme = ready.loaded, ready.plan.scheme
    _check_fits(layout, ready)
    row = np.zeros(layout.numbers, np.float32)  # torch takes several times as long for such small slices
    rank = 0
    for target in ready.plan.targets:
        place = layout.layers[target.name]
        own = loaded.vectors[target.name]
        own_b = float32_of(own["b"])
        scaled = float32_of(own["d"]).reshape(-1, target.r) * scheme.scale(target.r)
        rank = max(rank, target.r)
        for columns, own_d in zip(place.columns, scaled, strict=True):
            row[columns.d : columns.d + target.r] = own_d
            row[columns.b : columns.b + columns.outputs.stop - columns.outputs.start] = own_b[columns.outputs]
    heads = None
    if base_heads is not None:
        heads = base_heads.detach().cpu().clone()
        for name, state in loaded.saved.items():
            for key, (start, shape) in layout.heads[name].parameters.items():
                heads[start : start + math.prod(shape)] = state[key].reshape(-1).to(heads.dtype)
    vectors = torch.from_numpy(row).to(dtype)
    for what, tensor in (("vectors", vectors), ("heads", heads)):
        if tensor is not None and not tensor.abs().amax().isfinite():
            raise BankError(f"{loaded.origin}: its {what} are not finite in the bank's dtype {tensor.dtype}")
    return AdapterRow(digest_of(scheme, vectors, heads), scheme, rank, vectors, heads)


def digest_of(scheme: Scheme, vectors: Tensor, heads: Tensor | None) -> str:
    """Return the digest of a row."""
    tensors = [bytes_of(tensor) for tensor in (vectors, heads) if tensor is not None]
    return digest_of_bytes(scheme, vectors.dtype, tensors)


def digest_of_bytes(scheme: Scheme, dtype: torch.dtype, tensors: Iterable[bytes]) -> str:
    """Return the digest of a row of which the vectors, of this dtype, and the heads, if any, are given as bytes."""
    sha = hashlib.sha256(json.dumps([scheme.fingerprint(), str(dtype)]).encode())
    for tensor in tensors:
        sha.update(tensor)
    return sha.hexdigest()[:32]


def head_row(layout: Layout, modules: dict[str, nn.Module]) -> Tensor | None:
    """Return the base model's row of heads; None without modules_to_save."""
    parameters = [p.detach().reshape(-1) for name in layout.heads for p in modules[name].parameters()]
    if not parameters:
        return None
    if len({parameter.dtype for parameter in parameters}) > 1:
        raise BankError("modules_to_save: the modules are of several dtypes")
    if any(parameter.is_meta for parameter in parameters):
        raise BankError(
            f"modules_to_save: {list(layout.heads)} have no values, being on the meta device (offloaded), and adapters"
            " without heads of their own need them"
        )
    return torch.cat(parameters)


def _check_fits(layout: Layout, ready: ReadyAdapter) -> None:
    origin = ready.loaded.origin
    if ready.loaded.biases:
        raise BankError(
            f"{origin} trains biases (bias={ready.plan.config.bias!r}), which a bank does not hold for each adapter"
        )
    for target in ready.plan.targets:
        place = layout.layers.get(target.name)
        if place is None:
            head = next((name for name in layout.heads if f"{target.name}.".startswith(f"{name}.")), None)
            if head is not None:
                raise BankError(
                    f"{origin} adapts {target.name}, but this bank holds {head} in full for each adapter: make it"
                    f" without {head!r} in modules_to_save"
                )
            raise BankError(
                f"{origin} adapts {target.name}, which is not one of the {len(layout.layers)} layers of this bank: make"
                " the bank with target_modules that include it"
            )
        if target.r > layout.rank:
            raise BankError(f"{origin} has the rank {target.r} on {target.name}; this bank holds up to {layout.rank}")
        if target.parts != place.parts:
            raise BankError(
                f"{origin} has {len(target.parts) or 1} parts on {target.name}, this bank {len(place.parts) or 1}"
            )
    missing = sorted(ready.loaded.saved.keys() - layout.heads.keys())
    if missing:
        raise BankError(
            f"{origin} trains {missing} in full, which this bank does not hold for each adapter: make it with"
            f" modules_to_save={missing}"
        )


def scheme_to_json(scheme: Scheme) -> dict[str, Any]:
    """Return JSON values from which `scheme_from_json` restores the scheme.

    Raises:
        BankError: the projections cannot be drawn from a key.
    """
    try:
        return scheme.to_json()
    except ValueError as error:
        raise BankError(f"{error}, so that a bank's file cannot hold the adapter. A bank in memory takes it") from None


def scheme_from_json(values: dict[str, Any]) -> Scheme:
    """Undo `scheme_to_json`.

    Raises:
        BankError: this version of veratune draws other values.
    """
    try:
        return schemes.scheme_from_json(values)
    except ValueError as error:
        raise BankError(str(error)) from None
