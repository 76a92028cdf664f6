"""Projections that only the quality study knows: dense draws with structure in them, before any gets a fast route.

Each is registered under a name that says all of it, so that a method is one line. They are computed as dense ones,
hence say nothing about speed.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veratune.projections.schemes import SCHEMES, PerDimension, Side

_SIGN_WIDTH = 1 << 16


class _Masked(PerDimension):
    """The per-dimension draw, some of whose elements are zero and the others larger by as much."""

    label: ClassVar[str]

    def mask(self, side: Side, ranks: Tensor, features: Tensor, width: int) -> Tensor:
        """Return which elements (ranks, features) are not zero."""
        raise NotImplementedError

    def sparsity(self, side: Side) -> float:
        """Return how many elements there are for one that is not zero."""
        raise NotImplementedError

    def draw(self, side: Side, rows: range, width: int, device: torch.device) -> Tensor:
        dense = super().draw(side, rows, width, device)
        ranks = torch.arange(rows.start, rows.stop, device=dense.device)[:, None]
        features = torch.arange(width, device=dense.device)[None]
        kept = self.mask(side, ranks, features, width)
        return torch.where(kept, dense, 0.0).mul_(math.sqrt(self.sparsity(side)) if side == "A" else 1.0)

    def scale(self, rank: int) -> float:
        return super().scale(rank) * math.sqrt(self.sparsity("B"))

    def fingerprint(self) -> str:
        return f"{self.label}:{self.key}"


def blocks(in_blocks: int, out_blocks: int) -> str:
    """Register blocks, in which rank k reads one block of the inputs and writes one of the outputs; return the name.

    A[k, j] is not zero if j is in block k mod g, and B[j, k] if j is in block (k + k // g) mod g', so that with r >= g²
    every block of the inputs reaches every block of the outputs. Of a width that g does not divide there are
    gcd(g, width) blocks.
    """
    title = f"study_blocks_{in_blocks}_{out_blocks}"

    @dataclass(frozen=True)
    class Blocks(_Masked):
        name: ClassVar[str] = title
        label: ClassVar[str] = title
        has_columns: ClassVar[bool] = False

        def mask(self, side: Side, ranks: Tensor, features: Tensor, width: int) -> Tensor:
            wanted = in_blocks if side == "A" else out_blocks
            count = math.gcd(wanted, width)
            block = features // (width // count)
            return block == (ranks if side == "A" else ranks + ranks // in_blocks) % count

        def sparsity(self, side: Side) -> float:
            return in_blocks if side == "A" else out_blocks

    return _register(Blocks)


def one_a_column() -> str:
    """Register projections of which each feature has one element that is not zero; return the name.

    Feature j reads or writes rank h(j) alone, where h permutes the features and takes them modulo the rank. It is not
    prefix-stable in the rank.
    """
    title = "study_one_a_column"

    @dataclass(frozen=True)
    class OneAColumn(PerDimension):
        name: ClassVar[str] = title
        has_columns: ClassVar[bool] = False
        r: int = 0

        @classmethod
        def for_layers(cls, key: int, r: int, max_in: int, max_out: int) -> "OneAColumn":
            return cls(key % (1 << 64), r)

        def draw(self, side: Side, rows: range, width: int, device: torch.device) -> Tensor:
            generator = torch.Generator().manual_seed((self.key * 2 + "AB".index(side)) % (1 << 63))
            rank_of = torch.randperm(max(width, self.r), generator=generator)[:width] % self.r
            signs = torch.randint(2, (width,), generator=generator) * 2.0 - 1.0
            ranks = torch.arange(rows.start, rows.stop)[:, None]
            # As much variance as a dense projection's: sum over j of A[k, j]² is 2 there, and of B's ranks likewise.
            size = math.sqrt(2 * self.r / width) if side == "A" else 1.0
            return torch.where(rank_of[None] == ranks, signs[None] * size, 0.0).to(device)

        def scale(self, rank: int) -> float:
            return math.sqrt(2.0)

        def fingerprint(self) -> str:
            return f"{title}:{self.key}:{self.r}"

    return _register(OneAColumn)


def mixed_blocks(count: int) -> str:
    """Register blocks whose ranks are mixed by a fast orthogonal transform before d; return the name.

    A = M A_blocks, where M is a Hadamard matrix of the size of the rank with random signs, divided by the square root
    of the rank: every d then reaches every input, at the cost of a transform of the ranks. The rank is a power of two.
    """
    title = f"study_mixed_blocks_{count}"
    plain = SCHEMES[blocks(count, count)]

    @dataclass(frozen=True)
    class MixedBlocks(plain):  # type: ignore[misc, valid-type]
        name: ClassVar[str] = title
        label: ClassVar[str] = title
        r: int = 0

        @classmethod
        def for_layers(cls, key: int, r: int, max_in: int, max_out: int) -> "MixedBlocks":
            if r & (r - 1):
                raise ValueError(f"{title} takes ranks that are powers of two, not {r}")
            return cls(key % (1 << 64), r)

        def draw(self, side: Side, rows: range, width: int, device: torch.device) -> Tensor:
            if side == "B":
                return super().draw(side, rows, width, device)
            everything = super().draw(side, range(self.r), width, device)
            generator = torch.Generator().manual_seed(self.key % (1 << 63))
            signs = (torch.randint(2, (self.r,), generator=generator) * 2.0 - 1.0).to(device)
            mixed = hadamard(self.r, everything.device) @ (signs[:, None] * everything) / math.sqrt(self.r)
            return mixed[rows.start : rows.stop].contiguous()

        def fingerprint(self) -> str:
            return f"{title}:{self.key}:{self.r}"

    return _register(MixedBlocks)


def hadamard_rows() -> str:
    """Register a subsampled Hadamard transform with random signs for A and for B; return the name.

    A has r rows of H diag(signs), with H of the next power of two above the width, whose first columns are taken.
    """
    title = "study_hadamard"

    @dataclass(frozen=True)
    class HadamardRows(PerDimension):
        name: ClassVar[str] = title
        has_columns: ClassVar[bool] = False

        def draw(self, side: Side, rows: range, width: int, device: torch.device) -> Tensor:
            size = max(1 << (width - 1).bit_length(), 1 << (rows.stop - 1).bit_length())
            generator = torch.Generator().manual_seed((self.key * 2 + "AB".index(side)) % (1 << 63))
            signs = torch.randint(2, (_SIGN_WIDTH,), generator=generator)[:width] * 2.0 - 1.0
            order = torch.randperm(size, generator=generator)[rows.start : rows.stop]
            full = hadamard(size, torch.device("cpu"))[order, :width] * signs
            return full.mul_(math.sqrt(2.0 / width) if side == "A" else 1.0).to(device)

        def scale(self, rank: int) -> float:
            return math.sqrt(2.0 / rank)

        def fingerprint(self) -> str:
            return f"{title}:{self.key}"

    return _register(HadamardRows)


def hadamard(size: int, device: torch.device) -> Tensor:
    """Return the Hadamard matrix of Sylvester's construction; the size is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _register(scheme: type[PerDimension]) -> str:
    SCHEMES.setdefault(scheme.name, scheme)
    return scheme.name
