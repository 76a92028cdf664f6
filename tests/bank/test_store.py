"""A bank's file against what may happen to it: other writers, death at any moment, a full disk, files in its place."""

import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bank_files import assert_holds, assert_same, layout_of, make, row_of
from veratune.adapters.targets import find_targets
from veratune.bank import BankError
from veratune.bank import connection as connection_module
from veratune.bank import store as store_module
from veratune.bank.layout import Layout, make_layout
from veratune.bank.store import AdapterGoneError, BankStore
from veratune.config import VeraConfig
from veratune.projections.schemes import Stored

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


def fast(file: BankStore) -> None:
    """Let changes not wait for the disk."""
    with file._connections.writer() as connection:
        connection.execute("PRAGMA synchronous=OFF")


# What is written is what is read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("saved", [0, 3])
def test_rows_come_back_to_the_bit(dtype: torch.dtype, saved: int, path: Path) -> None:
    layout = layout_of(saved=saved)
    file = BankStore.create(path, layout, dtype, torch.float32 if saved else None)
    rows = {name: row_of(seed, layout, dtype) for seed, name in enumerate(_NAMES)}
    for name, row in rows.items():
        file.add(name, row, replacing=None)
    for opened in (file, BankStore(path)):
        assert list(opened.names) == _NAMES
        for name, row in rows.items():
            assert_same(opened.row(opened.names[name]), row)
        opened.check_layout(layout)
        opened.check_dtypes(dtype, torch.float32 if saved else None)


def test_names_of_equal_adapters_share_the_values(path: Path) -> None:
    file = make(path, {"a": 1})
    file.add("b", row_of(1), replacing=None)
    assert len(file.adapters) == 1
    file.remove("a", row_of(1).digest)
    assert_holds(path, {"b": 1})


def test_replaced_and_removed_names(path: Path) -> None:
    file = make(path, {"a": 1, "b": 2, "c": 2})
    file.add("a", row_of(3), replacing=row_of(1).digest)
    file.remove("b", row_of(2).digest)
    assert_holds(path, {"a": 3, "c": 2})
    assert_same(file.row(row_of(2).digest), row_of(2))
    with pytest.raises(BankError, match="has no adapter"):
        file.row(row_of(1).digest)
    with pytest.raises(BankError, match=r"changed in .* by another process"):
        file.add("a", row_of(4), replacing=row_of(1).digest)
    with pytest.raises(BankError, match=r"changed in .* by another process"):
        file.add("a", row_of(4), replacing=None)
    with pytest.raises(BankError, match=r"changed in .* by another process"):
        file.remove("b", row_of(2).digest)
    with pytest.raises(BankError, match="has no adapter"):
        file.row("0" * 32)
    file.add("b", row_of(1), replacing=None)
    assert_holds(path, {"a": 3, "c": 2, "b": 1})


@pytest.mark.parametrize("name", ["", "n" * 257, "客" * 86, "a\nb", "\x1b[31mred", "\u202e", "\ud800", "a\0b"])
def test_names_that_are_not_allowed(name: str, path: Path) -> None:
    file = make(path)
    with pytest.raises(BankError, match="1 to 256 bytes in UTF-8") as raised:
        file.add(name, row_of(1), replacing=None)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400
    file.add("客" * 85, row_of(1), replacing=None)
    assert_holds(path, {"客" * 85: 1})


def test_ten_thousand_names(path: Path) -> None:
    file = make(path)
    fast(file)
    for number in range(10_000):
        file.add(f"customer {number}", row_of(number % 100), replacing=None)
    again = BankStore(path)
    assert again.names == file.names and len(again.names) == 10_000 and len(again.adapters) == 100
    assert_same(again.row(again.names["customer 9042"]), row_of(42))


def test_space_is_used_again_and_given_back(path: Path) -> None:
    file = make(path, {f"n{seed}": seed for seed in range(100)})
    size, free = file.sizes()
    assert size == path.stat().st_size and free < 0.2 * size
    for seed in range(90):
        file.remove(f"n{seed}", row_of(seed).digest)
    assert file.sizes()[0] == size and file.sizes()[1] > 0.5 * size
    for seed in range(90):
        file.add(f"n{seed}", row_of(seed), replacing=None)
    assert file.sizes()[0] == size
    for seed in range(90):
        file.remove(f"n{seed}", row_of(seed).digest)
    reader = BankStore(path)
    file.compact()
    assert file.sizes() == (path.stat().st_size, 0) and path.stat().st_size < 0.5 * size
    for store in (file, reader):
        store.refresh()
        assert_same(store.row(row_of(95).digest), row_of(95))
    assert_holds(path, {f"n{seed}": seed for seed in range(90, 100)})


def test_projections_read_from_a_file_are_refused(path: Path) -> None:
    file = make(path, {"a": 1})
    stored = Stored.from_tensors(torch.ones(4, 3), torch.ones(5, 4))
    with pytest.raises(BankError, match="Create the bank without a file"):
        file.add("b", replace(row_of(2), scheme=stored), replacing=None)
    assert_holds(path, {"a": 1})


# What a file is for


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (layout_of(rank=5), "rank 4, not 5"),
        (layout_of(out=6), "layers that differ in first, second"),
        (layout_of(layers=("first",)), "layers that differ in second"),
        (layout_of(layers=tuple("abcde")), "layers that differ in a, b, c and 4 more"),
        (layout_of(layers=("second", "first")), "its layers are in another order"),
        (layout_of(saved=2), "modules_to_save that differ in classifier"),
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
    with pytest.raises(BankError, match=r"stores vectors in torch\.float32, .* uses torch\.bfloat16"):
        file.check_dtypes(torch.bfloat16, None)
    with pytest.raises(BankError, match=r"stores modules_to_save in None, .* uses torch\.float32"):
        file.check_dtypes(torch.float32, torch.float32)


def test_creating_where_it_cannot_be(path: Path) -> None:
    make(path, {"a": 1}).close()
    with pytest.raises(BankError, match="already exists"):
        make(path)
    assert_holds(path, {"a": 1})
    with pytest.raises(BankError, match="cannot be created"):
        make(path / "below a file")
    with pytest.raises(BankError, match="cannot be opened"):
        BankStore(path.parent / "nowhere")
    with pytest.raises(BankError, match="is a directory: pass a bank file"):
        BankStore(path.parent)
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
    assert sorted(outcomes) == ["exists"] * 7 + ["made"]
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
            file = BankStore(path)
            assert_same(file.row(file.names["a"]), row_of(1))
            for write in (
                lambda: file.add("b", row_of(2), replacing=None),
                lambda: file.remove("a", row_of(1).digest),
            ):
                with pytest.raises(BankError, match="cannot be written to: Permission denied"):
                    write()
            with pytest.raises(BankError, match="cannot be created: Permission denied"):
                make(directory / "other")
        finally:
            os.seteuid(own)
            directory.chmod(0o755)
            file.close()
        assert_holds(path, {"a": 1})
        assert list(directory.iterdir()) == [path]


# Several processes, and their deaths

_CHANGES: dict[str, tuple[Callable[[BankStore], None], dict[str, int]]] = {
    "add": (lambda file: file.add("c", row_of(3), replacing=None), {"a": 1, "b": 2, "c": 3}),
    "replace": (lambda file: file.add("a", row_of(3), replacing=row_of(1).digest), {"a": 3, "b": 2}),
    "share": (lambda file: file.add("c", row_of(1), replacing=None), {"a": 1, "b": 2, "c": 1}),
    "remove": (lambda file: file.remove("a", row_of(1).digest), {"b": 2}),
    "compact": (lambda file: file.compact(), {"a": 1, "b": 2}),
}

_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from bank_files import row_of
from veratune.bank import BankError
from veratune.bank.store import AdapterGoneError, BankStore
file, own = BankStore(Path(sys.argv[1])), sys.argv[2]
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
file.close()
"""


def start_writer(path: Path, own: str, count: int) -> "subprocess.Popen[str]":
    code = _WRITER.format(tests=str(Path(__file__).parents[1] / "helpers"))
    command = [sys.executable, "-c", code, str(path), own, str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_writers_in_several_processes_and_a_reader(path: Path) -> None:
    make(path).close()
    count, owners = 20, ["p", "q", "r"]
    writers = [start_writer(path, own, count) for own in owners]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    reader = BankStore(path)
    seen: set[str] = set()
    while any(writer.poll() is None for writer in writers):
        reader.refresh()
        for name in reader.names.keys() - seen - {"contended"}:
            with suppress(AdapterGoneError):  # removed since
                assert_same(reader.row(reader.names[name]), row_of(int(name.rpartition("-")[2])))
        seen |= reader.names.keys()
    for writer in writers:
        assert writer.communicate()[0].split() == [str(number) for number in range(count)]
        assert writer.returncode == 0
    kept = {f"{own}-{number}": number for own in owners for number in range(count) if number % 3 != 2}
    reader.refresh()
    contended = reader.names.pop("contended")
    assert contended in {row_of(number).digest for number in range(count)}
    assert reader.names == {name: row_of(number).digest for name, number in kept.items()}
    assert reader.adapters.keys() == {contended, *reader.names.values()}  # once, whoever wrote them
    reader.close()
    assert list(path.parent.iterdir()) == [path]


_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from bank_files import assert_same, row_of
from veratune.bank.store import AdapterGoneError, BankStore
path, chance = Path(sys.argv[1]), random.Random(0)
store = BankStore(path)  # which the first child inherits
journals = 0
for child in range(40):
    told, tell = os.pipe()
    process = os.fork()
    if not process:
        own = store if child == 0 else BankStore(path)
        for number in range(10**6):
            own.add(f"{{child}}-{{number}}", row_of(number), replacing=None)
            os.write(tell, b"a")
            if number % 3 == 2:
                own.remove(f"{{child}}-{{number}}", row_of(number).digest)
                os.write(tell, b"r")
            if number % 5 == 4:
                own.compact()
    os.close(tell)
    heard = os.read(told, 1)
    time.sleep(chance.random() * 0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    while more := os.read(told, 1000):
        heard += more
    os.close(told)
    journal = Path(f"{{path}}-journal")
    journals += journal.exists() and any(journal.read_bytes()[:28])
    states, number = [], 0
    for step in range(2 + len(heard)):  # what there is after each of the steps that the child told of, and the next
        states.append({{n for n in range(number) if n % 3 != 2 or (n == number - 1 and step % 4 == 3)}})
        number += step % 4 != 3
    if child:
        store = BankStore(path)
    store.refresh()
    found = {{int(name.partition("-")[2]) for name in store.names if name.startswith(f"{{child}}-")}}
    assert found in states[-2:], (heard, sorted(found), states[-2:])
    for name, digest in store.names.items():
        assert_same(store.row(digest), row_of(int(name.partition("-")[2])))
    for name, digest in list(store.names.items()):
        store.remove(name, digest)
    assert not store.structural_problems()
    store.close()
print(journals)
"""


@pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL are POSIX's")
def test_whoever_is_killed_leaves_the_file_as_it_was_before_or_after_a_change(path: Path) -> None:
    make(path).close()
    code = _KILLED.format(tests=str(Path(__file__).parents[1] / "helpers"))
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0  # of the forty some died in the midst of a change


def test_a_change_that_was_cut_off_is_taken_back(path: Path) -> None:
    """As the machine may lose its power: with pages of the change in the file, and the journal beside it."""
    names = {f"n{seed}": seed for seed in range(20)}
    file = make(path, names)
    copy = path.with_name("copy")
    with file._connections.writer() as connection:
        connection.execute("PRAGMA cache_size=1")
        connection.execute("BEGIN IMMEDIATE")
        before = path.read_bytes()
        connection.execute("UPDATE names SET digest = ''")
        connection.execute("UPDATE adapters SET vectors = zeroblob(100000)")
        for end in ("", "-journal"):
            shutil.copyfile(f"{path}{end}", f"{copy}{end}")
        connection.execute("ROLLBACK")
    assert copy.read_bytes() != before
    torn = copy.read_bytes()
    assert_holds(copy, names)
    assert_holds(path, names)
    path.with_name("torn").write_bytes(torn)  # a copy without the journal
    with pytest.raises(BankError, match="damaged"):
        assert_holds(path.with_name("torn"), names)


def test_another_process_that_does_not_finish(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "PATIENCE", 0.05)
    file = make(path, {"a": 1})
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(BankError, match="cannot be written to: another process has kept it locked"):
        file.add("b", row_of(2), replacing=None)
    assert_same(file.row(row_of(1).digest), row_of(1))  # whose change is not there yet
    other.execute("ROLLBACK")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(BankError, match="cannot be read: another process has kept it locked"):
        file.row(row_of(1).digest)
    other.close()
    file.add("b", row_of(2), replacing=None)
    assert_holds(path, {"a": 1, "b": 2})


# A disk that refuses


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(file: BankStore, names: dict[str, int]) -> None:
    for seed in range(2, 1000):
        file.add(f"n{seed}", row_of(seed), replacing=None)
        names[f"n{seed}"] = seed


@pytest.mark.parametrize("change", list(_CHANGES))
def test_a_disk_that_refuses_at_any_step(change: str, path: Path) -> None:
    do, after = _CHANGES[change]
    make(path, {"a": 1, "b": 2}).close()
    refused = 0
    for limit in (0, 100, 512, 600, 4000, 5000, 10_000, 20_000, path.stat().st_size, 1 << 20):
        own = path.with_name(f"limit {limit}")
        shutil.copyfile(path, own)
        file = BankStore(own)
        message = ""
        with files_of_at_most(limit):
            try:
                do(file)
            except BankError as error:
                message = str(error)
        if message:
            assert "cannot be written to: " in message
            assert "the file is unchanged" in message
            assert_holds(own, {"a": 1, "b": 2})
            do(file)  # the same object goes on when there is room again
            refused += 1
        assert_holds(own, after)
        file.close()
    assert refused > 3


def test_a_disk_that_is_full(path: Path) -> None:
    file = make(path, {"a": 1})
    writer = file._connections._current(file._connections._writer)
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count={pages}")
    names = {"a": 1}
    with pytest.raises(BankError, match="No space left on disk; the file is unchanged"):
        fill(file, names)
    assert_holds(path, names)
    with files_of_at_most(8000), pytest.raises(BankError, match="cannot be created"):
        make(path.with_name("other"))
    file.close()
    assert list(path.parent.iterdir()) == [path]


# What others do to a file that is open


def test_a_backup_that_is_copied_over_an_open_file(path: Path) -> None:
    backup = path.with_name("backup")
    file = make(path, {"a": 1, "b": 2})
    shutil.copyfile(path, backup)  # nobody writes: it is all there
    assert_holds(backup, {"a": 1, "b": 2})
    file.add("a", row_of(3), replacing=row_of(1).digest)
    reader = BankStore(path)
    shutil.copyfile(backup, path)
    for store in (file, reader):
        assert_same(store.row(row_of(2).digest), row_of(2))
        with pytest.raises(BankError, match="has no adapter"):
            store.row(row_of(3).digest)
        store.refresh()
        assert store.names == {"a": row_of(1).digest, "b": row_of(2).digest}
        assert_same(store.row(row_of(1).digest), row_of(1))
    file.add("c", row_of(4), replacing=None)
    assert_holds(path, {"a": 1, "b": 2, "c": 4})


def test_another_bank_that_is_copied_over_an_open_file(path: Path) -> None:
    """One of as many changes and pages, from which SQLite would not tell it apart."""
    file, other = make(path, {"a": 1, "b": 2}), make(path.with_name("other"), {"a": 3, "b": 4})
    other.close()
    assert_same(file.row(row_of(1).digest), row_of(1))
    shutil.copyfile(other.path, path)
    with pytest.raises(BankError, match="has no adapter"):
        file.row(row_of(1).digest)
    with pytest.raises(BankError, match="by another process"):
        file.remove("a", row_of(1).digest)
    file.refresh()
    file.add("c", row_of(5), replacing=None)
    assert_holds(path, {"a": 3, "b": 4, "c": 5})
    another = BankStore.create(path.with_name("another"), layout_of(rank=5), torch.float32, None)
    another.close()
    shutil.copyfile(another.path, path)
    for call in (file.refresh, lambda: file.row(row_of(3).digest), lambda: file.remove("a", row_of(3).digest)):
        with pytest.raises(BankError, match="overwritten with another bank"):
            call()


def test_copies_over_a_file_while_it_is_read(path: Path) -> None:
    backup = path.with_name("backup")
    make(path, {f"n{seed}": seed for seed in range(100)}).close()
    shutil.copyfile(path, backup)
    file = BankStore(path)
    done = threading.Event()

    def copy() -> None:
        while not done.is_set():
            shutil.copyfile(backup, path)

    copying = threading.Thread(target=copy)
    copying.start()
    for number in range(2000):
        with suppress(BankError):  # every read may meet a half-written file: that is up to the scheduler
            assert_same(file.row(row_of(number % 100).digest), row_of(number % 100))
    done.set()
    copying.join()
    file.refresh()
    for seed in range(100):
        assert_same(file.row(row_of(seed).digest), row_of(seed))
    assert_holds(path, {f"n{seed}": seed for seed in range(100)})


def test_a_file_that_is_cut_while_it_is_open(path: Path) -> None:
    file = make(path, {f"n{seed}": seed for seed in range(200)})
    for size in (4 * 4096, 0):
        os.truncate(path, size)
        for call in (
            lambda: file.row(row_of(199).digest),
            file.refresh,
            lambda: file.add("x", row_of(1), replacing=None),
        ):
            with pytest.raises(BankError, match=r"is damaged|is not a bank file"):
                call()


def test_a_file_that_is_replaced_or_removed_while_it_is_open(path: Path) -> None:
    file = make(path, {"a": 1})
    other = make(path.with_name("other"), {"b": 2})
    other.close()
    path.with_name("other").replace(path)
    for call in (file.refresh, lambda: file.add("x", row_of(1), replacing=None)):
        with pytest.raises(BankError, match="replaced by another file"):
            call()
    assert_same(file.row(row_of(1).digest), row_of(1))  # what it has open it still has
    assert_holds(path, {"b": 2})
    journal = Path(f"{path}-journal")
    journal.write_bytes(b"of the other file")
    with pytest.raises(BankError, match="replaced by another file"):
        file.row(row_of(1).digest)
    journal.unlink()
    path.unlink()
    for call in (file.refresh, lambda: file.add("x", row_of(1), replacing=None)):
        with pytest.raises(BankError, match="can no longer be read"):
            call()
    assert not path.exists()
    assert_same(file.row(row_of(1).digest), row_of(1))


def test_a_closed_file(path: Path) -> None:
    file = make(path, {"a": 1})
    row = file.row(row_of(1).digest)
    file.close()
    file.close()
    assert_same(row, row_of(1))
    for call in (lambda: file.row(row_of(1).digest), file.refresh, lambda: file.add("x", row, replacing=None)):
        with pytest.raises(BankError, match="has been closed"):
            call()
    assert list(path.parent.iterdir()) == [path]


def test_a_relative_path_and_one_with_letters_that_mean_something(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    file = make(Path("50%?mode=ro#x"), {"a": 1})
    link = path.with_name("link")
    link.symlink_to(path.with_name("50%?mode=ro#x"))
    monkeypatch.chdir("/")
    file.add("b", row_of(2), replacing=None)
    linked = BankStore(link)
    linked.add("c", row_of(3), replacing=None)
    linked.close()
    file.refresh()
    assert set(file.names) == {"a", "b", "c"}


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


# Refreshing and batches


def test_refresh_after_changes_of_every_kind(path: Path) -> None:
    """Rows that were only added are read alone; whatever else has changed, names and their order are the file's."""
    file, other = make(path, {"a": 1, "b": 2, "c": 3}), BankStore(path)
    digests = {seed: row_of(seed).digest for seed in range(1, 10)}

    def assert_follows(expected: dict[str, int]) -> None:
        file.refresh()
        assert list(file.names.items()) == [(name, digests[seed]) for name, seed in expected.items()]
        assert file.adapters.keys() == {digests[seed] for seed in expected.values()}
        assert_holds(path, expected)

    other.add("d", row_of(4), replacing=None)
    other.add("e", row_of(1), replacing=None)  # an adapter that is there
    assert_follows({"a": 1, "b": 2, "c": 3, "d": 4, "e": 1})
    other.add("b", row_of(5), replacing=digests[2])
    other.add("f", row_of(6), replacing=None)
    assert_follows({"a": 1, "b": 5, "c": 3, "d": 4, "e": 1, "f": 6})
    other.remove("f", digests[6])
    other.add("g", row_of(7), replacing=None)  # gets the ids of the one that was removed
    assert_follows({"a": 1, "b": 5, "c": 3, "d": 4, "e": 1, "g": 7})
    other.add("h", row_of(8), replacing=None)
    file.add("i", row_of(9), replacing=None)
    assert_follows({"a": 1, "b": 5, "c": 3, "d": 4, "e": 1, "g": 7, "h": 8, "i": 9})
    other.add("j", row_of(1), replacing=None)
    file.add("c", row_of(2), replacing=digests[3])
    other.add("c", row_of(3), replacing=digests[2])  # back again, so that the file only seems to have one name more
    assert_follows({"a": 1, "b": 5, "c": 3, "d": 4, "e": 1, "g": 7, "h": 8, "i": 9, "j": 1})
    other.remove("j", digests[1])
    other.remove("a", digests[1])
    assert_follows({"b": 5, "c": 3, "d": 4, "e": 1, "g": 7, "h": 8, "i": 9})
    other.remove("e", digests[1])
    assert_follows({"b": 5, "c": 3, "d": 4, "g": 7, "h": 8, "i": 9})


def test_refresh_reads_only_what_was_added(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = make(path, {f"n{seed}": seed for seed in range(9)}), BankStore(path)
    read: list[int] = []
    read_contents = store_module.read_contents

    def counted(*args: Any) -> Any:
        contents = read_contents(*args)
        read.append(len(contents.names))
        return contents

    monkeypatch.setattr(store_module, "read_contents", counted)
    other.add("more", row_of(20), replacing=None)
    file.refresh()
    file.add("own", row_of(21), replacing=None)
    file.refresh()
    other.refresh()
    assert read == [1, 1] and list(file.names)[-2:] == ["more", "own"] == list(other.names)[-2:]


def test_a_batch_is_one_transaction(path: Path) -> None:
    file = make(path, {"a": 1})
    before, (changes, _) = path.read_bytes(), file._state

    def fail(error: BaseException) -> None:
        with file.batch():
            file.add("b", row_of(2), replacing=None)
            raise error

    for error in (OSError("elsewhere"), BankError("no"), sqlite3.OperationalError("elsewhere"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised:
            fail(error)
        assert raised.value is error and path.read_bytes() == before  # not explained as an error of this file
    file.close()
    file = BankStore(path)
    with file.batch():
        file.add("b", row_of(2), replacing=None)
        file.add("c", row_of(3), replacing=None)
        file.add("b", row_of(4), replacing=row_of(2).digest)
        assert_holds(path, {"a": 1})
    assert file._state[0] == changes + 1
    file.remove("a", row_of(1).digest)
    assert_holds(path, {"b": 4, "c": 3})
