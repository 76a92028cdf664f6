"""The interface of a projection scheme: a description from which A and B can be drawn at any time."""

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor

from veratune.projections.structure import DENSE, Structure
from veratune.utils.tensors import bytes_of

Side = Literal["A", "B"]
# The keys that both Philox and torch.Generator accept.
KEYS = range(-(1 << 63), 1 << 64)


class Scheme(ABC):
    """A pair of frozen random matrices A and B, unbounded or of a fixed size, described by a few numbers.

    To add a scheme, write a subclass, which must be a frozen dataclass, in a file of this package. Add it to `SCHEMES`
    if configurations may name it.

    Attributes:
        name: the value of `VeraConfig.projection` that selects it, and its name in files.
        one_rank_linear_only: whether it supports only unfused linear layers that all have the same rank, as in PEFT.
        has_columns: whether individual columns of A can be drawn, which embeddings need.
        drawn_by_peft: whether PEFT draws the same A and B from the same key.
        ordered_by_rank: whether the structure orders rows differently for each rank, so that views of different ranks
            share no storage.
        settings: the fields of `VeraConfig` that only this scheme uses; `for_layers` takes them as keywords.
    """

    name: ClassVar[str]
    one_rank_linear_only: ClassVar[bool] = False
    has_columns: ClassVar[bool] = False
    drawn_by_peft: ClassVar[bool] = False
    ordered_by_rank: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def for_layers(cls, key: int, r: int, max_in: int, max_out: int) -> Self:
        """Return the scheme for a configuration's key, and layers up to this rank and these widths."""
        raise NotImplementedError(f"{cls.name!r} projections are not drawn from a key")

    def storage_width(self, side: Side, features: int) -> int:
        """Return the row length of the pool's tensor for layers with this many features."""
        return self.stored_columns(side, features)

    def stored_columns(self, side: Side, features: int) -> int:
        """Return the number of stored elements in each row for a layer with this many features."""
        return features

    def structure(self, side: Side, rank: int, features: int) -> Structure:
        """Return how the projection (rank, features) of one layer is stored."""
        return DENSE

    @abstractmethod
    def draw(self, side: Side, rows: range, width: int, device: torch.device) -> Tensor:
        """Draw the stored elements of A or B for these rank indices, float32 (len(rows), columns).

        Args:
            side: A or B.
            rows: the rank indices.
            width: a storage width; the result has `stored_columns(side, width)` columns.
            device: device of the result.
        """

    def one_hot_columns(self, rank: int, columns: Tensor) -> Tensor:
        """Return A's columns for one-hot inputs, float32 (rank, n), without drawing the others.

        Args:
            rank: number of rows.
            columns: int64 (n,), the column indices.
        """
        raise NotImplementedError(f"{self.name!r} projections cannot be drawn column by column")

    @abstractmethod
    def scale(self, rank: int) -> float:
        """Return the constant factor of B. The stored B does not include it; every formula multiplies d by it."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change whenever any of the projections changes."""

    def scale_in_shared_pair(self, in_features: int, rank: int, max_in: int, max_rank: int) -> float | None:
        """Return the factor for d if a layer uses slices of the largest layer's A and B.

        PEFT's VeRA stores one pair of projections, of which each layer uses the first rows and columns. Return None if
        the projections of layers with different shapes are not slices of one pair.

        Args:
            in_features, rank: the layer's width and rank.
            max_in, max_rank: the width and rank of the shared A.
        """
        return None

    def reaches(self, side: Side, features: int) -> bool:
        """Return whether A or B is wide enough for a layer with this many features."""
        return True

    def largest_rank(self, rank: int) -> int:
        """Return how many of the first `rank` rows exist."""
        return rank

    @classmethod
    def allowed_values(cls, r: int, max_in: int, max_out: int) -> dict[str, range]:
        """Return the values that each field may have for layers up to this rank and these widths.

        Values from a file are checked against these before anything is drawn.
        """
        return {"key": KEYS}

    def to_json(self) -> dict[str, int | str]:
        """Return the values from which `scheme_from_json` restores the scheme.

        Raises:
            ValueError: the projections cannot be drawn from a key.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(cast("Any", self))}
        return {"scheme": self.name, **fields, "fingerprint": self.fingerprint()}


def digest(header: dict[str, object], tensors: Sequence[Tensor]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 hash of a description and the bytes of tensors."""
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for tensor in tensors:
        sha.update(bytes_of(tensor))
    return sha.hexdigest()[:16]
