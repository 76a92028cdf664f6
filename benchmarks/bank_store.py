"""A bank's file with 10,000 adapters: opening, reading, registering, against the store before SQLite.

    python benchmarks/bank_store.py

The former store is a hand-written file that was appended to and mapped into memory; its version of veratune is taken
out of the git history (`--before`), so this needs a clone with its history. Each version runs in its own process; they
take turns, so that the machine's other load affects both. MiniLM's shape with a classifier, r = 256, bfloat16: 63 KB an
adapter. The last table, measured in turn with "write an adapter", has floors: an `fsync` of an appended adapter, and a
transaction of plain `sqlite3` that writes the same bytes with the same `synchronous` setting.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from common import ROOT, Benchmark, Case, Table, Target, new_case, progress

BEFORE = "e293913"  # the last commit whose banks have a hand-written file
NOW, FORMER = "sqlite3", "hand-written"
OPERATIONS = {
    "open": "open the file",
    "open_bank": "AdapterBank.open",
    "read": "read an adapter",
    "add": "write an adapter",
    "register": "bank.load, a new name",
    "replace": "bank.load, replace=True",
    "remove": "bank.remove",
    "refresh": "refresh after another process's change",
}
MANY = ("read",)  # too short to be timed one by one


# In the process of one version


def child(path: Path, adapters: int) -> None:
    """Fill a file, then run and time what standard input asks for."""
    import torch

    import veratune
    from bank_models import classifier, randomise
    from veratune.bank import AdapterBank
    from veratune.bank.layout import digest_of

    torch.set_num_threads(1)
    config = veratune.VeraConfig(r=256, target_modules="all-linear", task_type="SEQ_CLS")
    bank = AdapterBank(classifier(), config, capacity=64, dtype=torch.bfloat16, file=path)
    store: Any = bank._store if hasattr(bank, "_store") else bank._file
    author = veratune.get_peft_model(classifier(), config)
    randomise(author, "default", 0)
    first = store.row(bank.add("first", author).digest)
    scheme = first.scheme if hasattr(first, "scheme") else first.source
    saved = first.saved if hasattr(first, "saved") else first.heads
    generator = torch.Generator().manual_seed(1)
    numbers = iter(range(10**9))

    def new_row() -> Any:
        vectors = torch.randn(len(first.vectors), generator=generator).to(torch.bfloat16)
        return dataclasses.replace(first, vectors=vectors, digest=digest_of(scheme, vectors, saved))

    with store.batch() if hasattr(store, "batch") else contextlib.nullcontext():
        for _ in range(adapters):
            store.add(f"customer {next(numbers)}", new_row(), replacing=None)
    bank.refresh()
    digests = list(store.adapters)
    chosen = random.Random(0)
    other = type(store)(path)
    directory = path.parent / f"{path.stem} adapter"

    def saved_anew() -> None:
        randomise(author, "default", next(numbers))
        author.save_pretrained(directory)

    def prepare(operation: str) -> Callable[[], object]:
        """Do what is not timed, and return what is."""
        name = f"customer {next(numbers)}"
        if operation == "open":
            return lambda: type(store)(path)
        if operation == "open_bank":
            model = classifier()
            return lambda: AdapterBank.open(model, path)
        if operation == "read":
            some = chosen.sample(digests, min(100, len(digests)))
            return lambda: [store.row(digest) for digest in some]
        if operation == "add":
            row = new_row()
            return lambda: store.add(name, row, replacing=None)
        if operation == "refresh":
            other.refresh()
            other.add(name, new_row(), replacing=None)
            return bank.refresh
        saved_anew()
        if operation == "register":
            return lambda: bank.load(name, directory)
        bank.load(name, directory)
        if operation == "remove":
            return lambda: bank.remove(name)
        saved_anew()
        return lambda: bank.load(name, directory, replace=True)

    print(json.dumps({"bytes_per_adapter": path.stat().st_size // (adapters + 1)}), flush=True)
    for line in sys.stdin:
        work = prepare(line.strip())
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        if line.strip().startswith("open"):
            close = getattr(result, "close", None) or result.unload  # type: ignore[attr-defined]
            close()
        del work, result
        print(json.dumps(seconds / (100 if line.strip() in MANY else 1)), flush=True)


# In the process that compares


@contextlib.contextmanager
def version(name: str, source: Path, directory: Path, adapters: int) -> Iterator[Callable[[str], Any]]:
    """Start a process of one version; yield a function that returns the seconds of an operation there."""
    command = [sys.executable, __file__, "--child", str(directory / f"{name}.bank"), "--adapters", str(adapters)]
    environment = os.environ | {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(operation: str) -> Any:
            assert process.stdin is not None and process.stdout is not None
            if operation:
                process.stdin.write(operation + "\n")
                process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def floors(directory: Path, size: int) -> dict[str, Callable[[], float]]:
    """Return functions that return the seconds of the least that a store of these bytes does."""
    raw = os.open(directory / "raw", os.O_RDWR | os.O_CREAT)
    position = iter(range(0, 1 << 50, size))

    def append(data: bytes) -> None:
        os.pwrite(raw, data, next(position))
        os.fsync(raw)

    def append_and_commit(data: bytes) -> None:
        append(data)
        os.pwrite(raw, data[:16], 0)
        os.fsync(raw)

    def timed(work: Callable[[bytes], object]) -> Callable[[], float]:
        def run() -> float:
            data = os.urandom(size)
            start = time.perf_counter()
            work(data)
            return time.perf_counter() - start

        return run

    work = {"fsync of an appended adapter": append, "two fsyncs, as the hand-written file": append_and_commit}
    for journal in ("DELETE", "PERSIST", "WAL"):
        work[f"sqlite3, journal_mode={journal}"] = transaction_of(directory / f"{journal}.sqlite", journal)
    return {what: timed(each) for what, each in work.items()}


def transaction_of(path: Path, journal: str) -> Callable[[bytes], object]:
    """Return a function that writes bytes, a name and a counter to plain sqlite3 in one transaction."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in (
        "CREATE TABLE adapters (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, vectors BLOB NOT NULL)",
        "CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, digest TEXT NOT NULL)",
        "CREATE TABLE bank (changes INTEGER NOT NULL)",
        "INSERT INTO bank VALUES (0)",
        f"PRAGMA journal_mode={journal}",
        "PRAGMA synchronous=EXTRA",
    ):
        connection.execute(statement).fetchall()

    def write(data: bytes) -> None:
        digest = data[:16].hex()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO names (name, digest) VALUES (?, ?)", (f"customer {digest}", digest))
        connection.execute("INSERT INTO adapters (digest, vectors) VALUES (?, ?)", (digest, data))
        connection.execute("UPDATE bank SET changes = changes + 1")
        connection.execute("COMMIT")

    return write


def measure(revision: str, adapters: int, rounds: int, disk: Path) -> list[Case]:
    """Time all operations of both versions in turn, and the floors together with writing."""
    archive = subprocess.run(
        ["git", "archive", revision, "src"], cwd=ROOT.parent, check=True, stdout=subprocess.PIPE
    ).stdout
    cases = []
    with tempfile.TemporaryDirectory(dir=disk) as name:
        directory = Path(name)
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(directory, filter="data")
        progress(f"bank_store: writing {adapters} adapters into two files")
        with (
            version(NOW, ROOT.parent / "src", directory, adapters) as now,
            version(FORMER, directory / "src", directory, adapters) as former,
        ):
            size = {NOW: now("")["bytes_per_adapter"], FORMER: former("")["bytes_per_adapter"]}
            least = floors(directory, size[FORMER])
            for operation, description in OPERATIONS.items():
                progress(f"bank_store: {description}")
                seconds: dict[str, list[float]] = {NOW: [], FORMER: []}
                taken: dict[str, list[float]] = {what: [] for what in least} if operation == "add" else {}
                for turn in range(rounds + 2):
                    for key, ask in ((NOW, now), (FORMER, former)) if turn % 2 else ((FORMER, former), (NOW, now)):
                        seconds[key].append(ask(operation))
                    for what, values in taken.items():
                        values.append(least[what]())
                # The first two rounds warm up.
                every = {key: values[2:] for key, values in (seconds | taken).items()}
                cases.append(
                    new_case(
                        f"{adapters}: {operation}", operation=operation, adapters=adapters, bytes=size, seconds=every
                    )
                )
    return cases


def ratio(case: Case) -> float:
    """Return the median over the rounds of the time now, relative to the former."""
    pairs = zip(case["seconds"][NOW], case["seconds"][FORMER], strict=True)
    return statistics.median(now / former for now, former in pairs)


def tables(cases: list[Case]) -> list[Table]:
    """Return a table of both versions, and one of the floors."""
    rows, floor_rows = [], []
    for case in cases:
        medians = {key: f"{1e3 * statistics.median(values):.3f}" for key, values in case["seconds"].items()}
        cells = medians.pop(FORMER), medians.pop(NOW), f"{ratio(case):.2f}"
        rows.append((OPERATIONS[case["operation"]], *cells))
        floor_rows += medians.items()
    return [
        Table(f"A file with {cases[0]['adapters']} adapters", ("ms, median", FORMER, NOW, "ratio"), rows),
        Table("The least that writing an adapter takes", ("", "ms, median"), floor_rows),
    ]


def targets(cases: list[Case]) -> list[Target]:
    """Return the target: at most 10 % slower than the former store."""
    return [
        Target(f"{OPERATIONS[case['operation']]}: time relative to the hand-written file", ratio(case), 1.1)
        for case in cases
        if case["operation"] in ("open", "open_bank", "read", "register")
    ]


BENCHMARK = Benchmark("bank_store", tables, targets)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--adapters", type=int, help="default: 10000; quick: 500")
    parser.add_argument("--rounds", type=int, help="default: 60; quick: 10")
    parser.add_argument("--before", default=BEFORE, help=f"the revision to compare with (default: {BEFORE})")
    parser.add_argument("--disk", type=Path, default=ROOT.parent, help="where to write the files (default: the clone)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = BENCHMARK.parse(parser)
    adapters = options.adapters or (500 if options.quick else 10_000)
    if options.child:
        child(options.child, adapters)
        return
    rounds = options.rounds or (10 if options.quick else 60)
    cases = measure(options.before, adapters, rounds, options.disk)
    BENCHMARK.finish(cases, options.output)


if __name__ == "__main__":
    main()
