from pathlib import Path

import torch

from veratune.bank.layers import Columns
from veratune.bank.layout import AdapterRow, LayerColumns, Layout, ModuleColumns, digest_of
from veratune.bank.store import BankStore
from veratune.projections.schemes import PeftShared, PerDimension


def layout_of(rank: int = 4, out: int = 5, layers: tuple[str, ...] = ("first", "second"), saved: int = 0) -> Layout:
    places, position = {}, 0
    for name in layers:
        places[name] = LayerColumns(name, 3, out, (), (Columns(position, position + rank, slice(0, out)),))
        position += rank + out
    modules = {"classifier": ModuleColumns("classifier", {"weight": (0, (saved, 1))})} if saved else {}
    return Layout(rank, places, modules, position, saved)


def row_of(seed: int, layout: Layout | None = None, dtype: torch.dtype = torch.float32) -> AdapterRow:
    layout = layout or layout_of()
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(layout.numbers, generator=generator).to(dtype)
    saved = torch.randn(layout.saved_numbers, generator=generator) if layout.saved_numbers else None
    scheme = PeftShared(seed, 4, 3, 5) if seed % 2 else PerDimension(seed)
    return AdapterRow(digest_of(scheme, vectors, saved), scheme, 1 + seed % layout.rank, vectors, saved)


def assert_same(found: AdapterRow, expected: AdapterRow) -> None:
    assert (found.digest, found.scheme, found.rank) == (expected.digest, expected.scheme, expected.rank)
    assert found.vectors.dtype == expected.vectors.dtype and torch.equal(found.vectors, expected.vectors)
    assert (found.saved is None) == (expected.saved is None)
    assert found.saved is None or (expected.saved is not None and torch.equal(found.saved, expected.saved))


def assert_holds(path: Path, expected: dict[str, int]) -> None:
    """The file, opened anew, has these names and no others, with the rows of these seeds."""
    file = BankStore(path)
    assert file.names == {name: row_of(seed).digest for name, seed in expected.items()}
    for name, seed in expected.items():
        assert_same(file.row(file.names[name]), row_of(seed))
    file.close()


def make(path: Path, names: dict[str, int] | None = None) -> BankStore:
    file = BankStore.create(path, layout_of(), torch.float32, None)
    for name, seed in (names or {}).items():
        file.add(name, row_of(seed), replacing=None)
    return file
