"""The dimensions of a weight, and the shapes of an adapter's vectors on it."""

from dataclasses import dataclass

# Ranks up to this are allowed for matrices of any size. Published ranks are at most 1,024.
_ANY_RANK = 4096


@dataclass(frozen=True)
class Geometry:
    """A weight as one or more matrices (out, in).

    Attributes:
        in_features, out_features: the dimensions of the matrix, or of each matrix of a stack.
        count: the number of matrices in the stack (experts; query, key and value in one tensor), each of which has
            separate vectors; None if the weight is one matrix.
    """

    in_features: int
    out_features: int
    count: int | None = None

    @property
    def largest_rank(self) -> int:
        """The largest allowed rank, which limits the memory of A and B to a few times that of a large matrix."""
        return max(_ANY_RANK, 4 * min(self.in_features, self.out_features))

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of the vectors b."""
        return (self.out_features,) if self.count is None else (self.count, self.out_features)

    def d_shape(self, r: int, parts: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Shape of the vectors d, given the number of outputs of each part of a fused layer."""
        if parts:
            return (len(parts), r)
        return (r,) if self.count is None else (self.count, r)


def slices(parts: tuple[int, ...]) -> list[slice]:
    """Return the slice of outputs of each part, given the number of outputs of each part."""
    ends = [sum(parts[: i + 1]) for i in range(len(parts))]
    return [slice(end - size, end) for end, size in zip(ends, parts, strict=True)]
