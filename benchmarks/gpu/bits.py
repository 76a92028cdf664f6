"""Stage: the projections' bits are those of the CPU."""

import itertools
from functools import partial

import torch
from torch import Tensor

from gpu.harness import Figures, Stage
from veratune.projections.pool import ProjectionPool
from veratune.projections.schemes import SCHEMES, Scheme, Side

KEYS = (0, 2**64 - 1, 123456789)
WIDTHS = (30, 64, 384, 1001, 4096, 11008)
RANKS = (8, 256, 1024)
TOY_WIDTHS, TOY_RANKS = (30, 64), (8, 16)
SIDES: tuple[Side, Side] = ("A", "B")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def same(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and bytes."""
    found = found.cpu().contiguous()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


def run(stage: Stage) -> None:
    widths, ranks = (TOY_WIDTHS, TOY_RANKS) if stage.toy else (WIDTHS, RANKS)
    for rank, (name, kind) in itertools.product(ranks, SCHEMES.items()):
        # PEFT's scheme draws everything on the CPU, the widest layer's projections each time.
        own_widths = widths[:4] if kind.drawn_by_peft or rank == max(ranks) else widths
        for key in KEYS if rank == min(ranks) else KEYS[:1]:
            scheme = kind.for_layers(key, rank, max(own_widths), max(own_widths))
            stage.case(f"{name} key={key} r={rank}", partial(compare, stage, scheme, rank, own_widths))


def compare(stage: Stage, scheme: Scheme, rank: int, widths: tuple[int, ...]) -> Figures:
    """Compare one scheme's draws, its views in all dtypes, their dense form, and its single columns."""
    cpu, device = torch.device("cpu"), stage.device
    pool = ProjectionPool()
    differing = []
    compared = 0

    def check(what: str, found: Tensor, expected: Tensor) -> None:
        nonlocal compared
        compared += expected.numel()
        if not same(found, expected):
            differing.append(what)

    for width in widths:
        for side in SIDES:
            stored = scheme.storage_width(side, width)
            drawn = scheme.draw(side, range(rank), stored, cpu)
            check(f"{side} {width}", scheme.draw(side, range(rank), stored, device), drawn)
            view = pool.view(scheme, side, rank, width)
            own = view.structure.arrange(drawn[:, : view.columns], dim=0)
            for dtype in DTYPES:
                check(f"{side} {width} {dtype}", view.values(device, dtype), own.to(dtype))
            dense = view.structure.dense(own)
            check(f"{side} {width} dense", view.matrix(device, torch.float32).dense(), dense)
            check(f"{side} {width} drawn", view.drawn(), view.structure.restore(dense, dim=0))
            view.release()
    if scheme.has_columns:
        columns = torch.tensor([0, 1, 5, 49, 2, 2, 30521])
        expected = scheme.one_hot_columns(rank, columns)
        check("one-hot columns", scheme.one_hot_columns(rank, columns.to(device)), expected)
    passed = not differing
    line = f"{compared:,} numbers, {'the same bits' if passed else f'DIFFER in {differing}'}"
    return {"passed": passed, "compared": compared, "differing": differing, "line": line}
