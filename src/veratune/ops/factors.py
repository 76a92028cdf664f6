"""A, B, b, d and the scale of B, grouped because every formula uses them together."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from veratune.projections.structure import DENSE, Matrix
from veratune.utils.tensors import cast, wide_dtype


def check_values(x: Tensor, *operands: Tensor | None) -> None:
    """Raise RuntimeError if an operand is on the meta device and x is not, or vice versa.

    For some products with such operands, torch returns values from uninitialized memory without raising an error.
    """
    for operand in operands:
        if operand is not None and operand.is_meta != x.is_meta:
            raise RuntimeError(
                "an adapted layer has some of its weight, vectors and input on the meta device, without values, but"
                " not all of them. If accelerate offloaded them (for example with preload_module_classes), call"
                " accelerate.hooks.remove_hook_from_submodules(model), and offload the model before adding adapters"
            )


class Factors(NamedTuple):
    """One adapter on one weight: delta W = scale * diag(b) B diag(d) A, (out, in).

    Attributes:
        A: (r, in), frozen, in the compute dtype.
        B: stored rank-major, (r, out), frozen, in the compute dtype.
        b: the vector b, (out,), of any floating-point dtype.
        d: the vector d, (r,), of any floating-point dtype.
        scale: the constant factor of B, which the stored B does not include (see `projections.schemes`).
    """

    A: Matrix
    B: Matrix
    b: Tensor
    d: Tensor
    scale: float

    def at(self, index: Any) -> "Factors":
        """Return the factors with b and d indexed, for selected matrices of a stack."""
        return self if index is None else self._replace(b=self.b[index], d=self.d[index])

    def scaled_d(self) -> Tensor:
        """Return scale * d in float32 or wider."""
        return cast(self.d, wide_dtype(self.d.dtype)) * self.scale

    def folded(self) -> Matrix:
        """Return C = scale * d b^T * B, (r, out), so that delta W = C^T A; rounded once, to B's dtype.

        If b and d have leading dimensions, (..., out) and (..., r), return one C for each pair.
        """
        wide = wide_dtype(self.b.dtype, self.B.dtype)
        if self.b.ndim == 1 and self.B.structure is DENSE:  # use few operations, since each takes microseconds
            b = cast(self.b, wide)
            scales = torch.addr(b, cast(self.d, wide), b, beta=0, alpha=self.scale)
            return Matrix(cast(scales.mul_(self.B.values), self.B.dtype))
        values = self.B.structure.scaled(self.B.values, cast(self.d, wide) * self.scale, cast(self.b, wide))
        return Matrix(values, self.B.structure)

    def vector_gradients(self, products: Matrix, need_b: bool, need_d: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return (db, dd), each None if not needed.

        Args:
            products: P = B * (A G^T), (r, out), with G = g^T x the gradient of the weight; in float32 or wider. Then
                db = scale * P^T d and dd = scale * P b.
            need_b, need_d: which gradients to compute.
        """
        wide = products.dtype
        one = self.b.ndim == 1
        if one and products.structure is DENSE:  # use few operations, as in `folded`
            P, b, d = products.values, cast(self.b, wide), cast(self.d, wide)  # noqa: N806
            grad_b = torch.addmv(b, P.t(), d, beta=0, alpha=self.scale) if need_b else None
            grad_d = torch.addmv(d, P, b, beta=0, alpha=self.scale) if need_d else None
            return (
                None if grad_b is None else cast(grad_b, self.b.dtype),
                None if grad_d is None else cast(grad_d, self.d.dtype),
            )
        grad_b = grad_d = None
        if need_b:
            d = cast(self.d, wide) * self.scale
            grad_b = products.matmul(d) if one else products.matmul(d.unsqueeze(-2)).squeeze(-2)
            grad_b = cast(grad_b, self.b.dtype)
        if need_d:
            b = cast(self.b, wide) * self.scale
            grad_d = products.rmatmul(b) if one else products.rmatmul(b.unsqueeze(-2)).squeeze(-2)
            grad_d = cast(grad_d, self.d.dtype)
        return grad_b, grad_d
