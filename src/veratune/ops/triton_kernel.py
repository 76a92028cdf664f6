"""A Triton kernel that adds an adapter's output to the base layer's output in one pass over x and the output.

The kernel needs the `triton` package, which torch's CUDA builds include. Import this module only where the kernel is
used.
"""

import os
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SMALLEST_DOT = 16
_BLOCK_T, _BLOCK_N, _BLOCK_M = 64, 64, 64
# Triton's interpreter multiplies bfloat16 operands as raw integers. Cast to float32, they are multiplied correctly.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit  # type: ignore[untyped-decorator]
def _add_product(  # type: ignore[no-untyped-def]
    out,
    x,
    first,
    second,
    input_scale,
    middle,
    output_scale,
    saved,
    tokens,
    n,
    m,
    rank,
    x_row,
    x_column,
    out_row,
    out_column,
    first_row,
    second_row,
    columns_each,
    SCALES_INPUT: tl.constexpr,  # noqa: N803
    SCALES_OUTPUT: tl.constexpr,  # noqa: N803
    SAVES: tl.constexpr,  # noqa: N803
    WIDENS: tl.constexpr,  # noqa: N803
    RANK: tl.constexpr,  # noqa: N803
    BLOCK_T: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, RANK)
    row_there, rank_there = rows < tokens, ranks < rank
    u = tl.zeros((BLOCK_T, RANK), dtype=tl.float32)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_there = columns < n
        tile = tl.load(
            x + rows[:, None] * x_row + columns[None, :] * x_column,
            mask=row_there[:, None] & column_there[None, :],
            other=0.0,
        )
        if SCALES_INPUT:
            scale = tl.load(input_scale + columns, mask=column_there, other=0.0).to(tl.float32)
            tile = (tile.to(tl.float32) * scale[None, :]).to(tile.dtype)
        transposed = tl.load(
            first + ranks[None, :] * first_row + columns[:, None],
            mask=rank_there[None, :] & column_there[:, None],
            other=0.0,
        )
        if WIDENS:
            tile, transposed = tile.to(tl.float32), transposed.to(tl.float32)
        u = tl.dot(tile, transposed, u, input_precision="ieee")
    # SAVES is a compile-time constant; the program id is not.
    if SAVES:  # noqa: SIM102
        if tl.program_id(1) == 0:
            tl.store(
                saved + rows[:, None] * rank + ranks[None, :],
                u.to(saved.dtype.element_ty),
                mask=row_there[:, None] & rank_there[None, :],
            )
    factor = tl.load(middle + ranks, mask=rank_there, other=0.0)
    scaled = (u * factor[None, :]).to(second.dtype.element_ty)
    if WIDENS:
        scaled = scaled.to(tl.float32)
    begin = tl.program_id(1) * columns_each
    for start in range(begin, tl.minimum(begin + columns_each, m), BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        column_there = columns < m
        tile = tl.load(
            second + ranks[:, None] * second_row + columns[None, :],
            mask=rank_there[:, None] & column_there[None, :],
            other=0.0,
        )
        if WIDENS:
            tile = tile.to(tl.float32)
        added = tl.dot(scaled, tile, input_precision="ieee")
        if SCALES_OUTPUT:
            scale = tl.load(output_scale + columns, mask=column_there, other=0.0).to(tl.float32)
            added = added * scale[None, :]
        pointers = out + rows[:, None] * out_row + columns[None, :] * out_column
        there = row_there[:, None] & column_there[None, :]
        before = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
        tl.store(pointers, (before + added).to(out.dtype.element_ty), mask=there)


def add_product_(
    out: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    middle: Tensor,
    *,
    input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
    saved: Tensor | None = None,
) -> None:
    """Add ((x diag(input_scale)) first^T diag(middle)) second diag(output_scale) to `out`, in place.

    Products accumulate in float32; the product with `first` is rounded once, after it is scaled by `middle`.

    Args:
        out: (T, m), in the dtype of x.
        x: (T, n), in float16, bfloat16 or float32.
        first: (r, n), with contiguous rows, in the dtype of x; r is at most 256.
        second: (r, m), likewise.
        middle: (r,), float32.
        input_scale: (n,), or None.
        output_scale: (m,), or None.
        saved: (T, r), contiguous, receives the unscaled product with `first`; or None.
    """
    if x.dtype not in _DTYPES or not x.dtype == out.dtype == first.dtype == second.dtype:
        raise TypeError(
            f"the Triton kernel needs a single dtype, one of {_DTYPES}, for x, out and the projections, but got x in"
            f" {x.dtype}, out in {out.dtype} and projections in {first.dtype} and {second.dtype}"
        )
    if torch.compiler.is_compiling():
        _opaque(out, x, first, second, middle, input_scale, output_scale, saved)
    else:
        _launch(out, x, first, second, middle, input_scale, output_scale, saved)


def _launch(
    out: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    middle: Tensor,
    input_scale: Tensor | None,
    output_scale: Tensor | None,
    saved: Tensor | None,
) -> None:
    (tokens, n), (rank, m) = x.shape, second.shape
    if not tokens or not m:
        return
    tiles = triton.cdiv(tokens, _BLOCK_T)
    # With few tokens, several programs split the output columns of a tile, and each recomputes the first product.
    splits = min(max(1, _processors(x.device) // tiles), triton.cdiv(m, _BLOCK_M))
    columns_each = triton.cdiv(triton.cdiv(m, splits), _BLOCK_M) * _BLOCK_M
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _add_product[(tiles, splits)](
            out,
            x,
            first,
            second,
            x if input_scale is None else input_scale,
            middle,
            x if output_scale is None else output_scale,
            out if saved is None else saved,
            tokens,
            n,
            m,
            rank,
            x.stride(0),
            x.stride(1),
            out.stride(0),
            out.stride(1),
            first.stride(0),
            second.stride(0),
            columns_each,
            SCALES_INPUT=input_scale is not None,
            SCALES_OUTPUT=output_scale is not None,
            SAVES=saved is not None,
            WIDENS=_INTERPRETED,
            RANK=max(_SMALLEST_DOT, triton.next_power_of_2(rank)),
            BLOCK_T=_BLOCK_T,
            BLOCK_N=_BLOCK_N,
            BLOCK_M=_BLOCK_M,
            num_warps=8,
            num_stages=3,
        )


# For torch.compile: an opaque custom operator that mutates `out` and `saved`.
_opaque = torch.library.custom_op("veratune::add_product_", _launch, mutates_args=("out", "saved"))


def _processors(device: torch.device) -> int:
    """Return the number of programs that a device runs at once; 2 in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
