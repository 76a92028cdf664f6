"""Counter-based random numbers: every element is a pure function of (key, counter).

Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a
128-bit counter and a 64-bit key to four 32-bit words. There is no state between numbers, so a matrix can be
drawn in any order, in pieces, or grown later, with the same bits.

Only exact integer operations and one float32 product are used: the result is the same on every device.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from veratune.utils.torch_private import transformations_active

_ROUNDS = 10
_MASK = 0xFFFFFFFF
_WORD = 1 << 32
# The published multipliers minus 2^32. The product of a 32-bit word and a published multiplier can overflow int64;
# with these it cannot, and floor(a*M / 2^32) = floor(a*(M - 2^32) / 2^32) + a gives the same high word.
_MULTIPLIERS = (0xD2511F53 - _WORD, 0xCD9E8D57 - _WORD)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# The number of blocks to draw at a time, small enough that the int64 intermediates stay in a CPU's cache.
_CHUNK_BLOCKS = 1 << 15


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four output words of Philox4x32-10 for each counter.

    Args:
        counter: four int64 tensors of the same or broadcastable shapes, each value in [0, 2^32).
        key: two 32-bit words.

    Returns:
        Four int64 tensors, each value in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        high0 = (product0 >> 32).add_(c0)
        high1 = (product1 >> 32).add_(c2)
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(k0), product1.bitwise_and_(_MASK)
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(k1), product0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def symmetric_uniform(key: int, stream: tuple[int, int], rows: range, width: int, device: torch.device) -> Tensor:
    """Draw rows of an infinite matrix of uniform numbers on (-1, 1).

    Element (k, j) depends on `key`, `stream`, `k` and `j` alone: block j // 4 of row k is the counter
    (j // 4, k, *stream), and j % 4 chooses the word of the block. A word w becomes the odd 24-bit integer
    n = ((w >> 8) | 1) - 2^23, and n / 2^23 is exact in float32, symmetric about zero and never zero.

    Args:
        key: 64-bit key.
        stream: two 32-bit words that distinguish independent matrices of one key.
        rows: the row indices k to draw, each in [0, 2^32), with step 1.
        width: number of columns, from column 0.
        device: device of the result.

    Returns:
        float32 tensor (len(rows), width).
    """
    out = torch.empty(len(rows), width, dtype=torch.float32, device=device)
    if device.type == "meta" or out.numel() == 0:
        return out
    blocks = torch.arange(-(-width // 4), dtype=torch.int64, device=device)
    for first, words in _blocks(key, stream, rows, blocks):
        out[first : first + len(words)] = _odd(words.flatten(1)[:, :width])
    return out.mul_(2.0**-23)


def symmetric_uniform_columns(key: int, stream: tuple[int, int], rows: range, columns: Tensor) -> Tensor:
    """Draw selected columns of the matrix of `symmetric_uniform`, without drawing the others.

    Args:
        key, stream, rows: as for `symmetric_uniform`.
        columns: int64 (n,), the column indices j, each in [0, 2^34).

    Returns:
        float32 tensor (len(rows), n), on the device of `columns`.
    """
    out = torch.empty(len(rows), columns.numel(), dtype=torch.float32, device=columns.device)
    if transformations_active():
        out = torch.zeros_like(out) + 0 * columns  # under vmap, the target of a write must be batched as well
    if columns.is_meta or out.numel() == 0:
        return out
    word = (columns % 4)[None, :, None]
    for first, words in _blocks(key, stream, rows, columns // 4):
        chosen = words.gather(-1, word.expand(len(words), -1, 1)).squeeze(-1)
        out[first : first + len(words)] = _odd(chosen)
    return out.mul_(2.0**-23)


def _blocks(key: int, stream: tuple[int, int], rows: range, blocks: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the words of these blocks, a few rows at a time, as (position in rows, words (rows, blocks, 4))."""
    key_words = (key & _MASK, (key >> 32) & _MASK)
    stream_words = [torch.tensor([[word]], dtype=torch.int64, device=blocks.device) for word in stream]
    step = max(1, _CHUNK_BLOCKS // blocks.numel())
    for first in range(0, len(rows), step):
        chunk = rows[first : first + step]
        row_index = torch.arange(chunk.start, chunk.stop, dtype=torch.int64, device=blocks.device)[:, None]
        if transformations_active():
            row_index, *stream_words = (words + 0 * blocks for words in (row_index, *stream_words))
        yield first, torch.stack(philox4x32([blocks[None], row_index, *stream_words], key_words), dim=-1)


def _odd(words: Tensor) -> Tensor:
    return (words >> 8).bitwise_or_(1).sub_(1 << 23)
