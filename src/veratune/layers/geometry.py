"""The dimensions of what one adapter trains on one layer."""

from dataclasses import dataclass

# A rank that is allowed however small a matrix is: the method's own ranks are at most 1,024.
_ANY_RANK = 4096


@dataclass(frozen=True)
class Geometry:
    """How a weight is seen as one or more matrices (out, in), and what vectors it has.

    Attributes:
        in_features, out_features: the dimensions of the matrix, or of each matrix of a stack.
        count: how many matrices the weight is a stack of (experts; query, key and value in one tensor), each with
            vectors of its own; None where it is one matrix.
    """

    in_features: int
    out_features: int
    count: int | None = None

    @property
    def largest_rank(self) -> int:
        """The largest rank there may be here: its A and B take a few times the memory of the matrix, not more."""
        return max(_ANY_RANK, 4 * min(self.in_features, self.out_features))

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Shape of the vectors b."""
        return (self.out_features,) if self.count is None else (self.count, self.out_features)

    def d_shape(self, rank: int, parts: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Shape of the vectors d, where the matrix stands for parts side by side or for one."""
        if parts:
            return (len(parts), rank)
        return (rank,) if self.count is None else (self.count, rank)


def slices(parts: tuple[int, ...]) -> list[slice]:
    """Return which outputs belong to each part, given how many each has."""
    ends = [sum(parts[: i + 1]) for i in range(len(parts))]
    return [slice(end - size, end) for end, size in zip(ends, parts, strict=True)]
