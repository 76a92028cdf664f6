"""Change the rank of LoRA matrices while keeping their product."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def with_rank(name: str, a: Tensor, b: Tensor, count: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return float32 LoRA matrices of the given rank with the same product.

    For a larger rank, the matrices are padded with zeros. A smaller rank is exact if enough elements of d or b are
    zero, or if it is at least the number of inputs or outputs: one matrix is then the product itself, rounded once.

    Args:
        name: the layer's name, for error messages.
        a: lora_A in PEFT's layout, (count r, in, ...).
        b: lora_B, (out, r count, ...).
        count: the number of matrices in the stack.
        rank: the new rank of each matrix.

    Raises:
        ValueError: this rank cannot represent the product exactly.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} is not allowed: it must be 1 or more")
    inner = a.reshape(count, len(a) // count, -1)
    outer = b.reshape(len(b), -1, count).permute(2, 0, 1)
    pairs = [_with_rank(name, *pair, rank) for pair in zip(inner, outer, strict=True)]
    new_a = torch.stack([pair[0] for pair in pairs]).view(count * rank, *a.shape[1:])
    new_b = torch.stack([pair[1] for pair in pairs]).permute(1, 2, 0).reshape(len(b), rank * count, *b.shape[2:])
    return new_a, new_b


def exact_rank(a: Tensor, b: Tensor, count: int) -> int:
    """Return the smallest rank that `with_rank` accepts for these matrices."""
    inner = a.reshape(count, len(a) // count, -1)
    outer = b.reshape(len(b), -1, count).permute(2, 0, 1)
    return max(_exact_rank(*pair) for pair in zip(inner, outer, strict=True))


def _used(a: Tensor, b: Tensor) -> Tensor:
    """Return a mask of the terms of the product b a that are not zero, (r,)."""
    return (a != 0).any(1) & (b != 0).any(0)


def _exact_rank(a: Tensor, b: Tensor) -> int:
    return max(1, min(int(_used(a, b).sum()), a.shape[1], int((b != 0).any(1).sum())))


def _with_rank(name: str, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    smallest = _exact_rank(a, b)
    if rank < smallest:
        raise ValueError(f"rank={rank} cannot hold the adapter on {name} exactly: its delta has rank {smallest}")
    if rank < len(a):
        used, rows = _used(a, b), (b != 0).any(1)
        if int(used.sum()) <= rank:
            a, b = a[used], b[:, used]
        elif a.shape[1] <= rank:
            a, b = torch.eye(a.shape[1]), (b.double() @ a.double()).float()
        else:
            a, b = (b[rows].double() @ a.double()).float(), torch.eye(len(b))[:, rows]
    missing = rank - len(a)
    return pad(a, (0, 0, 0, missing)), pad(b, (0, missing))
