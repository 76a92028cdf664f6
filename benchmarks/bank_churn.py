"""10,000 adapters that come and go while requests run: every answer compared with that of its adapter alone.

    python benchmarks/bank_churn.py --minutes 3

A small encoder, so that there are many requests. Two threads send mixed batches, with uniformly chosen
customers and with a Zipf law, while a third one adds, replaces and removes. Every version of an adapter is known by a
seed, and a request notes which versions it was served by; afterwards every row of every request is computed again by a
model with nothing but that row's version on it, from vectors made anew of the seed: all rows of a version at once. A
wrong answer is one that differs by more than rounding, or is of a version that the row's name did not mean when the
request began; a lost one an error, or a refusal of names of which none was gone. Before all that, the same goes on for
half as long without anything being written down, and the process's memory is watched: what was written down and freed
again would hide its growth. All of it once in memory, and once with a file and room for a twentieth of the adapters, so
that others have to make room all the time; pages of the file, which the system may drop, are not counted.
"""

import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import veratune
from common import Benchmark, Case, Table, Target, new_case, progress
from veratune.bank import AdapterBank
from veratune.bank.layer_call import serving

CONFIG = veratune.VeraConfig(r=32, target_modules="all-linear")
ROWS, TOKENS = 8, 8
LAWS = ("uniform", "Zipf")


def private_bytes() -> int:
    """Return how much of this process's memory is resident and no file's."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def encoder() -> nn.Module:
    """Return a small BERT with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)


class Author:
    """Writes the vectors of a seed into an adapter."""

    def __init__(self) -> None:
        self.model = veratune.get_peft_model(encoder(), CONFIG).eval()
        self.vectors = list(self.model.adapter_state("default").parameters())

    def write(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        flat = 0.3 * torch.randn(sum(vector.numel() for vector in self.vectors), generator=generator)
        with torch.no_grad():
            for vector, values in zip(self.vectors, flat.split([v.numel() for v in self.vectors]), strict=True):
                vector.copy_(values)


class Churn:
    """The bank, its customers, and everything that was asked and answered."""

    def __init__(self, customers: int, file: Path | None, *, recording: bool) -> None:
        room = customers + 256 if file is None else max(4 * ROWS, customers // 20)
        self.bank = AdapterBank(encoder(), CONFIG, capacity=room, file=file)
        self.author = Author()
        self.seeds: dict[str, int] = {}  # digest to seed
        self.names = [f"customer {number}" for number in range(customers)]
        self.answers: list[tuple[list[str], Tensor, Tensor]] = []  # digests, inputs, outputs of a request
        # What each name has meant, None while it is gone; of each request, what was noted for its names by then, before
        # and after the bank was asked for them, and the digests that it was given, or None.
        self.meanings: dict[str, list[str | None]] = {name: [] for name in self.names}
        self.begun: list[tuple[list[str], list[int], list[int], list[str] | None]] = []
        self.errors: list[str] = []
        self.counts = dict.fromkeys(("requests", "added", "replaced", "removed", "unknown"), 0)
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.recording = recording
        self.next_seed = 0
        for name in self.names:
            self.put(name, replace=False)

    def put(self, name: str, *, replace: bool) -> None:
        """Add an adapter of a new seed, or replace one by it."""
        self.next_seed += 1
        self.author.write(self.next_seed)
        info = self.bank.add(name, self.author.model, replace=replace)
        if self.recording:
            with self.lock:
                self.seeds[info.digest] = self.next_seed
            self.meanings[name].append(info.digest)

    def change(self) -> None:
        """Replace, remove and add until told to stop."""
        choose = random.Random(1)
        while not self.stop.is_set():
            name = choose.choice(self.names)
            try:
                if name not in self.bank:
                    self.put(name, replace=False)
                    self.counts["added"] += 1
                elif choose.random() < 0.7:
                    self.put(name, replace=True)
                    self.counts["replaced"] += 1
                else:
                    self.bank.remove(name)
                    self.meanings[name].append(None)
                    self.counts["removed"] += 1
            except Exception as error:
                self.errors.append(repr(error))

    def ask(self, law: str, seed: int) -> None:
        """Send batches until told to stop, and keep the answers."""
        choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        weights = None if law == "uniform" else [1 / (rank + 1) for rank in range(len(self.names))]
        chosen = iter([])
        while not self.stop.is_set():
            names = list(_take(chosen, ROWS))
            if len(names) < ROWS:
                chosen = iter(choose.choices(self.names, weights, k=1000 * ROWS))
                continue
            ids = torch.randint(0, 99, (ROWS, TOKENS), generator=generator)
            before = self.noted(names)
            try:
                lease = self.bank.lease(names)
            except veratune.bank.BankError:
                with self.lock:
                    self.counts["unknown"] += 1  # one of them is removed at the moment
                    if self.recording:
                        self.begun.append((names, before, self.noted(names), None))
                continue
            after = self.noted(names)
            try:
                with lease, torch.no_grad(), serving(self.bank.call_of(lease)):
                    output = self.bank.model.base_model(input_ids=ids).last_hidden_state
            except Exception as error:
                self.errors.append(repr(error))
                continue
            with self.lock:
                self.counts["requests"] += 1
                if self.recording:
                    self.answers.append((lease.digests, ids, output))
                    self.begun.append((names, before, after, lease.digests))

    def leases(self) -> int:
        """Return how many requests hold adapters."""
        return sum(version.leases for version in self.bank._registry.versions.values())

    def noted(self, names: list[str]) -> list[int]:
        """Return how many meanings of each name are noted by now; one more may be on its way."""
        return [len(self.meanings[name]) for name in names]

    def misunderstood(self) -> tuple[int, int]:
        """Return how many rows were of a version that their name did not mean, and how many refusals were wrong."""
        rows = refusals = 0
        for names, before, after, digests in self.begun:
            meant = [
                self.meanings[name][start - 1 : end + 1] for name, start, end in zip(names, before, after, strict=True)
            ]
            if digests is None:
                refusals += not any(None in own for own in meant)
            else:
                rows += sum(digest not in own for digest, own in zip(digests, meant, strict=True))
        return rows, refusals

    def wrong(self) -> int:
        """Return how many answers differ from their adapter's alone."""
        found = 0
        by_version: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for digests, inputs, outputs in self.answers:
            for digest, ids, output in zip(digests, inputs, outputs, strict=True):
                by_version.setdefault(digest, []).append((ids, output))
        with torch.no_grad():
            for digest, rows in by_version.items():
                self.author.write(self.seeds[digest])
                alone = self.author.model(input_ids=torch.stack([ids for ids, _ in rows])).last_hidden_state
                same = torch.isclose(torch.stack([output for _, output in rows]), alone, rtol=1e-4, atol=1e-4)
                found += len(rows) - int(same.flatten(1).all(1).sum())
        return found


def _take(values: Any, count: int) -> list[Any]:
    return [value for value, _ in zip(values, range(count), strict=False)]


def run(churn: Churn, seconds: float) -> list[int]:
    """Run all threads, and return the resident memory at twenty points in time."""
    churn.stop.clear()
    asking = [threading.Thread(target=churn.ask, args=(law, number)) for number, law in enumerate(LAWS)]
    threads = [*asking, threading.Thread(target=churn.change)]
    for thread in threads:
        thread.start()
    memory = []
    for _ in range(20):
        time.sleep(seconds / 20)
        memory.append(private_bytes())
    churn.stop.set()
    for thread in threads:
        thread.join()
    return memory


def measure(customers: int, seconds: float, directory: Path | None) -> Case:
    """Run it all, with files in a directory or without."""
    key = f"{customers} adapters" + ("" if directory is None else ", with a file")
    case = new_case(key, customers=customers, seconds=seconds)
    progress(f"bank_churn: watching the memory of {key}")
    churn = Churn(customers, directory and directory / "watched.bank", recording=False)
    memory = run(churn, seconds / 2)
    errors, leases = churn.errors, churn.leases()
    churn = Churn(customers, directory and directory / "recorded.bank", recording=True)
    progress("bank_churn: running")
    run(churn, seconds)
    progress(f"bank_churn: comparing {len(churn.answers)} requests")
    rows, refusals = churn.misunderstood()
    errors = errors + churn.errors
    return case | {
        **churn.counts,
        "compared": len(churn.answers) * ROWS,
        "versions": churn.next_seed,
        "wrong": churn.wrong() + rows,
        "lost": len(errors) + refusals,
        "errors": errors[:5],
        "leases_left": leases + churn.leases(),
        "resident": memory,
    }


def growth(case: Case) -> float:
    """Return how much the resident memory grew from the second tenth of the time to the last, in MB."""
    memory = case["resident"]
    return (sum(memory[-4:]) / 4 - sum(memory[2:6]) / 4) / 1e6


def tables(cases: list[Case]) -> list[Table]:
    """Return one table."""
    names = ("requests", "unknown", "compared", "versions", "added", "replaced", "removed")
    names += ("wrong", "lost", "leases_left")
    rows = [
        (case["key"], f"{case['seconds']:.0f}", *(str(case[name]) for name in names), f"{growth(case):.1f}")
        for case in cases
    ]
    header = (
        "",
        "s",
        "requests of 8 rows",
        "refused: a name is gone",
        "rows compared",
        "versions",
        "added",
        "replaced",
        "removed",
        "wrong",
        "lost",
        "leases left",
        "memory grown, MB",
    )
    return [Table("Adapters that come and go", header, rows)]


def targets(cases: list[Case]) -> list[Target]:
    """Return the targets: nothing wrong, nothing lost, no growth."""
    found = []
    for case in cases:
        found += [Target(f"{case['key']}: {name}", case[name], 0) for name in ("wrong", "lost", "leases_left")]
        found.append(Target(f"{case['key']}: memory grown", growth(case), 10, unit=" MB"))
    return found


def plot(cases: list[Case], path: Path) -> None:
    """Draw the resident memory while adapters come and go."""
    import plots

    figure, (panel,) = plots.panels(1, width=6)
    for index, case in enumerate(cases):
        moments = range(1, len(case["resident"]) + 1)
        seconds = [case["seconds"] / 2 * moment / len(case["resident"]) for moment in moments]
        plots.line(panel, index, seconds, [resident / 1e6 for resident in case["resident"]], case["key"])
    panel.set(xlabel="seconds of adapters coming and going", ylabel="resident memory, MB")
    plots.from_zero(panel)
    panel.legend()
    plots.save(figure, path)


BENCHMARK = Benchmark("bank_churn", tables, targets, plot)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--customers", type=int, help="default: 10000; quick: 500")
    parser.add_argument("--minutes", type=float, help="default: 3; quick: 0.25")
    options = BENCHMARK.parse(parser)
    torch.set_num_threads(1)
    customers = options.customers or (500 if options.quick else 10_000)
    seconds = 60 * (options.minutes or (0.25 if options.quick else 3))
    with tempfile.TemporaryDirectory() as directory:
        for place in (None, Path(directory)):
            BENCHMARK.finish([measure(customers, seconds, place)], options.output)


if __name__ == "__main__":
    main()
