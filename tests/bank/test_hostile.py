"""A bank's file that is damaged or made to do harm: what it says is right, or it is refused before anything is done."""

import json
import os
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bank_files import assert_holds, layout_of, make, row_of
from veratune.bank import AdapterBank, BankError
from veratune.bank.connection import connect
from veratune.bank.schema import DamagedError, checksum_bytes, mark_of_all
from veratune.bank.store import BankStore
from veratune.bank.tables import header_row
from veratune.projections.schemes import PeftShared, PerDimension

EXPECTED = {"a": 3, "b": 2, "c": 2}


def tamper(path: Path, *statements: str | tuple[str, tuple[Any, ...]]) -> None:
    """Change a file as another program could, with a checksum that fits, so that nothing else is found."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(*((statement,) if isinstance(statement, str) else statement))

    try:
        adapters = dict(connection.execute("SELECT digest, metadata FROM adapters"))
        names = dict(connection.execute("SELECT name, digest FROM names"))
        checksum = checksum_bytes(mark_of_all(header_row(connection), adapters, names))
        connection.execute("UPDATE bank SET checksum = ?, changes = changes + 1", (checksum,))
    except (sqlite3.Error, DamagedError, TypeError, AttributeError):
        pass  # it is refused before the checksum matters
    connection.close()


def outcome(path: Path, expected: dict[str, int]) -> str:
    """Open and read all of a file that was tampered with: "refused", or "right"; anything else fails."""
    try:
        file = BankStore(path)
    except BankError as error:
        return "refused" if str(error).isprintable() else str(error)
    try:
        assert file.names == {name: row_of(seed).digest for name, seed in expected.items()}
        for name, seed in expected.items():
            row = file.row(file.names[name])
            assert row.scheme == row_of(seed).scheme and row.rank == row_of(seed).rank
            assert torch.equal(row.vectors, row_of(seed).vectors)
    except BankError:
        return "refused"
    finally:
        file.close()
    return "right"


@pytest.fixture
def whole(path: Path) -> bytes:
    file = make(path, {"a": 1, "b": 2, "c": 2})
    file.add("a", row_of(3), replacing=row_of(1).digest)
    file.close()
    return path.read_bytes()


# Damage


def test_a_flipped_bit_anywhere(path: Path, whole: bytes) -> None:
    chance = random.Random(0)
    texts = [row_of(2).vectors.numpy().tobytes(), row_of(3).digest.encode(), b'"rank": 3', b'{"layers"', b"float32"]
    matter = [whole.index(text) + place for text in texts for place in range(len(text))]
    for place in [*matter, *range(100), *chance.sample(range(len(whole)), 300)]:
        data = bytearray(whole)
        data[place] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        found = outcome(path, EXPECTED)
        assert found == "refused" or place not in matter


def test_a_file_cut_anywhere(path: Path, whole: bytes) -> None:
    for length in range(0, len(whole), 251):
        path.write_bytes(whole[:length])
        # What is missing of the last page SQLite takes for zeros, and they may have been.
        assert outcome(path, EXPECTED) == "refused" or length > len(whole) - 4096


def test_garbage_anywhere(path: Path, whole: bytes) -> None:
    """Pieces overwritten, inserted, taken out, and put elsewhere, by chance."""
    chance = random.Random(1)
    found = []
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            start, length = chance.randrange(len(data)), chance.randrange(1, 2000)
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
                other = chance.randrange(0, len(whole), 4096)
                start -= start % 4096
                data[start : start + 4096] = whole[other : other + 4096]
            data = data or bytearray(b"x")
        path.write_bytes(data)
        found.append(outcome(path, EXPECTED))
    assert found.count("refused") > 200


def test_pages_of_an_earlier_state(path: Path) -> None:
    """As a copy has them that was made while somebody wrote: each page is whole, and together they are no state."""
    file = make(path, {f"n{seed}": seed for seed in range(60)})
    before = path.read_bytes()
    for seed in range(0, 60, 2):
        file.add(f"n{seed}", row_of(seed + 100), replacing=row_of(seed).digest)
    file.close()
    after = path.read_bytes()
    names = {f"n{seed}": seed if seed % 2 else seed + 100 for seed in range(60)}
    differing = [at for at in range(0, len(after), 4096) if before[at : at + 4096] != after[at : at + 4096]]
    assert len(differing) > 4
    for at in differing:
        path.write_bytes(after[:at] + before[at : at + 4096].ljust(4096, b"\0") + after[at + 4096 :])
        assert outcome(path, names) == "refused"


def test_a_damaged_adapter_is_named_and_mended_by_adding_it_again(path: Path) -> None:
    file = make(path, {"a": 1, "b": 2})
    file.close()
    data = bytearray(path.read_bytes())
    data[data.index(row_of(1).vectors.numpy().tobytes())] ^= 1
    path.write_bytes(data)
    file = BankStore(path)
    with pytest.raises(BankError, match=f"{row_of(1).digest} do not match its digest. Restore a copy"):
        file.row(row_of(1).digest)
    assert torch.equal(file.row(row_of(2).digest).vectors, row_of(2).vectors)
    file.add("again", row_of(1), replacing=None)
    assert_holds(path, {"a": 1, "b": 2, "again": 1})


# Files that are no bank's


@pytest.mark.parametrize(
    "content", [b"", b"VERA", b"x" * 63, b"x" * 5000, b"\0" * 4096, b"SQLite format 3\0" + b"x" * 500]
)
def test_what_is_no_bank(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(BankError, match=r"not a bank file|is damaged"):
        BankStore(path)
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_files_of_other_formats(path: Path) -> None:
    path.write_bytes(b"VERABANK\1".ljust(4096, b"\0"))
    with pytest.raises(BankError, match="in the first format, which is no longer supported: rebuild it"):
        BankStore(path)
    path.unlink()
    sqlite3.connect(path).execute("CREATE TABLE bank (layout)").connection.close()
    with pytest.raises(BankError, match="not a bank file"):
        BankStore(path)
    path.unlink()
    make(path).close()
    tamper(path, "PRAGMA user_version=2")
    with pytest.raises(BankError, match="format version 2; this version of veratune reads 3"):
        BankStore(path)


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX's")
def test_special_files(path: Path) -> None:
    os.mkfifo(path)
    for special in (path, Path("/dev/zero")):
        with pytest.raises(BankError, match="is not a regular file: pass a bank file"):
            BankStore(special)
    with pytest.raises(BankError, match="is a directory"):
        BankStore(path.parent)


def test_files_beside_it(path: Path, whole: bytes) -> None:
    other = make(path.with_name("other"), {f"n{seed}": seed for seed in range(20)})
    with other._connections.writer() as connection:  # a journal that SQLite would play back
        connection.execute("PRAGMA cache_size=1")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE adapters SET vectors = zeroblob(100000)")
        shutil.copyfile(f"{other.path}-journal", f"{path}-journal")
        connection.execute("ROLLBACK")
    assert outcome(path, EXPECTED) == "refused"
    Path(f"{path}-journal").unlink(missing_ok=True)
    path.write_bytes(whole)
    log = Path(f"{path}-wal")
    log.touch()
    with pytest.raises(BankError, match="bank-wal exists, but a bank has no write-ahead log"):
        BankStore(path)
    log.unlink()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.close()
    with pytest.raises(BankError, match="write-ahead log by another program"):
        BankStore(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    assert_holds(path, EXPECTED)


# Files that only look right


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON names BEGIN DELETE FROM adapters; END",
        "CREATE VIEW v AS SELECT * FROM names",
        "CREATE INDEX i ON names (digest)",
        "CREATE TABLE more (x)",
        "CREATE VIRTUAL TABLE f USING fts5(x)",
        "ALTER TABLE names ADD COLUMN x DEFAULT 5",
        "ALTER TABLE names RENAME TO old",
        "DROP TABLE adapters",
        "PRAGMA writable_schema=ON;UPDATE sqlite_master SET sql = 'CREATE TABLE \x1b[31m' WHERE name = 'names'",
    ],
)
def test_another_schema(statement: str, path: Path, whole: bytes) -> None:
    tamper(path, *statement.split(";", 1 if statement.startswith("PRAGMA") else 0))
    before = path.read_bytes()
    with pytest.raises(BankError, match=r"damaged: (it does not have the tables|malformed)") as raised:
        BankStore(path)
    assert str(raised.value).isprintable() and path.read_bytes() == before


def test_a_view_in_the_place_of_a_table(path: Path, whole: bytes) -> None:
    tamper(path, "ALTER TABLE names RENAME TO real", "CREATE VIEW names AS SELECT * FROM real")
    with pytest.raises(BankError, match="it does not have the tables of a bank"):
        BankStore(path)


ROW = json.loads(json.dumps({"rank": 1, "scheme": {"scheme": "per_dimension", "key": 2}}))
ROW["scheme"]["fingerprint"] = PerDimension(2).fingerprint()
PEFT = {
    "scheme": "peft",
    "key": 1,
    "r": 4,
    "max_in": 3,
    "max_out": 5,
    "fingerprint": PeftShared(1, 4, 3, 5).fingerprint(),
}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (ROW | {"rank": 5}, "adapter .* has rank 5 in a bank of rank 4"),
        (ROW | {"rank": True}, "adapter .* has rank True"),
        (ROW | {"rank": 1.0}, r"adapter .* has rank 1\.0"),
        (ROW | {"scheme": None}, "adapter .* has invalid projections: None"),
        (ROW | {"scheme": []}, "adapter .* has invalid projections"),
        (ROW | {"scheme": ROW["scheme"] | {"key": "0"}}, "adapter .* has invalid projections"),
        (ROW | {"scheme": ROW["scheme"] | {"key": 1 << 64}}, "adapter .* has invalid projections"),
        (ROW | {"scheme": ROW["scheme"] | {"scheme": "stored"}}, "adapter .* has invalid projections"),
        (ROW | {"scheme": ROW["scheme"] | {"scheme": []}}, "adapter .* has invalid projections"),
        (ROW | {"scheme": ROW["scheme"] | {"fingerprint": "\x1b" * 16}}, "adapter .* has invalid projections"),
        (ROW | {"scheme": PEFT | {"r": 5}}, "adapter .* has invalid projections"),
        (ROW | {"scheme": PEFT | {"max_in": 1 << 40}}, "adapter .* has invalid projections"),
        (ROW | {"scheme": PEFT | {"max_out": 6}}, "adapter .* has invalid projections"),
        (ROW | {"scheme": PEFT | {"r": 10**39}}, "adapter .* has invalid projections"),
        (ROW | {"scheme": PEFT | {"r": 10**400}}, "the metadata of adapter .* cannot be read"),
        ("", "the metadata of adapter .* cannot be read"),
        ("[" * 100_000, "the metadata of adapter .* cannot be read"),
        (b"{}", "its rows are out of order or not text"),
    ],
)
def test_metadata_that_is_refused(metadata: Any, message: str, path: Path, whole: bytes) -> None:
    value = json.dumps(metadata) if isinstance(metadata, dict) else metadata
    tamper(path, ("UPDATE adapters SET metadata = ? WHERE digest = ?", (value, row_of(2).digest)))
    with pytest.raises(BankError, match="is damaged: .*" + message) as raised:
        BankStore(path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", ["", "\x1b[31mred", "a\nb", "n" * 257, "客" * 86, "a\u202eb", 3, None, b"x", "a\0b"])
def test_names_that_are_refused(name: Any, path: Path, whole: bytes) -> None:
    if name is None:
        tamper(path, "UPDATE names SET name = CAST(x'ff' AS TEXT) WHERE name = 'b'")
    elif name == 3:  # the column makes a text of it
        tamper(path, "PRAGMA writable_schema=ON", "UPDATE names SET digest = x'00' WHERE name = 'b'")
    else:
        tamper(path, ("UPDATE names SET name = ? WHERE name = 'b'", (name,)))
    with pytest.raises(
        BankError, match=r"is damaged: (it has an invalid name|its rows are|Could not decode)"
    ) as raised:
        BankStore(path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dtype = 'int8'", "dtype is invalid: 'int8'"),
        ("dtype = x'00'", "dtype is invalid: b"),
        ("saved_dtype = 'float32'", "modules_to_save has a dtype but no values"),
        ("layout = '{}'", "layout cannot be read"),
        ("layout = '['", "layout cannot be read"),
        ("layout = x'7b7d'", "layout cannot be read"),
        ("changes = 'x'", "checksum cannot be read"),
        ("checksum = 'x'", "checksum cannot be read"),
        ("checksum = zeroblob(16)", "do not match its checksum"),
    ],
)
def test_headers_that_are_refused(change: str, message: str, path: Path, whole: bytes) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"UPDATE bank SET {change}")
    connection.close()
    with pytest.raises(BankError, match=f"is damaged: .*{message}"):
        BankStore(path)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": -1},
        {"rank": 0},
        {"rank": True},
        {"rank": 1 << 22},
        {"rank": 1 << 31},
        {"rank": 10**400},
        {"layers": []},
        {"layers": [["first", 3, 5, [2, 2]]]},
        {"layers": [["first", 3, 5]]},
        {"layers": [["\x1b[31m", 3, 5, []]]},
        {"layers": [["first", 3, 1 << 60, []]]},
        {"modules_to_save": [["classifier", [["weight", [1 << 30, 1 << 30]]]]]},
        {"modules_to_save": [["classifier", [["weight", [1 << 40] * 100_000]]]]},
        {"modules_to_save": [["classifier", [["weight", [2]]]]]},
    ],
)
def test_layouts_that_are_refused(change: dict[str, Any], path: Path) -> None:
    """However large what they claim is, before anything of that size is asked for."""
    make(path).close()
    layout = json.dumps(layout_of().describe() | change)
    tamper(path, ("UPDATE bank SET layout = ?", (layout,)))
    model = nn.ModuleDict({name: nn.Linear(3, 5) for name in ("first", "second")})
    with pytest.raises(BankError, match=r"is damaged: (the bank|it claims rank|modules_to_save)") as raised:
        AdapterBank.open(model, path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000
    assert type(model["first"]) is nn.Linear


def test_a_file_for_another_model_is_refused_before_its_names_are_used(path: Path) -> None:
    make(path).close()
    with pytest.raises(BankError, match="is for another model: this model has no 'second'"):
        AdapterBank.open(nn.ModuleDict({"first": nn.Linear(3, 5)}), path)


def test_tensors_of_other_lengths_and_types(path: Path, whole: bytes) -> None:
    for vectors, saved in (
        (b"", None),
        (bytes(1 << 20), None),
        ("x" * row_of(2).vectors.nbytes, None),
        (5, None),
        (row_of(2).vectors.numpy().tobytes(), b"saved"),
    ):
        tamper(path, ("UPDATE adapters SET vectors = ?, saved = ?", (vectors, saved)))
        with pytest.raises(BankError, match=r"tensors of adapter .* do not have the size"):
            BankStore(path).row(row_of(2).digest)
    tamper(path, "UPDATE adapters SET vectors = zeroblob(100000000)")
    with pytest.raises(BankError, match="too big"):
        BankStore(path).row(row_of(2).digest)


def test_adapters_under_other_digests(path: Path, whole: bytes) -> None:
    """Each row is whole, and under the name of another."""
    a, b = row_of(3).digest, row_of(2).digest
    tamper(
        path,
        f"UPDATE adapters SET digest = 'x' WHERE digest = '{a}'",
        f"UPDATE adapters SET digest = '{a}' WHERE digest = '{b}'",
        f"UPDATE adapters SET digest = '{b}' WHERE digest = 'x'",
    )
    file = BankStore(path)
    for digest in (a, b):
        with pytest.raises(BankError, match="do not match its digest"):
            file.row(digest)
    tamper(path, "DELETE FROM adapters")
    with pytest.raises(BankError, match="'a' refers to an adapter that is not in the file"):
        file.refresh()
    assert file.names.keys() == EXPECTED.keys()  # what was read before stays


def test_projections_that_are_drawn_otherwise(path: Path, whole: bytes) -> None:
    other = ROW["scheme"] | {"fingerprint": PerDimension(4).fingerprint()}
    tamper(
        path,
        ("UPDATE adapters SET metadata = ? WHERE digest = ?", (json.dumps(ROW | {"scheme": other}), row_of(2).digest)),
    )
    with pytest.raises(BankError, match="do not match their fingerprint"):
        BankStore(path).row(row_of(2).digest)


def test_adapters_too_large_for_a_file(path: Path) -> None:
    with pytest.raises(BankError, match="a bank file cannot hold adapters of"):
        BankStore.create(path, layout_of(saved=1 << 28), torch.float32, torch.float32)
    with pytest.raises(BankError, match="it claims rank 70000"):
        BankStore.create(path, layout_of(rank=70_000), torch.float32, None)
    assert list(path.parent.iterdir()) == []


def test_extensions_and_other_files_cannot_be_reached(path: Path, whole: bytes) -> None:
    connection = connect(path, path, write=False)
    for statement in ("SELECT load_extension('x')", f"ATTACH '{path}' AS other", "DELETE FROM names"):
        with pytest.raises(sqlite3.OperationalError):
            connection.execute(statement)
    connection.close()
