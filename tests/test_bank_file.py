"""A bank's file against what may happen to it: other writers, death at any moment, a full disk, damage of any kind."""

import errno
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from veratune.bank import BankError
from veratune.bank import file as file_module
from veratune.bank.file import BankFile
from veratune.bank.layout import AdapterRow, HeadPlace, LayerPlace, Layout, digest_of, make_layout
from veratune.bank.record import pack
from veratune.config import VeraConfig
from veratune.layers.banked import Columns
from veratune.sources import PeftShared, PerDimension, Stored
from veratune.targets import find_targets

_NAMES = [
    "x",
    "Zoë",
    "客户-7",
    "a/b\\c",
    "a.b.c",
    "emoji 🙂",
    "'; drop table",
    "../..",
    " ",
    "\u0065\u0301",
    "\u00e9",
    "n" * 256,
]


def layout_of(rank: int = 4, out: int = 5, layers: tuple[str, ...] = ("first", "second"), heads: int = 0) -> Layout:
    places, position = {}, 0
    for name in layers:
        places[name] = LayerPlace(name, 3, out, (), (Columns(position, position + rank, slice(0, out)),))
        position += rank + out
    head = {"classifier": HeadPlace("classifier", {"weight": (0, (heads, 1))})} if heads else {}
    return Layout(rank, places, head, position, heads)


def row_of(seed: int, layout: Layout | None = None, dtype: torch.dtype = torch.float32) -> AdapterRow:
    layout = layout or layout_of()
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(layout.numbers, generator=generator).to(dtype)
    heads = torch.randn(layout.head_numbers, generator=generator) if layout.head_numbers else None
    source = PeftShared(seed, 4, 3, 5) if seed % 2 else PerDimension(seed)
    return AdapterRow(digest_of(source, vectors, heads), source, 1 + seed % layout.rank, vectors, heads)


def assert_same(found: AdapterRow, expected: AdapterRow) -> None:
    assert (found.digest, found.source, found.rank) == (expected.digest, expected.source, expected.rank)
    assert found.vectors.dtype == expected.vectors.dtype and torch.equal(found.vectors, expected.vectors)
    assert (found.heads is None) == (expected.heads is None)
    assert found.heads is None or (expected.heads is not None and torch.equal(found.heads, expected.heads))


def assert_holds(path: Path, expected: dict[str, int]) -> None:
    """The file, opened anew, has these names and no others, with the rows of these seeds."""
    file = BankFile(path)
    assert file.names == {name: row_of(seed).digest for name, seed in expected.items()}
    for name, seed in expected.items():
        assert_same(file.row(file.names[name]), row_of(seed))
    file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bank"


def make(path: Path, names: dict[str, int] | None = None) -> BankFile:
    file = BankFile.create(path, layout_of(), torch.float32, None)
    for name, seed in (names or {}).items():
        file.add(name, row_of(seed), replacing=None)
    return file


# What is written is what is read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [0, 3])
def test_rows_come_back_to_the_bit(dtype: torch.dtype, heads: int, path: Path) -> None:
    layout = layout_of(heads=heads)
    file = BankFile.create(path, layout, dtype, torch.float32 if heads else None)
    rows = {name: row_of(seed, layout, dtype) for seed, name in enumerate(_NAMES)}
    for name, row in rows.items():
        file.add(name, row, replacing=None)
    for opened in (file, BankFile(path)):
        assert list(opened.names) == _NAMES
        for name, row in rows.items():
            assert_same(opened.row(opened.names[name]), row)
        opened.check_layout(layout)
        opened.check_dtypes(dtype, torch.float32 if heads else None)


def test_names_of_equal_adapters_share_the_values(path: Path) -> None:
    file = make(path, {"a": 1})
    before = path.stat().st_size
    file.add("b", row_of(1), replacing=None)
    assert len(file.adapters) == 1 and path.stat().st_size - before == len(
        pack({"kind": "name", "name": "b", "digest": row_of(1).digest})
    )
    file.remove("a", row_of(1).digest)
    assert_holds(path, {"b": 1})


def test_replaced_and_removed_names(path: Path) -> None:
    file = make(path, {"a": 1, "b": 2})
    file.add("a", row_of(3), replacing=row_of(1).digest)
    file.remove("b", row_of(2).digest)
    assert_holds(path, {"a": 3})
    for seed in (1, 2):  # what a request has begun with can still be read
        assert_same(file.row(row_of(seed).digest), row_of(seed))
    with pytest.raises(BankError, match=r"changed in .* by another process"):
        file.add("a", row_of(4), replacing=row_of(1).digest)
    with pytest.raises(BankError, match=r"changed in .* by another process"):
        file.add("a", row_of(4), replacing=None)
    with pytest.raises(BankError, match=r"changed in .* by another process"):
        file.remove("b", row_of(2).digest)
    with pytest.raises(BankError, match="has no adapter"):
        file.row("0" * 32)
    file.add("b", row_of(2), replacing=None)
    assert_holds(path, {"a": 3, "b": 2})


def test_ten_thousand_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(path)
    with monkeypatch.context() as patched:
        patched.setattr(file_module.os, "fsync", lambda _: None)
        for number in range(10_000):
            file.add(f"customer {number}", row_of(number % 100), replacing=None)
    again = BankFile(path)
    assert again.names == file.names and len(again.names) == 10_000 and len(again.adapters) == 100
    assert_same(again.row(again.names["customer 9042"]), row_of(42))


def test_projections_read_from_a_file_are_refused(path: Path) -> None:
    file = make(path, {"a": 1})
    before = path.read_bytes()
    stored = Stored.from_tensors(torch.ones(4, 3), torch.ones(5, 4))
    with pytest.raises(BankError, match="A bank in memory takes it"):
        file.add("b", replace(row_of(2), source=stored), replacing=None)
    assert path.read_bytes() == before


# What a file is for


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (layout_of(rank=5), "rank 4, not 5"),
        (layout_of(out=6), "layers that differ in first, second"),
        (layout_of(layers=("first",)), "layers that differ in second"),
        (layout_of(layers=tuple("abcde")), "layers that differ in a, b, c and 4 more"),
        (layout_of(layers=("second", "first")), "its layers are in another order"),
        (layout_of(heads=2), "heads that differ in classifier"),
    ],
)
def test_a_file_for_another_layout_is_refused(other: Layout, message: str, path: Path) -> None:
    file = make(path)
    file.check_layout(layout_of())
    with pytest.raises(BankError, match=message):
        file.check_layout(other)


def test_the_order_of_layers_is_part_of_a_layout() -> None:
    """A row is read by position: the same layers in another order would give each the other's vectors."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(3, 4)})
    targets = find_targets(model, VeraConfig(r=2, target_modules="all-linear", modules_to_save=[]), print)
    assert make_layout(targets, 2, {}).describe() != make_layout(targets[::-1], 2, {}).describe()


def test_a_file_of_other_dtypes_is_refused(path: Path) -> None:
    file = make(path)
    with pytest.raises(BankError, match=r"holds vectors as torch\.float32, .* as torch\.bfloat16"):
        file.check_dtypes(torch.bfloat16, None)
    with pytest.raises(BankError, match=r"holds heads as None, .* as torch\.float32"):
        file.check_dtypes(torch.float32, torch.float32)


@pytest.mark.parametrize("content", [b"", b"VERA", b"VERABANK", b"x" * 63, b"x" * 1000, b"\0" * 64, b"\xff" * 4096])
def test_what_is_no_bank(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(BankError, match="no bank's file"):
        BankFile(path)
    assert path.read_bytes() == content


def test_a_file_of_a_later_version(path: Path) -> None:
    make(path).close()
    data = bytearray(path.read_bytes())
    data[8:12] = (2).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(BankError, match="format version 2; this veratune reads 1"):
        BankFile(path)


def test_creating_where_it_cannot_be(path: Path) -> None:
    make(path, {"a": 1}).close()
    with pytest.raises(BankError, match="exists already"):
        make(path)
    assert_holds(path, {"a": 1})
    with pytest.raises(BankError, match="cannot be made"):
        make(path / "below a file")
    with pytest.raises(BankError, match="cannot be opened"):
        BankFile(path.parent / "nowhere")
    with pytest.raises(BankError, match="no bank's file"):
        BankFile(path.parent)
    assert sorted(path.parent.iterdir()) == [path]  # nothing is left over


def test_many_threads_create_the_same_file(path: Path) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(8)

    def create() -> None:
        barrier.wait()
        try:
            make(path).close()
            outcomes.append("made")
        except BankError as error:
            outcomes.append(str(error).rpartition(" ")[2])

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["already"] * 7 + ["made"]
    assert_holds(path, {})
    assert sorted(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_files_and_directories_that_are_read_only() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory, path = Path(name), Path(name) / "bank"
        make(path, {"a": 1}).close()
        path.chmod(0o444)
        directory.chmod(0o555)
        own = os.geteuid()
        try:
            if own == 0:  # who may do everything
                os.seteuid(65534)
            file = BankFile(path)
            assert_same(file.row(file.names["a"]), row_of(1))
            for write in (
                lambda: file.add("b", row_of(2), replacing=None),
                lambda: file.remove("a", row_of(1).digest),
            ):
                with pytest.raises(BankError, match="cannot be written to: Permission denied"):
                    write()
            with pytest.raises(BankError, match="cannot be made: Permission denied"):
                make(directory / "other")
        finally:
            os.seteuid(own)
            directory.chmod(0o755)
        assert_holds(path, {"a": 1})
        assert list(directory.iterdir()) == [path]


# Death at any moment


class _Disk:
    """Stands in for the calls that write, in halves, and notes what the file is if all ends there.

    Attributes:
        images: what the file may be at each of the moments: as the process left it, and, for a machine that loses its
            power, with any of the writes since the last fsync lost.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.durable = path.read_bytes()
        self.pending: list[tuple[int, bytes]] = []
        self.images = [self.durable]
        write, fsync = os.write, os.fsync

        def half_a_write(descriptor: int, data: Any) -> int:
            position = os.lseek(descriptor, 0, os.SEEK_CUR)
            some = bytes(data[: max(1, len(data) // 2)])
            written = write(descriptor, some)
            self.pending.append((position, some[:written]))
            self.note()
            return written

        def noted_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.durable, self.pending = path.read_bytes(), []
            self.note()

        monkeypatch.setattr(os, "write", half_a_write)
        monkeypatch.setattr(os, "fsync", noted_fsync)

    def note(self) -> None:
        self.images.append(self.path.read_bytes())
        last = self.pending[-6:]
        for kept in itertools.product((False, True), repeat=len(last)):
            image = bytearray(self.durable)
            for keep, (position, data) in zip(kept, last, strict=True):
                if keep:
                    image.extend(bytes(max(0, position + len(data) - len(image))))
                    image[position : position + len(data)] = data
            self.images.append(bytes(image))


_CHANGES: dict[str, tuple[Callable[[BankFile], None], dict[str, int]]] = {
    "add": (lambda file: file.add("c", row_of(3), replacing=None), {"a": 1, "b": 2, "c": 3}),
    "replace": (lambda file: file.add("a", row_of(3), replacing=row_of(1).digest), {"a": 3, "b": 2}),
    "share": (lambda file: file.add("c", row_of(1), replacing=None), {"a": 1, "b": 2, "c": 1}),
    "remove": (lambda file: file.remove("a", row_of(1).digest), {"b": 2}),
}


@pytest.mark.parametrize("change", list(_CHANGES))
def test_whoever_dies_leaves_the_last_committed_state(change: str, path: Path) -> None:
    do, after = _CHANGES[change]
    before = {"a": 1, "b": 2}
    file = make(path, before)
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = _Disk(path, monkeypatch)
        do(file)
    file.close()
    states, torn, refused = [], 0, 0
    for number, image in enumerate(dict.fromkeys(disk.images)):
        copy = path.with_name(f"{number}")
        copy.write_bytes(image)
        try:
            opened = BankFile(copy)
        except BankError as error:
            # Half of the 16 bytes that are the commit: no system and no disk divides those.
            torn += "contradicts itself" in str(error)
            refused += 1
            continue
        state = next(s for s in (before, after) if {n: row_of(i).digest for n, i in s.items()} == opened.names)
        opened.close()
        assert_holds(copy, state)
        states.append(state)
        opened = BankFile(copy)
        opened.add("later", row_of(9), replacing=None)
        opened.close()
        assert_holds(copy, {**state, "later": 9})
        if state == before:
            opened = BankFile(copy)
            do(opened)  # once more, over what was left half done
            opened.close()
            assert_holds(copy, {**after, "later": 9})
    assert before in states and after in states and len(states) > 10 and torn == refused <= 4


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_bank_file import row_of
from veratune.bank import BankError
from veratune.bank.file import BankFile
file, own = BankFile(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    file.add(f"{{own}}-{{number}}", row_of(number), replacing=None)
    if number % 3 == 2:
        file.remove(f"{{own}}-{{number}}", row_of(number).digest)
    while True:  # the name that all of them want
        file.refresh()
        try:
            file.add("contended", row_of(number), replacing=file.names.get("contended"))
            break
        except BankError as error:
            assert "another process" in str(error)
    print(number, flush=True)
"""


def start_writer(path: Path, own: str, count: int) -> "subprocess.Popen[str]":
    code = _WRITER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(path), own, str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process


def begin(processes: "list[subprocess.Popen[str]]") -> None:
    """Let them write once all of them are ready to."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def test_writers_in_several_processes_and_a_reader(path: Path) -> None:
    make(path).close()
    count, owners = 40, ["p", "q", "r"]
    writers = [start_writer(path, own, count) for own in owners]
    begin(writers)
    reader = BankFile(path)
    seen: set[str] = set()
    while any(writer.poll() is None for writer in writers):
        reader.refresh()
        new = reader.names.keys() - seen
        for name in new - {"contended"}:
            digest = reader.names[name]
            assert_same(reader.row(digest), row_of(int(name.rpartition("-")[2])))
        seen |= new
    for writer in writers:
        assert writer.communicate()[0].split() == [str(number) for number in range(count)]
        assert writer.returncode == 0
    kept = {f"{own}-{number}": number for own in owners for number in range(count) if number % 3 != 2}
    reader.refresh()
    contended = reader.names.pop("contended")
    assert contended in {row_of(number).digest for number in range(count)}
    assert reader.names == {name: row_of(number).digest for name, number in kept.items()}
    assert len(reader.adapters) == count  # equal adapters are there once, whoever wrote them


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_a_killed_writer_lets_the_next_one_in(path: Path) -> None:
    make(path).close()
    told: dict[str, int] = {}
    for generation in range(3):
        writer = start_writer(path, f"g{generation}", 10_000)
        begin([writer])
        assert writer.stdout is not None
        for _ in range(5 + 4 * generation):
            told[f"g{generation}"] = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert writer.stdin is not None
        writer.stdin.close()
    file = BankFile(path)
    for own, last in told.items():
        for number in range(last + 1):  # what it was told of is there
            assert (f"{own}-{number}" in file.names) == (number % 3 != 2)
    for name, digest in file.names.items():
        if name != "contended":
            assert_same(file.row(digest), row_of(int(name.rpartition("-")[2])))
    file.add("after", row_of(1), replacing=None)
    assert BankFile(path).names["after"] == row_of(1).digest


# A disk that refuses


@pytest.mark.parametrize("change", list(_CHANGES))
@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_at_any_step(change: str, problem: int, path: Path) -> None:
    do, after = _CHANGES[change]
    before = {"a": 1, "b": 2}
    write, fsync = os.write, os.fsync
    for step in itertools.count():
        own = path.with_name(f"step {step}")
        file = make(own, before)
        length = own.stat().st_size
        calls = itertools.count()

        def refuse(call: Callable[..., Any], *arguments: Any, calls: Any = calls, step: int = step) -> Any:
            if next(calls) == step:
                raise OSError(problem, os.strerror(problem))
            return call(*arguments)

        with pytest.MonkeyPatch.context() as monkeypatch:
            # Pieces of some bytes, so that refusals come in their midst as well.
            monkeypatch.setattr(os, "write", lambda fd, data: refuse(write, fd, data[: max(1, len(data) // 3)]))
            monkeypatch.setattr(os, "fsync", lambda fd: refuse(fsync, fd))
            try:
                do(file)
            except BankError as error:
                message = str(error)
            else:
                assert next(calls) == step  # it has been through all of them
                break
        assert os.strerror(problem) in message
        if "refresh() shows" in message:
            assert_holds(own, after)
            file.refresh()
            assert set(file.names) == set(after)
            continue
        assert "it is as it was before" in message
        assert own.stat().st_size == length
        assert_holds(own, before)
        do(file)  # the same object goes on when there is room again
        assert_holds(own, after)
    assert step > 8
    assert_holds(own, after)


def test_a_disk_that_is_full_when_a_file_is_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BankError, match="No space left"):
        make(path)
    assert list(path.parent.iterdir()) == []


# Damage


def outcome(path: Path, expected: dict[str, int]) -> str:
    """Open and read all of a file that was tampered with: "refused", or "right"; anything else fails."""
    try:
        file = BankFile(path)
    except BankError:
        return "refused"
    try:
        assert file.names == {name: row_of(seed).digest for name, seed in expected.items()}
        for name, seed in expected.items():
            assert_same(file.row(file.names[name]), row_of(seed))
    except BankError:
        return "refused"
    finally:
        file.close()
    return "right"


def test_a_flipped_bit_anywhere(path: Path) -> None:
    expected = {"a": 3, "b": 2, "c": 2}
    file = make(path, {"a": 1, "b": 2, "c": 2})
    file.add("a", row_of(3), replacing=row_of(1).digest)
    file.close()
    whole = path.read_bytes()
    chance = random.Random(0)
    outcomes = []
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        outcomes.append(outcome(path, expected))
    # Right where it hit padding, or the values of an adapter that no name means any more.
    refused = [place for place, found in enumerate(outcomes) if found == "refused"]
    assert len(refused) > len(whole) // 2
    payloads = whole.index(row_of(2).vectors.numpy().tobytes()), whole.index(row_of(3).vectors.numpy().tobytes())
    for start in payloads:
        assert set(range(start, start + row_of(2).vectors.nbytes)) <= set(refused)
    assert set(range(8)) | set(range(16, 32)) <= set(refused)


def test_a_file_cut_anywhere(path: Path) -> None:
    make(path, {"a": 1, "b": 2}).close()
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert outcome(path, {"a": 1, "b": 2}) == "refused"
    path.write_bytes(whole + b"what a writer left half done" * 9)
    assert outcome(path, {"a": 1, "b": 2}) == "right"


def test_garbage_anywhere(path: Path) -> None:
    """Pieces overwritten, inserted, taken out, and put elsewhere, by chance."""
    expected = {"a": 1, "b": 2}
    make(path, expected).close()
    whole = path.read_bytes()
    chance = random.Random(1)
    found = []
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            start, length = chance.randrange(len(data)), chance.randrange(1, 200)
            kind = chance.randrange(5)
            if kind == 0:
                data[start : start + length] = chance.randbytes(length)
            elif kind == 1:
                data[start:start] = chance.randbytes(length)
            elif kind == 2:
                del data[start : start + length]
            elif kind == 3:
                data[start : start + length] = bytes(length)
            else:
                other = chance.randrange(0, len(whole), 64)
                data[start : start + length] = whole[other : other + length]
            data = data or bytearray(b"x")
        path.write_bytes(data)
        found.append(outcome(path, expected))
    assert found.count("refused") > 2000


def test_records_that_only_look_right(path: Path) -> None:
    """With a check that fits, as a program with a fault could write them."""
    good = {"kind": "adapter", "digest": "0" * 32, "rank": 1, "sha256": "0" * 64}
    good["source"] = {"scheme": "per_dimension", "key": 0, "fingerprint": PerDimension(0).fingerprint()}
    payload = bytes(layout_of().numbers * 4)
    for header, data, message in (
        ({"kind": "later"}, b"", "'later' is unknown to this veratune"),
        ({"kind": 3}, b"", "says no kind"),
        ({}, b"", "says no kind"),
        (good | {"digest": "0" * 31}, payload, "digest is"),
        (good | {"digest": None}, payload, "digest is None"),
        (good | {"sha256": "G" * 64}, payload, "SHA-256"),
        (good | {"rank": 5}, payload, "rank is 5 in a bank of 4"),
        (good | {"rank": True}, payload, "rank is True"),
        (good | {"source": {}}, payload, "projections are"),
        (good | {"source": None}, payload, "projections are None"),
        (good | {"source": good["source"] | {"key": "0"}}, payload, "projections are"),
        (good | {"source": good["source"] | {"scheme": "peft"}}, payload, "projections are"),
        (good | {"source": good["source"] | {"scheme": []}}, payload, "projections are"),
        (good, payload[:-4], "bytes, not"),
        (good, payload + b"\0", "bytes, not"),
        ({"kind": "name", "name": "x", "digest": "0" * 32}, b"", "which is not in the file"),
        ({"kind": "name", "name": 3, "digest": None}, b"", "the name is 3"),
        ({"kind": "name", "name": "x"}, b"", "'x' means None"),
        ({"kind": "name", "name": "x", "digest": []}, b"", "means"),
    ):
        make(path, {"a": 1}).close()
        append_raw(path, pack(header, data))
        with pytest.raises(BankError, match="is damaged at byte .*" + message):
            BankFile(path)
        path.unlink()
    layout = layout_of().describe()
    first = {"kind": "bank", "layout": layout, "dtype": "float32", "head_dtype": None}
    for change in (
        {"kind": "adapter"},
        {"dtype": "int8"},
        {"dtype": []},
        {"head_dtype": "float32"},
        {"head_dtype": {}},
        {"layout": None},
        {"layout": {}},
        {"layout": layout | {"rank": -1}},
        {"layout": layout | {"rank": 1 << 60}},
        {"layout": layout | {"layers": []}},
        {"layout": layout | {"layers": [["first", 3, 5, [2, 2]]]}},
        {"layout": layout | {"layers": [["first", 3, 5]]}},
        {"layout": layout | {"heads": [["classifier", [["weight", [1 << 30, 1 << 30]]]]]}},
        {"layout": layout | {"heads": [["classifier", [["weight", [2]]]]]}},
    ):
        record = pack(first | change)
        end = 64 + len(record)
        start = b"VERABANK" + (1).to_bytes(4, "little") + bytes(4) + commit(end)
        path.write_bytes(start.ljust(64, b"\0") + record)
        with pytest.raises(BankError, match="is damaged at byte 64"):
            BankFile(path)


def commit(end: int) -> bytes:
    return end.to_bytes(8, "little") + (~end % (1 << 64)).to_bytes(8, "little")


def append_raw(path: Path, record: bytes) -> None:
    data = bytearray(path.read_bytes() + record)
    data[16:32] = commit(len(data))
    path.write_bytes(data)


def test_projections_that_are_drawn_otherwise(path: Path) -> None:
    file = make(path, {"a": 2})
    file.close()
    own = PerDimension(2).fingerprint().encode()
    other = PerDimension(4).fingerprint().encode()
    make(path.with_name("other"), {"a": 4}).close()
    record = pack(
        {
            "kind": "adapter",
            "digest": "1" * 32,
            "source": {"scheme": "per_dimension", "key": 2, "fingerprint": other.decode()},
            "rank": 1,
            "sha256": hashlib.sha256(bytes(72)).hexdigest(),
        },
        bytes(72),
    )
    assert own != other and layout_of().numbers * 4 == 72
    append_raw(path, record)
    file = BankFile(path)
    assert_same(file.row(row_of(2).digest), row_of(2))
    with pytest.raises(BankError, match="are drawn otherwise here"):
        file.row("1" * 32)


def test_a_damaged_adapter_is_mended_by_adding_it_again(path: Path) -> None:
    file = make(path, {"a": 1, "b": 2})
    data = bytearray(path.read_bytes())
    data[data.index(row_of(1).vectors.numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(BankError, match="another SHA-256"):
        file.row(row_of(1).digest)
    assert_same(file.row(row_of(2).digest), row_of(2))
    file.add("again", row_of(1), replacing=None)
    assert_holds(path, {"a": 1, "b": 2, "again": 1})


# What others do to a file that is open


def test_a_file_that_is_cut_while_it_is_open(path: Path) -> None:
    """Reading a map behind the end of its file would end the process."""
    file = make(path, {f"n{seed}": seed for seed in range(200)})
    assert path.stat().st_size > 3 * 4096
    os.truncate(path, 4096)
    for call in (
        lambda: file.row(row_of(199).digest),
        file.refresh,
        lambda: file.add("x", row_of(1), replacing=None),
    ):
        with pytest.raises(BankError, match="cut short"):
            call()
    assert_same(file.row(row_of(1).digest), row_of(1))
    os.truncate(path, 0)
    with pytest.raises(BankError, match="cut short"):
        file.row(row_of(1).digest)


def test_a_file_that_is_replaced_or_removed_while_it_is_open(path: Path) -> None:
    file = make(path, {"a": 1})
    other = make(path.with_name("other"), {"b": 2})
    other.close()
    path.with_name("other").replace(path)
    for call in (file.refresh, lambda: file.add("x", row_of(1), replacing=None)):
        with pytest.raises(BankError, match="replaced by another file"):
            call()
    assert_holds(path, {"b": 2})
    path.unlink()
    with pytest.raises(BankError, match="cannot be read any more"):
        file.refresh()
    with pytest.raises(BankError, match="cannot be written to"):
        file.add("x", row_of(1), replacing=None)
    assert not path.exists()
    assert_same(file.row(row_of(1).digest), row_of(1))  # what it has open it still has


def test_a_closed_file(path: Path) -> None:
    file = make(path, {"a": 1})
    row = file.row(row_of(1).digest)
    file.close()
    file.close()
    assert_same(row, row_of(1))
    for call in (lambda: file.row(row_of(1).digest), file.refresh, lambda: file.add("x", row, replacing=None)):
        with pytest.raises(BankError, match="has been closed"):
            call()


def test_threads_read_while_others_write(path: Path) -> None:
    file = make(path, {"n0": 0})
    problems: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        chance = random.Random(threading.get_ident())
        try:
            while not done.is_set():
                name, digest = chance.choice(list(file.names.items()))
                assert_same(file.row(digest), row_of(int(name[1:])))
        except BaseException as error:
            problems.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for seed in range(1, 150):
            file.add(f"n{seed}", row_of(seed), replacing=None)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert problems == []
    assert_holds(path, {f"n{seed}": seed for seed in range(150)})
