"""Files that claim or hide sizes without end, in every format that is read."""

import json
import shutil
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from mutations import CONFIG, SETTINGS, WEIGHTS, join_file, make_files, net, originals, resigned, split_file
from veratune import AdapterBank, VeraConfig

MB = 1 << 20
TERABYTE = 1 << 40
FORMATS = {"native": "native", "peft": "peft", "plug-in": "plug-in", "drawn": "peft without projections"}


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    """Write a file of a size that takes no space after its beginning."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def nested(bytes_: int) -> bytes:
    return b"[" * bytes_


def many(bytes_: int) -> bytes:
    """JSON of so many bytes that takes twenty times as much memory in Python."""
    return b'{"r":[' + b"[]," * (bytes_ // 3) + b"[]]}"


def wide(bytes_: int) -> bytes:
    """Text that takes four bytes for each character in Python."""
    return b'["\xf0\x9f\x98\x80' + b"x" * bytes_ + b'"]'


def writing(data: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data()) and None


# Adapters: functions of a directory that holds a good one


def with_config(**values: Any) -> Callable[[Path], None]:
    """Claim this in the configuration, which is signed again."""

    def write(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_bytes())
        (directory / CONFIG).write_text(json.dumps({**config, **values}))
        header, data = split_file((directory / WEIGHTS).read_bytes())
        if "veratune" in header.get("__metadata__", {}):
            own = json.loads(header["__metadata__"]["veratune"])
            own["config"].update(values)
            header["__metadata__"]["veratune"] = json.dumps(own)
            (directory / WEIGHTS).write_bytes(resigned(header, data))

    return write


def with_tensor(name: str, shape: list[int]) -> Callable[[Path], None]:
    """Describe a tensor in place of the first whose name contains this, or one more; the file is sparse."""

    def write(directory: Path) -> None:
        header, data = split_file((directory / WEIGHTS).read_bytes())
        key = next((key for key in header if name in key), name)
        size = 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size]}
        whole = join_file(header, data)
        sparse(directory / WEIGHTS, len(whole) + size, whole)

    return write


CLAIMS: dict[str, Callable[[Path], None]] = {
    "rank 2**31": with_config(r=2**31),
    "rank 2**20": with_config(r=2**20),
    "rank 4096": with_config(r=4096),
    "rank pattern": with_config(rank_pattern={"up": 2**31, "down": 2**24}),
    "stored projections that are not there": with_config(save_projection=True, r=2**24),
    "blocks": with_config(projection="blocks", projection_blocks=2**30),
    "layers": with_config(layers_to_transform=list(range(20_000)), layers_pattern="layers"),
    "targets": with_config(target_modules=[f"m{number}" for number in range(20_000)]),
    "saved modules": with_config(modules_to_save=[f"m{number}" for number in range(20_000)]),
    "classes": with_config(id2label={str(number): "x" for number in range(20_000)}),
}

TENSORS: dict[str, Callable[[Path], None]] = {
    "d of 4 GB": with_tensor("vera_lambda_d", [1 << 30]),
    "d of a terabyte": with_tensor("vera_lambda_d", [1 << 38]),
    "b of 4 GB": with_tensor("vera_lambda_b", [1 << 15, 1 << 15]),
    "a tensor of 4 GB besides": with_tensor("x", [1 << 30]),
    "A of 4 GB": with_tensor("base_model.vera_A", [4, 1 << 28]),
    "a head of 4 GB": with_tensor("head.weight", [3, 1 << 29]),
}


def tensors(count: int) -> bytes:
    """Return the header of so many tensors without elements."""
    return b"{%s}" % b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(count))


# Files that are the same in every format; each is written once.
WHOLE_FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "configuration: sparse": (CONFIG, lambda path: sparse(path, TERABYTE)),
    "configuration: nested": (CONFIG, writing(lambda: nested(12 * MB))),
    "configuration: many values": (CONFIG, writing(lambda: many(15 * MB))),
    "configuration: wide text": (CONFIG, writing(lambda: wide(15 * MB))),
    "configuration: a long number": (CONFIG, writing(lambda: b'{"r":' + b"9" * (8 * MB) + b"}")),
    "weights: sparse": (WEIGHTS, lambda path: sparse(path, TERABYTE)),
    "header of a terabyte": (WEIGHTS, lambda path: sparse(path, 2 * TERABYTE, struct.pack("<Q", TERABYTE))),
    "header of zeros": (WEIGHTS, lambda path: sparse(path, 64 * MB, struct.pack("<Q", 60 * MB))),
    "header nested": (WEIGHTS, writing(lambda: join_file(nested(20 * MB), b""))),
    "header of many values": (WEIGHTS, writing(lambda: join_file(many(20 * MB), b""))),
    "header of wide text": (WEIGHTS, writing(lambda: join_file(wide(30 * MB), b""))),
    "header of many tensors": (WEIGHTS, writing(lambda: join_file(tensors(300_000), b""))),
    "metadata of many values": (
        WEIGHTS,
        writing(lambda: join_file({"__metadata__": {"veratune": "[" + "[]," * (10 * MB) + "0]"}}, b"")),
    ),
}


# Banks' files: statements that change a good one


def _layout(change: Callable[[dict[str, Any]], Any]) -> Callable[[sqlite3.Connection], None]:
    def write(connection: sqlite3.Connection) -> None:
        ((text,),) = connection.execute("SELECT layout FROM bank")
        layout = json.loads(text)
        change(layout)
        connection.execute("UPDATE bank SET layout = ?", (json.dumps(layout),))

    return write


def _set(statement: str, *values: Any) -> Callable[[sqlite3.Connection], None]:
    return lambda connection: connection.execute(statement, values) and None


def _schema(statement: str, *, of: str) -> Callable[[sqlite3.Connection], None]:
    """Replace a table's definition without a change of its rows, as no statement of SQLite's would."""

    def write(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (statement, of))

    return write


_ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT"


def _view(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE names RENAME TO others")
    connection.execute(f"CREATE VIEW names AS {_ENDLESS} i AS id, 'n' || i AS name, 'x' AS digest FROM n")


def _trigger(connection: sqlite3.Connection) -> None:
    connection.execute(
        f"CREATE TRIGGER t AFTER INSERT ON names BEGIN INSERT INTO names (name, digest) {_ENDLESS} i, i FROM n; END"
    )


def _generated(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE names RENAME TO others")
    connection.execute(
        "CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT AS (hex(zeroblob(400000000))) VIRTUAL,"
        " digest TEXT NOT NULL)"
    )
    connection.execute("INSERT INTO names (digest) SELECT digest FROM others")


def _many_tables(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN")
    for number in range(2000):
        connection.execute(f"CREATE TABLE t{number} (a)")
    connection.execute("COMMIT")


def _many_rows(connection: sqlite3.Connection) -> None:
    ((metadata,),) = connection.execute("SELECT metadata FROM adapters")
    rows = ((f"{number:032x}", metadata) for number in range(3_000))
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO adapters (digest, metadata, vectors) VALUES (?, ?, x'')", rows)
    connection.execute("COMMIT")


BANKS: dict[str, Callable[[sqlite3.Connection], None]] = {
    "rank 2**31": _layout(lambda layout: layout.update(rank=2**31)),
    "rank 2**16": _layout(lambda layout: layout.update(rank=2**16)),
    "wide layers": _layout(lambda layout: [layer.__setitem__(1, 2**39) for layer in layout["layers"]]),
    "layers without end": _layout(
        lambda layout: layout.update(layers=[[f"l{number}", 6, 9, []] for number in range(20_000)])
    ),
    "vectors of 100 MB": _set("UPDATE adapters SET vectors = zeroblob(?)", 100 * MB),
    "heads of 100 MB": _set("UPDATE adapters SET saved = zeroblob(?)", 100 * MB),
    "layout nested": _set("UPDATE bank SET layout = ?", nested(20 * MB).decode()),
    "layout of many values": _set("UPDATE bank SET layout = ?", many(10 * MB).decode()),
    "layout of wide text": _set("UPDATE bank SET layout = ?", wide(30 * MB).decode()),
    "layout of 100 MB": _set("UPDATE bank SET layout = hex(zeroblob(?))", 50 * MB),
    "metadata of many values": _set("UPDATE adapters SET metadata = ?", many(10 * MB).decode()),
    "metadata of 100 MB": _set("UPDATE adapters SET metadata = hex(zeroblob(?))", 50 * MB),
    "a name of 60 MB": _set("UPDATE names SET name = hex(zeroblob(?))", 30 * MB),
    "a digest of 60 MB": _set("UPDATE names SET digest = hex(zeroblob(?))", 30 * MB),
    "a checksum of 60 MB": _set("UPDATE bank SET checksum = zeroblob(?)", 60 * MB),
    "rows without end": _many_rows,
    "tables without end": _many_tables,
    "a view": _view,
    "a trigger": _trigger,
    "a generated column": _generated,
    "a schema of 20 MB": _schema("CREATE TABLE names (" + "a," * (10 * MB) + "b)", of="names"),
    "a schema that calls": _schema(
        "CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT DEFAULT (hex(zeroblob(900000000))), digest TEXT)",
        of="names",
    ),
}


# Data and settings of `veratune train`


def _parquet(rows: int, length: int) -> Callable[[Path], None]:
    """A text that a column repeats, which takes no space in the file."""

    def write(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            for start in range(0, rows, 1 << 16):
                some = min(rows - start, 1 << 16)
                indices = pa.array(torch.zeros(some, dtype=torch.int32).numpy())
                column = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * length]))
                writer.write_table(pa.table({"text": column.cast(pa.string())}))

    return write


DATA: dict[str, Callable[[Path], None]] = {
    "good.csv": writing(lambda: b"text,label\na,0\nb,1\n"),
    "good.jsonl": writing(lambda: b'{"text": "a", "label": 0}\n'),
    "good.parquet": _parquet(3, 4),
    "sparse.csv": lambda path: sparse(path, TERABYTE),
    "zeros.csv": lambda path: sparse(path, 3 << 30, b"text,label\n"),
    "zeros.tsv": lambda path: sparse(path, 3 << 30, b"text\tlabel\n"),
    "columns.csv": writing(lambda: b"a," * (2 * MB) + b"\n1\n"),
    "sparse.jsonl": lambda path: sparse(path, TERABYTE),
    "zeros.jsonl": lambda path: sparse(path, 3 << 30, b'{"text": "'),
    "nested.jsonl": writing(lambda: nested(30 * MB)),
    "values.jsonl": writing(lambda: many(20 * MB)),
    "number.jsonl": writing(lambda: b'{"text": ' + b"9" * MB + b"}"),
    "zeros.parquet": lambda path: sparse(path, 3 << 30, b"PAR1"),
    "repeated.parquet": _parquet(1 << 20, 2000),
}


def _aliases(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"task: *a{levels - 1}", f"target_modules: *a{levels - 1}"])


YAML: dict[str, Callable[[Path], None]] = {
    "good.yaml": writing(lambda: b"seed: 1\n"),
    "sparse.yaml": lambda path: sparse(path, TERABYTE),
    "nested.yaml": writing(lambda: b"task: " + nested(2_000)),
    "aliases.yaml": lambda path: path.write_text(_aliases(12)) and None,
    "known aliases.yaml": lambda path: path.write_text(_aliases(12).partition("\n")[2]) and None,
}


def write_corpus(place: Path) -> None:
    """Write all files into a directory. Those with "good" in their names are to be read, and no other."""
    for shown, kind in FORMATS.items():
        for name, change in {"good": lambda _: None, **CLAIMS, **TENSORS}.items():
            claim = "claim" if name in CLAIMS else "adapter"
            change(_copied(place / f"{claim} {shown}, {name}", kind))
    for number, (name, (file, write)) in enumerate(WHOLE_FILES.items()):
        write(place / str(number))
        for shown in ("native", "peft"):
            directory = _copied(place / f"file {shown}, {name}", FORMATS[shown])
            (directory / file).unlink()
            (directory / file).hardlink_to(place / str(number))
    make_files("native", place / "one")
    AdapterBank(net(), VeraConfig(**SETTINGS), capacity=1, file=place / "bank good").load("one", place / "one")
    for name, alter in BANKS.items():
        path = shutil.copy(place / "bank good", place / f"bank {name}")
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.executescript("PRAGMA synchronous=OFF; PRAGMA journal_mode=MEMORY")
            alter(connection)
    for kind, files in (("data", DATA), ("settings", YAML)):
        for name, write in files.items():
            write(place / f"{kind} {name}")


def _copied(directory: Path, kind: str) -> Path:
    directory.mkdir()
    for name, data in originals(kind).items():
        (directory / name).write_bytes(data)
    return directory
