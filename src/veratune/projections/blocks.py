"""The `blocks` scheme: A and B in g blocks, so that every product with them costs 1 / g of a dense one.

Rank k reads one block of consecutive inputs and writes one block of consecutive outputs. With u[k, i] uniform on
(-1, 1), a function of (key, side, k, i) alone, where i counts within the block,

    A[k, j] = sqrt(6 / (in / g)) u_A[k, i]    if block_in(j) = k mod g,              otherwise 0
    B[j, k] = sqrt(6 / (r / g)) u_B[k, i]     if block_out(j) = (k + k // g) mod g,  otherwise 0

Each run of g ranks (those with the same k // g) reads all inputs and writes all outputs, and each run of g^2 connects
every block of inputs with every block of outputs. A width that g does not divide has gcd(g, width) blocks, and the
conditions hold modulo that number: a width coprime to g is one block, and thus dense. The rules depend on k only, not
on r: rank 64 is the first 64 rows of rank 256.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from veratune.projections.base import Scheme, Side, digest
from veratune.projections.philox import symmetric_uniform, symmetric_uniform_columns
from veratune.projections.structure import Matrix, Structure
from veratune.utils.tensors import gradients_wanted, product
from veratune.utils.torch_private import (
    constant_while_compiling,
    modes_active,
    outside_transformations,
    transformations_active,
)

# Part of every counter. Increment it when the scheme's values change.
BLOCKS_VERSION = 2

MOST_BLOCKS = 64
_SAMPLED_ROWS = (0, 1, 63)
_SAMPLED_WIDTH = 64


@lru_cache(maxsize=256)
def _order(blocks: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the rank index of each stored row, and the stored row of each rank index.

    Rows are sorted by output block p, then by round t, then by input block q: row (p, t, q). Therefore the ranks of an
    output block are consecutive rows, those of an input block are every g-th row, and products need no permutation.
    The number of rows is a multiple of g^2; rows whose rank index is `rank` or more are zero.
    """
    rounds = -(-rank // blocks**2)
    index = [
        q + blocks * ((p - q) % blocks + blocks * t)
        for p in range(blocks)
        for t in range(rounds)
        for q in range(blocks)
    ]
    rows = [0] * len(index)
    for row, k in enumerate(index):
        rows[k] = row
    return tuple(index), tuple(rows[:rank])


_indices: dict[tuple[int, int, torch.device, bool], Tensor] = {}


@constant_while_compiling
def _index(blocks: int, rank: int, device: torch.device, inverse: bool) -> Tensor:
    """Return one of the results of `_order` as a tensor."""
    key = (blocks, rank, device, inverse)
    if key in _indices and not modes_active():
        return _indices[key]
    with torch.inference_mode(False), outside_transformations():
        index = torch.tensor(_order(blocks, rank)[inverse], device=device)
    if type(index) is Tensor and not modes_active():  # otherwise not valid outside the mode
        _indices[key] = index
    return index


def _in_place(*operands: Tensor) -> bool:
    """Return whether products may be written into views, which autograd, torch.func and tracing do not allow."""
    return (
        all(operand.ndim == 2 for operand in operands)
        and not gradients_wanted(*operands)
        and not transformations_active()
        and not torch.compiler.is_compiling()
    )


class Blocks(NamedTuple):
    """The nonzero elements of A or B, one row of width / pieces elements for each rank, in the order of `_order`.

    Attributes:
        blocks: g.
        rank: r.
        pieces: the number of blocks of this width, which divides g.
        consecutive: whether the ranks of a block are consecutive rows (B), or every `pieces`-th row (A).
    """

    blocks: int
    rank: int
    pieces: int
    consecutive: bool

    @property
    def rows(self) -> int:
        """The number of stored rows: r, rounded up to a multiple of g^2."""
        return -(-self.rank // self.blocks**2) * self.blocks**2

    @property
    def density(self) -> float:
        return self.rows / (self.rank * self.pieces)

    def arrange(self, tensor: Tensor, dim: int = -1) -> Tensor:
        missing = self.rows - self.rank
        if missing:
            tensor = F.pad(tensor.movedim(dim, -1), (0, missing)).movedim(-1, dim)
        return tensor.index_select(dim, _index(self.blocks, self.rank, tensor.device, False))

    def restore(self, tensor: Tensor, dim: int = -1) -> Tensor:
        return tensor.index_select(dim, _index(self.blocks, self.rank, tensor.device, True))

    # Rows (..., R, n) are viewed as (..., J, pieces, M, n): block c of the width belongs to the rows [:, c].

    def _by_block(self, rows: Tensor) -> Tensor:
        *leading, total, n = rows.shape
        if self.consecutive:
            return rows.view(*leading, self.blocks // self.pieces, self.pieces, total // self.blocks, n)
        return rows.view(*leading, 1, total // self.pieces, self.pieces, n).transpose(-2, -3)

    def _split(self, x: Tensor) -> Tensor:
        """Split the columns of (..., T, n) into blocks, (..., pieces, T, n / pieces)."""
        return x.view(*x.shape[:-1], self.pieces, -1).transpose(-2, -3)

    def matmul(self, values: Tensor, z: Tensor) -> Tensor:
        if z.ndim == 1:
            return self.matmul(values, z.unsqueeze(0)).squeeze(0)
        if _in_place(values, z):
            target = z.new_empty(z.shape[0], self.pieces * values.shape[-1])
            return self._accumulate(target, values, z, beta=0)
        # (..., J, pieces, T, M) (..., J, pieces, M, w), summed over J
        sums = self._by_block(z.mT).mT @ self._by_block(values)
        sums = sums.squeeze(-4) if sums.shape[-4] == 1 else sums.sum(-4)
        return sums.transpose(-2, -3).flatten(-2)

    def _accumulate(self, target: Tensor, values: Tensor, z: Tensor, beta: int) -> Tensor:
        """Write beta * target + z M into `target`."""
        out = self._split(target)
        for i, (rows, block) in enumerate(zip(self._by_block(z.mT), self._by_block(values), strict=True)):
            out.baddbmm_(rows.mT, block, beta=beta if i == 0 else 1)
        return target

    def rmatmul(self, values: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if x.ndim == 1:
            return self.rmatmul(values, x.unsqueeze(0)).squeeze(0)
        by_block, columns = self._by_block(values), self._split(x).mT
        if dtype is not None:
            return self._from_blocks(product(by_block, columns.unsqueeze(-4), dtype)).mT
        if _in_place(values, x):
            # Store u transposed, (R, T), so that the rows of each block form a matrix in either order.
            result = x.new_empty(values.shape[0], x.shape[0])
            for out, block in zip(self._by_block(result), by_block, strict=True):
                torch.bmm(block, columns, out=out)
            return result.mT
        return self._from_blocks(by_block @ columns.unsqueeze(-4)).mT

    def _from_blocks(self, rows: Tensor) -> Tensor:
        """Undo `_by_block`."""
        return (rows if self.consecutive else rows.transpose(-2, -3)).flatten(-4, -2)

    def plus_matmul(self, target: Tensor, values: Tensor, z: Tensor, *, in_place: bool) -> Tensor:
        if not _in_place(target, values, z):
            return target + self.matmul(values, z)
        return self._accumulate(target if in_place else target.clone(), values, z, beta=1)

    def scaled(self, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        scales = self._by_block(rows.unsqueeze(-1)) * columns.view(*columns.shape[:-1], 1, self.pieces, 1, -1)
        return self._from_blocks(scales * self._by_block(values)).to(values.dtype)

    def outer(self, values: Tensor, z: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        sums = product(self._by_block(z.mT), self._split(x).unsqueeze(-4), dtype)
        return self._from_blocks(sums * self._by_block(values))

    # Products with another matrix of the same ranks. For a block p of B's columns and a block q of A's, only the ranks
    # that belong to both contribute: row (p, t, q) is viewed as (J, p, t, K, q).

    def _joint(self, values: Tensor, other: "Blocks") -> Tensor:
        """Return the rows of M, or of N, (..., R, w), as (..., J, p, t, K, q, w)."""
        rounds = self.rows // self.blocks**2
        p, q = self.pieces, other.pieces
        return values.view(*values.shape[:-2], self.blocks // p, p, rounds, self.blocks // q, q, values.shape[-1])

    def _partner(self, other: Matrix) -> "Blocks | None":
        """Return the structure of another matrix if this is a B and the other its A; otherwise None."""
        own = other.structure
        return own if self.consecutive and isinstance(own, Blocks) and not own.consecutive else None

    def gram(self, values: Tensor, other: Matrix) -> Tensor:
        partner = self._partner(other)
        if partner is None:
            return self.dense(values).mT @ other.dense()
        return self._blockwise_gram(values, other.values, partner).flatten(-4, -3).flatten(-2)

    def _blockwise_gram(self, values: Tensor, other: Tensor, partner: "Blocks") -> Tensor:
        """Return M^T N as (..., p, m / p, q, n / q), one block for each pair (p, q)."""
        left, right = self._joint(values, partner), self._joint(other, partner)
        return torch.einsum("...jptkqm,jptkqn->...pmqn", left, right)

    def plus_gram(self, target: Tensor, values: Tensor, other: Matrix) -> Tensor:
        partner = self._partner(other)
        if partner is None or not _in_place(target, values, other.values):
            return target + self.gram(values, other)
        result = torch.empty_like(target)
        shape = (self.pieces, values.shape[-1], partner.pieces, other.values.shape[-1])
        if self.rows == self.pieces * partner.pieces:  # one rank for each pair of blocks
            left, right = (self._joint(each, partner)[0, :, 0, 0] for each in (values, other.values))
            torch.addcmul(target.view(shape), left.mT.unsqueeze(-1), right.unsqueeze(1), out=result.view(shape))
        else:
            gram = self._blockwise_gram(values, other.values, partner)
            torch.add(target.view(shape), gram, out=result.view(shape))
        return result

    def pull_back(self, values: Tensor, other: Matrix, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        partner = self._partner(other)
        if partner is None:
            return self.outer(values, other.dense().mT, gradient.mT, dtype)
        blocks = gradient.view(*gradient.shape[:-2], self.pieces, values.shape[-1], partner.pieces, -1)
        sums = torch.einsum("...pmqn,jptkqn->...jptkqm", blocks, self._joint(other.values, partner))
        return (sums.to(dtype) * self._joint(values, partner)).flatten(-6, -2)

    def dense(self, values: Tensor) -> Tensor:
        blocks = self._by_block(values)
        mask = torch.eye(self.pieces, dtype=values.dtype, device=values.device)[:, None, :, None]
        return self._from_blocks((blocks.unsqueeze(-2) * mask).flatten(-2))


@dataclass(frozen=True)
class BlockProjections(Scheme):
    """The `blocks` scheme, which the module docstring describes.

    B is stored as sqrt(gcd(g, out) / g) u_B, and sqrt(6 / (r / g)) is the `scale` that multiplies d. An embedding's A
    is dense: its inputs are one-hot, so zeros would save nothing.
    """

    name: ClassVar[str] = "blocks"
    has_columns: ClassVar[bool] = True
    ordered_by_rank: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("projection_blocks",)

    key: int
    g: int

    def __post_init__(self) -> None:
        if not 1 <= self.g <= MOST_BLOCKS:
            raise ValueError(f"'blocks' projections need 1 to {MOST_BLOCKS} blocks, but g={self.g!r:.50}")

    @classmethod
    def for_layers(cls, key: int, r: int, max_in: int, max_out: int, *, projection_blocks: int = 8) -> Self:
        return cls(key % (1 << 64), projection_blocks)

    @classmethod
    def allowed_values(cls, r: int, max_in: int, max_out: int) -> dict[str, range]:
        return super().allowed_values(r, max_in, max_out) | {"g": range(1, MOST_BLOCKS + 1)}

    def storage_width(self, side: Side, features: int) -> int:
        return features

    def stored_columns(self, side: Side, features: int) -> int:
        return features // math.gcd(self.g, features)

    def structure(self, side: Side, rank: int, features: int) -> Structure:
        return Blocks(self.g, rank, math.gcd(self.g, features), side == "B")

    def draw(self, side: Side, rows: range, width: int, device: torch.device) -> Tensor:
        columns = self.stored_columns(side, width)
        unit = symmetric_uniform(self.key, ("AB".index(side), BLOCKS_VERSION), rows, columns, device)
        if side == "A":
            return unit.mul_(math.sqrt(6.0 / columns))
        blocks = width // columns
        return unit if blocks == self.g else unit.mul_(math.sqrt(blocks / self.g))

    def scale(self, rank: int) -> float:
        return math.sqrt(6.0 * self.g / rank)

    def one_hot_columns(self, rank: int, columns: Tensor) -> Tensor:
        unit = symmetric_uniform_columns(self.key, ("AB".index("A"), BLOCKS_VERSION), range(rank), columns)
        return unit.mul_(math.sqrt(6.0))

    def fingerprint(self) -> str:
        return _fingerprint(self)


@lru_cache(maxsize=256)
def _fingerprint(scheme: BlockProjections) -> str:
    cpu = torch.device("cpu")
    sides: tuple[Side, Side] = ("A", "B")
    width = scheme.g * _SAMPLED_WIDTH
    header: dict[str, Any] = {
        "scheme": scheme.name,
        "version": BLOCKS_VERSION,
        "key": scheme.key,
        "g": scheme.g,
        "scale": [scheme.scale(rank).hex() for rank in (1, 64, 256)],
    }
    with torch.inference_mode(False):
        samples = [scheme.draw(side, range(row, row + 1), width, cpu) for side in sides for row in _SAMPLED_ROWS]
        return digest(header, samples)
