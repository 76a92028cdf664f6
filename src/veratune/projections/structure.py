"""How a projection is stored, and the products with it.

A frozen projection is conceptually a dense matrix M of shape (r, n). A scheme may draw one that is mostly zeros and
store only the nonzero elements; its `Structure` then computes products with M from these alone. The arithmetic in
`veratune.ops` uses only these products, so it works for every structure.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from veratune.utils.tensors import cast, product


class Structure(Protocol):
    """The layout of a matrix M (r, n), and its products. Implementations are immutable and hashable.

    In each method, `values` are M's stored elements, z is (T, r) or (r,), and x is (T, n) or (n,). For several vector
    pairs, the results of `scaled` and `outer` have leading dimensions, which `matmul`, `rmatmul` and `gram` accept.

    A structure may store the rows of M in a different order, with zero rows between them; A and B of one rank must use
    the same order. Every tensor with a rank dimension (z, the vector d, another matrix) must be put in that order by
    `arrange`.
    """

    @property
    def density(self) -> float:
        """The fraction of M's elements that are stored, to which the cost of its products is proportional."""
        ...

    def arrange(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """Reorder the rank dimension `dim` of a tensor to the order of the stored rows."""
        ...

    def restore(self, tensor: Tensor, dim: int = -1) -> Tensor:
        """Undo `arrange`."""
        ...

    def matmul(self, values: Tensor, z: Tensor) -> Tensor:
        """Return z M, (T, n)."""
        ...

    def rmatmul(self, values: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return x M^T, (T, r), in `dtype`, which may be wider, or else in the operands' dtype."""
        ...

    def plus_matmul(self, target: Tensor, values: Tensor, z: Tensor, *, in_place: bool) -> Tensor:
        """Return target + z M, (T, n), written into `target` if `in_place`."""
        ...

    def scaled(self, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return diag(rows) M diag(columns) in this layout and in the dtype of `values`, rounded once.

        Args:
            values: M.
            rows: (..., r), in float32 or wider. Leading dimensions give one result for each vector pair.
            columns: (..., n), of the same dtype.
        """
        ...

    def outer(self, values: Tensor, z: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return M * (z^T x) in this layout and in `dtype`, computing only the elements that M stores.

        If z or x has leading dimensions, return one result for each pair.
        """
        ...

    def gram(self, values: Tensor, other: "Matrix") -> Tensor:
        """Return M^T N, (n, width of N), for another matrix N with r rows."""
        ...

    def plus_gram(self, target: Tensor, values: Tensor, other: "Matrix") -> Tensor:
        """Return target + M^T N, (n, width of N), in the memory layout of `target`."""
        ...

    def pull_back(self, values: Tensor, other: "Matrix", gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """Return M * (N G^T) in this layout and in `dtype`, with G, (..., n, width of N), the gradient of M^T N."""
        ...

    def dense(self, values: Tensor) -> Tensor:
        """Return M as a dense tensor, (r, n), its rows in the stored order."""
        ...


class Dense(NamedTuple):
    """The ordinary layout: `values` is M itself, (r, n)."""

    @property
    def density(self) -> float:
        return 1.0

    def arrange(self, tensor: Tensor, dim: int = -1) -> Tensor:
        return tensor

    def restore(self, tensor: Tensor, dim: int = -1) -> Tensor:
        return tensor

    def matmul(self, values: Tensor, z: Tensor) -> Tensor:
        return values.mT @ z if z.ndim == 1 else z @ values

    def rmatmul(self, values: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if dtype is not None:
            return product(x, values.mT, dtype)
        return values @ x if x.ndim == 1 else F.linear(x, values) if values.ndim == 2 else x @ values.mT

    def plus_matmul(self, target: Tensor, values: Tensor, z: Tensor, *, in_place: bool) -> Tensor:
        return target.addmm_(z, values) if in_place else torch.addmm(target, z, values)

    def scaled(self, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        # For small tensors, launches take most of the time; for one pair, torch.outer takes a single launch.
        scales = torch.outer(rows, columns) if rows.ndim == 1 else rows.unsqueeze(-1) * columns.unsqueeze(-2)
        return cast(scales.mul_(values), values.dtype)

    def outer(self, values: Tensor, z: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return product(z.mT, x, dtype).mul_(values)

    def gram(self, values: Tensor, other: "Matrix") -> Tensor:
        return values.mT @ other.dense()

    def plus_gram(self, target: Tensor, values: Tensor, other: "Matrix") -> Tensor:
        return torch.addmm(target, values.mT, other.dense())

    def pull_back(self, values: Tensor, other: "Matrix", gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return self.outer(values, other.dense().mT, gradient.mT, dtype)

    def dense(self, values: Tensor) -> Tensor:
        return values


DENSE: Structure = Dense()


class Matrix(NamedTuple):
    """A projection M, (r, n), ready to compute with: its stored elements and their layout."""

    values: Tensor
    structure: Structure = DENSE

    def matmul(self, z: Tensor) -> Tensor:
        """Return z M, (T, n), for z (T, r)."""
        return self.structure.matmul(self.values, z)

    def rmatmul(self, x: Tensor) -> Tensor:
        """Return x M^T, (T, r), for x (T, n)."""
        return self.structure.rmatmul(self.values, x)

    def gram(self, other: "Matrix") -> Tensor:
        """Return M^T N for another matrix N with r rows."""
        return self.structure.gram(self.values, other)

    def dense(self) -> Tensor:
        """Return M, (r, n), as an ordinary tensor."""
        return self.structure.dense(self.values)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype
