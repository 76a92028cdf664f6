"""From a new adapter's files to its first output, while other requests run: the bank and PEFT's `load_adapter`.

    python benchmarks/bank_latency.py

MiniLM's shape with a head, all linear layers, r = 256; a request is one row of 32 tokens. Every registration is of a
new name; "cold" are the first ones of a model that was only just made, "warm" those after it has served. Another thread
sends requests of four rows all the time, one after the other, with a pause of as long as the request took: of the base
model, or with PEFT of the adapter that a `PeftModel` has to have, while a cold one is timed.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import peft
import torch

import veratune
from bank_models import classifier, randomise
from common import Benchmark, Case, Table, Target, new_case, progress
from veratune.bank import AdapterBank

OURS, OURS_FILE, PEFT_VERA, PEFT_LORA = "veratune", "veratune, with a file", "PEFT VeRA", "PEFT LoRA r=8"
WAYS = (OURS, OURS_FILE, PEFT_VERA, PEFT_LORA)
R, TOKENS = 256, 32

Register = Callable[[str], None]
Request = Callable[[Sequence[str | None]], object]


def saved_adapter(way: str, directory: Path) -> Path:
    """Write an adapter in the format of a way."""
    if way in (OURS, OURS_FILE):
        config = veratune.VeraConfig(r=R, target_modules="all-linear", task_type="SEQ_CLS")
        model = veratune.get_peft_model(classifier(), config)
    else:
        kind = peft.VeraConfig(r=R, target_modules="all-linear", task_type="SEQ_CLS")
        if way == PEFT_LORA:
            kind = peft.LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
        model = peft.get_peft_model(classifier(), kind)
    randomise(model, "default", 0)
    model.save_pretrained(directory)
    return directory


def prepare(way: str, directory: Path) -> tuple[Register, Request]:
    """Return two functions: one registers the adapter under a name, one sends a request."""
    adapter = saved_adapter(way, directory / "adapter")
    ids = torch.randint(5, 1000, (4, TOKENS), generator=torch.Generator().manual_seed(0))
    if way in (OURS, OURS_FILE):
        config = veratune.VeraConfig(r=R, target_modules="all-linear", task_type="SEQ_CLS")
        file = directory / "customers.bank" if way == OURS_FILE else None
        bank = AdapterBank(classifier(), config, capacity=1000, dtype=torch.bfloat16, file=file)

        def ask_bank(names: Sequence[str | None]) -> object:
            with torch.no_grad():
                return bank.model(input_ids=ids[: len(names)], adapters=names)

        return lambda name: bank.load(name, adapter), ask_bank
    model = peft.PeftModel.from_pretrained(classifier(), adapter, adapter_name="first").eval()
    lock = threading.Lock()  # PEFT chooses adapters on the model, for everybody

    def ask_peft(names: Sequence[str | None]) -> object:
        with lock, torch.no_grad():
            model.set_adapter(names[0] or "first")
            return model(input_ids=ids[: len(names)])

    def register(name: str) -> None:
        with lock:
            model.load_adapter(adapter, name)

    return register, ask_peft


@contextmanager
def requests_running(ask: Request, name: str | None) -> Iterator[None]:
    """Send requests from another thread, with a pause of as long as each took."""
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            stop.wait(_timed(lambda: ask([name] * 4)))

    other = threading.Thread(target=keep_asking)
    other.start()
    try:
        yield
    finally:
        stop.set()
        other.join()


def measure(way: str, times: int, fresh: int) -> Case:
    """Time registrations, and the first output after each: cold in so many models, and warm."""
    progress(f"bank_latency: {way}")
    case = new_case(way, way=way, tokens=TOKENS, r=R)
    figures: dict[str, list[float]] = {"cold_registered": [], "cold_answered": [], "registered": [], "answered": []}

    def time_one(name: str, kind: str) -> None:
        start = time.perf_counter()
        register(name)
        figures[f"{kind}registered"].append(time.perf_counter() - start)
        ask([name])
        figures[f"{kind}answered"].append(time.perf_counter() - start)

    for _ in range(fresh):
        with tempfile.TemporaryDirectory() as directory:
            register, ask = prepare(way, Path(directory))
            with requests_running(ask, None):
                time_one("cold", "cold_")
    with tempfile.TemporaryDirectory() as directory:
        register, ask = prepare(way, Path(directory))
        register("warm")
        ask(["warm"])
        alone = [_timed(lambda: ask(["warm"])) for _ in range(20)]
        with requests_running(ask, "warm"):
            for number in range(times):
                time_one(f"customer{number}", "")
    return case | figures | {"request_alone": alone}


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def percentile(values: list[float], percent: int) -> float:
    """Return a percentile in milliseconds."""
    return 1e3 * statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def tables(cases: list[Case]) -> list[Table]:
    """Return one table, in milliseconds."""
    header = (
        "ms",
        "cold: registered p50",
        "slowest",
        "first output p50",
        "warm: registered p50",
        "p99",
        "first output p50",
        "p99",
        "a request alone",
    )
    rows = []
    for case in cases:
        cold = case["cold_registered"]
        figures = [1e3 * seconds for seconds in (statistics.median(cold), max(cold))]
        figures.append(1e3 * statistics.median(case["cold_answered"]))
        figures += [percentile(case[what], percent) for what in ("registered", "answered") for percent in (50, 99)]
        figures.append(1e3 * statistics.median(case["request_alone"]))
        rows.append((case["way"], *(f"{figure:.1f}" for figure in figures)))
    return [Table("From files to the first output, while requests run", header, rows)]


def targets(cases: list[Case]) -> list[Target]:
    """Return the target: 5 ms, where PEFT takes about 100."""
    found = []
    for case in cases:
        if case["way"] in (OURS, OURS_FILE):
            found.append(Target(f"{case['way']}: registered, p99", percentile(case["registered"], 99), 5, unit=" ms"))
            found.append(Target(f"{case['way']}: first output, p99", percentile(case["answered"], 99), 5, unit=" ms"))
    return found


def plot(cases: list[Case], path: Path) -> None:
    """Draw the median and the 99th percentile, way by way."""
    import plots

    figure, axes = plots.panels(2, width=5)
    titles = {"registered": "until it is registered", "answered": "until its first output"}
    for panel, (what, title) in zip(axes, titles.items(), strict=True):
        names = [f"{case['way']}, p{percent}" for case in cases for percent in (50, 99)]
        values = [percentile(case[what], percent) for case in cases for percent in (50, 99)]
        plots.bars(panel, names, values, "{:.1f}")
        panel.set(title=title, xlabel="ms")
    plots.save(figure, path)


BENCHMARK = Benchmark("bank_latency", tables, targets, plot)


def main() -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--times", type=int, help="registrations; default: 200 of the bank's, 60 of PEFT's; quick: 20")
    options = BENCHMARK.parse(parser)
    cases = []
    for way in WAYS:
        usual = 200 if way in (OURS, OURS_FILE) else 60
        cases.append(measure(way, options.times or (20 if options.quick else usual), 2 if options.quick else 10))
    BENCHMARK.finish(cases, options.output)


if __name__ == "__main__":
    main()
