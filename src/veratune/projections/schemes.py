"""Projection schemes: descriptions from which the frozen projections A and B can be drawn at any time.

A scheme is immutable, hashable and cheap to compare; two layers whose schemes are equal share their tensors. All
draws are rank-major, (rank, width), float32, regardless of the base model's dtype.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from veratune.projections.base import Scheme, Side, digest
from veratune.projections.blocks import BlockProjections
from veratune.projections.philox import symmetric_uniform, symmetric_uniform_columns

__all__ = ["SCHEMES", "PeftShared", "PerDimension", "Scheme", "Side", "Stored", "scheme_from_json"]

# Part of every counter of the `per_dimension` scheme. Increment it when the scheme's values change, so that adapters
# trained with the old values are recognized.
PER_DIMENSION_VERSION = 1

_SAMPLED_ROWS = (0, 1, 63)
_SAMPLED_WIDTH = 64


@dataclass(frozen=True)
class PerDimension(Scheme):
    """The `per_dimension` scheme: each width uses the first columns of one infinite random matrix per side.

    With u[k, j] uniform on (-1, 1), a function of (key, side, k, j) alone, Kaiming uniform with gain sqrt(2) gives

        A[k, j] = sqrt(6 / in) u_A[k, j]        and        B[j, k] = sqrt(6 / r) u_B[k, j].

    A is stored with its factor, because its fan-in is its width. B's fan-in is the rank, so B is stored as u_B, and
    sqrt(6 / r) is the `scale` that multiplies d. Rank 64 is therefore, bit for bit, the first 64 rows of rank 256.
    """

    name: ClassVar[str] = "per_dimension"
    has_columns: ClassVar[bool] = True

    key: int

    @classmethod
    def for_layers(cls, key: int, r: int, max_in: int, max_out: int) -> Self:
        return cls(key % (1 << 64))

    def scale_in_shared_pair(self, in_features: int, rank: int, max_in: int, max_rank: int) -> float:
        # A = sqrt(6 / in) u here, but sqrt(6 / max_in) u in the shared pair; B's scale likewise depends on the rank.
        return math.sqrt(max_in / in_features) * (self.scale(rank) / self.scale(max_rank))

    def draw(self, side: Side, rows: range, width: int, device: torch.device) -> Tensor:
        unit = symmetric_uniform(self.key, ("AB".index(side), PER_DIMENSION_VERSION), rows, width, device)
        return unit.mul_(math.sqrt(6.0 / width)) if side == "A" else unit

    def scale(self, rank: int) -> float:
        return math.sqrt(6.0 / rank)

    def one_hot_columns(self, rank: int, columns: Tensor) -> Tensor:
        # A one-hot input has one nonzero element, so A's fan-in is one, regardless of the number of rows of the
        # embedding: A[k, j] = sqrt(6) u_A[k, j].
        unit = symmetric_uniform_columns(self.key, ("AB".index("A"), PER_DIMENSION_VERSION), range(rank), columns)
        return unit.mul_(math.sqrt(6.0))

    def fingerprint(self) -> str:
        return _per_dimension_fingerprint(self.key)


@lru_cache(maxsize=256)
def _per_dimension_fingerprint(key: int) -> str:
    scheme, cpu = PerDimension(key), torch.device("cpu")
    sides: tuple[Side, Side] = ("A", "B")
    with torch.inference_mode(False):
        samples = [
            scheme.draw(side, range(row, row + 1), _SAMPLED_WIDTH, cpu) for side in sides for row in _SAMPLED_ROWS
        ]
        header = {
            "scheme": "per_dimension",
            "version": PER_DIMENSION_VERSION,
            "key": key,
            "gain": [scheme.scale(rank).hex() for rank in (1, 64, 256)],
        }
        return digest(header, samples)


@dataclass(frozen=True)
class PeftShared(Scheme):
    """PEFT's scheme: one A (r, max_in) and one B (max_out, r) from a seeded torch generator; each layer has a view.

    The values depend on torch's CPU generator, and the fan-in of A is the widest layer's. It exists to load, train and
    write PEFT's VeRA checkpoints.
    """

    name: ClassVar[str] = "peft"
    one_rank_linear_only: ClassVar[bool] = True
    drawn_by_peft: ClassVar[bool] = True

    key: int
    r: int
    max_in: int
    max_out: int

    @classmethod
    def for_layers(cls, key: int, r: int, max_in: int, max_out: int) -> Self:
        return cls(key, r, max_in, max_out)

    @classmethod
    def allowed_values(cls, r: int, max_in: int, max_out: int) -> dict[str, range]:
        sizes = {"r": r, "max_in": max_in, "max_out": max_out}
        return super().allowed_values(r, max_in, max_out) | {name: range(1, most + 1) for name, most in sizes.items()}

    def scale_in_shared_pair(self, in_features: int, rank: int, max_in: int, max_rank: int) -> float:
        return 1.0

    def reaches(self, side: Side, features: int) -> bool:
        return features <= self.storage_width(side, features)

    def largest_rank(self, rank: int) -> int:
        return min(rank, self.r)

    def storage_width(self, side: Side, features: int) -> int:
        return self.max_in if side == "A" else self.max_out

    def draw(self, side: Side, rows: range, width: int, device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(len(rows), width, device=device)
        generator = torch.Generator(device="cpu").manual_seed(self.key)
        drawn = self._kaiming_uniform((self.r, self.max_in), generator)
        if side == "B":
            drawn = self._kaiming_uniform((self.max_out, self.r), generator).t()
        return drawn[rows.start : rows.stop, :width].to(device).contiguous()

    @staticmethod
    def _kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        # PEFT's order of operations, so that the bound rounds identically.
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        empty = torch.empty(shape, dtype=torch.float32, device="cpu")
        return empty.uniform_(-bound, bound, generator=generator)

    def scale(self, rank: int) -> float:
        return 1.0

    def fingerprint(self) -> str:
        return _peft_fingerprint(self)


@lru_cache(maxsize=32)
def _peft_fingerprint(scheme: PeftShared) -> str:
    cpu = torch.device("cpu")
    rows = [row for row in _SAMPLED_ROWS if row < scheme.r]
    with torch.inference_mode(False):
        a = scheme.draw("A", range(scheme.r), min(scheme.max_in, _SAMPLED_WIDTH), cpu)
        b = scheme.draw("B", range(scheme.r), min(scheme.max_out, _SAMPLED_WIDTH), cpu)
        header = {"scheme": "peft", "key": scheme.key, "shape": [scheme.r, scheme.max_in, scheme.max_out]}
        return digest(header, [a[rows], b[rows]])


@dataclass(frozen=True)
class Stored(Scheme):
    """Projections read from a file: A (r, max_in) and B (r, max_out), float32, compared by content."""

    name: ClassVar[str] = "stored"
    one_rank_linear_only: ClassVar[bool] = True

    digest: str
    a: Tensor = field(compare=False, repr=False)
    b: Tensor = field(compare=False, repr=False)

    @classmethod
    def from_tensors(cls, a: Tensor, b: Tensor) -> "Stored":
        """Create a scheme from A (r, max_in) and B (max_out, r), of any floating-point dtype."""
        a = a.detach().to("cpu", torch.float32).contiguous()
        b = b.detach().to("cpu", torch.float32).t().contiguous()
        return cls(digest({"scheme": "stored", "shapes": [list(a.shape), list(b.shape)]}, [a, b]), a, b)

    def storage_width(self, side: Side, features: int) -> int:
        return (self.a if side == "A" else self.b).shape[1]

    def draw(self, side: Side, rows: range, width: int, device: torch.device) -> Tensor:
        stored = self.a if side == "A" else self.b
        return stored[rows.start : rows.stop, :width].to(device).contiguous()

    def scale(self, rank: int) -> float:
        return 1.0

    def fingerprint(self) -> str:
        return self.digest

    def scale_in_shared_pair(self, in_features: int, rank: int, max_in: int, max_rank: int) -> float:
        return 1.0

    def reaches(self, side: Side, features: int) -> bool:
        return features <= self.storage_width(side, features)

    def largest_rank(self, rank: int) -> int:
        return min(rank, self.a.shape[0])

    def to_json(self) -> dict[str, int | str]:
        raise ValueError("projections read from a file cannot be described by a key, only by their values")


SCHEMES: dict[str, type[Scheme]] = {scheme.name: scheme for scheme in (PerDimension, PeftShared, BlockProjections)}


def scheme_from_json(values: Mapping[str, Any]) -> Scheme:
    """Return the scheme that `Scheme.to_json` described.

    Args:
        values: "scheme", the fields of that scheme (integers), and "fingerprint".

    Raises:
        ValueError: unknown scheme; missing, unexpected or ill-typed fields; or a fingerprint that does not match.
    """
    name = values.get("scheme")
    kind = SCHEMES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"unknown projection scheme {name!r}: available schemes are {sorted(SCHEMES)}")
    fields = {key: value for key, value in values.items() if key not in ("scheme", "fingerprint")}
    names = {field.name for field in dataclasses.fields(cast("Any", kind))}
    if fields.keys() != names or not all(type(value) is int for value in fields.values()):
        raise ValueError(f"{name!r} projections must be described by the integers {sorted(names)}, got {fields!r:.200}")
    scheme = kind(**fields)
    if scheme.fingerprint() != values.get("fingerprint"):
        raise ValueError(
            f"the projections {dict(values)!r:.300} do not match their fingerprint: the installed veratune and torch"
            f" draw projections with fingerprint {scheme.fingerprint()}, with which the adapter would compute different"
            " outputs. Use the versions that it was trained with"
        )
    return scheme
