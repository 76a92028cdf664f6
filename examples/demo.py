"""Fine-tune MiniLM on sentences of movie reviews with VeRA, and compare it with other ways of fine-tuning.

    python examples/demo.py           VeRA and PEFT's LoRA, both on all linear layers; some minutes
    python examples/demo.py --full    six methods, more rows and three seeds

The results are printed as a table, and every number is written as JSON to runs/demo/, next to the adapter of VeRA and
labeled rows to try it on. --full also draws the curves.
"""

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
try:
    import torch
    from torch import Tensor, nn
    from tqdm import tqdm

    from _demo_adapter import AdapterReport, check_adapter, weights_size
    from _demo_data import (
        CLASSES,
        DemoError,
        Split,
        load_base_model,
        load_split,
        model_directory,
        quieten_transformers,
        write_rows,
    )
    from _demo_methods import FrozenEncoder, FullFineTuning, Lora, Method, Vera
    from _demo_report import Run, Style, adapter_text, commands_text, comparison, summarize, table, write_results
    from _demo_training import BATCH_SIZE, History, steps_per_epoch, train
except ModuleNotFoundError as missing:
    sys.exit(f"demo: the package {missing.name!r} is missing: pip install -e '.[demo]', or let `make demo` install all")

# All rates were chosen on 1,500 validation rows that are in neither train nor test, with one seed, from a small grid
# that was not the same for all methods (three to seven points); nothing else was tuned.
FROZEN = FrozenEncoder("frozen encoder + head", head_lr=1e-2)
VERA = Vera("VeRA, all linear layers", "all-linear", lr=2e-2, head_lr=4e-3)
VERA_QV = Vera("VeRA, query and value", ["query", "value"], lr=2e-2, head_lr=4e-3)
LORA = Lora("LoRA r=8, all linear layers", "all-linear", lr=1e-3, head_lr=4e-3)
LORA_QV = Lora("LoRA r=8, query and value", ["query", "value"], lr=2e-3, head_lr=1e-3)
FULL = FullFineTuning("full fine-tuning", lr=5e-5, head_lr=1e-3)


@dataclass(frozen=True)
class Comparison:
    """What is compared, and on how much data.

    Attributes:
        methods: the methods, in the order in which they are trained.
        rows: how many rows to train on.
        test_rows: how many rows to test on.
        seeds: how often each method is trained.
        evaluations: how often each run is evaluated in an epoch; 0: only after the last step.
    """

    methods: tuple[Method, ...]
    rows: int
    test_rows: int
    seeds: int
    evaluations: int


QUICK = Comparison((VERA, LORA), rows=1500, test_rows=1000, seeds=1, evaluations=0)
COMPLETE = Comparison((FROZEN, VERA, VERA_QV, LORA, LORA_QV, FULL), rows=2000, test_rows=1500, seeds=3, evaluations=2)

# Okabe and Ito's colours, which colour-blind readers can tell apart: VeRA is blue, LoRA orange, a part of it dashed.
STYLES = {
    FROZEN.name: Style("#777777"),
    VERA.name: Style("#0072B2"),
    VERA_QV.name: Style("#56B4E9", "--"),
    LORA.name: Style("#D55E00"),
    LORA_QV.name: Style("#E69F00", "--"),
    FULL.name: Style("#009E73"),
}


@dataclass(frozen=True)
class Workbench:
    """What all runs share: the base model's directory, the data, and the budget."""

    base_directory: Path
    split: Split
    epochs: int
    evaluations: int

    @property
    def steps(self) -> int:
        """The number of steps of one run."""
        return self.epochs * steps_per_epoch(len(self.split.train))

    def run(self, method: Method, seed: int, bar: tqdm) -> tuple[Run, nn.Module, Tensor]:
        """Train one method with one seed; return what there is to report, the trained model, and its test logits."""

        def advance(history: History) -> None:
            bar.set_postfix_str(f"loss {history.losses[-1]:.2f}", refresh=False)
            bar.update()

        bar.set_description(f"{method.name}, seed {seed}")
        model = method.prepare(load_base_model(self.base_directory, seed, CLASSES))
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        history, logits = train(
            model,
            method.groups(model),
            self.split.train,
            self.split.test,
            epochs=self.epochs,
            evaluations=max(1, self.epochs * self.evaluations),
            seed=seed,
            after_step=advance,
        )
        return Run(method.name, seed, trainable, saved_size(method, model), history), model, logits


def main() -> None:
    """Run the demo as the command line says, and exit with an error where it cannot."""
    options = parse_options()
    started = time.perf_counter()
    try:
        runs, adapter = run_all(options)
    except DemoError as error:
        sys.exit(f"demo: {error}")
    minutes = (time.perf_counter() - started) / 60
    print_results(runs, adapter, compare=options.full)
    write_results(options.output / "results.json", runs, facts(options, adapter, minutes))
    if options.full:
        from _demo_curves import draw_curves

        draw_curves(options.output / "curves.png", runs, STYLES)
    print(f"All numbers are in {options.output / 'results.json'}. This took {minutes:.1f} minutes.")
    if not adapter.reproduces:
        sys.exit("demo: the reloaded adapter does not compute what the trained one does")
    print(commands_text(options.output, command_line()))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all methods, more rows and three seeds; needs matplotlib")
    parser.add_argument("--epochs", type=positive, default=3, help="passes over the train rows (default: 3)")
    parser.add_argument("--rows", type=positive, help="how many rows to train on (default: 1500, with --full 2000)")
    parser.add_argument("--seeds", type=positive, help="how many seeds (default: 1, with --full 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="where to write (default: runs/demo)")
    options = parser.parse_args()
    compared = comparison_of(options)
    options.rows = options.rows or compared.rows
    options.seeds = options.seeds or compared.seeds
    return options


def comparison_of(options: argparse.Namespace) -> Comparison:
    return COMPLETE if options.full else QUICK


def positive(text: str) -> int:
    """Return the positive integer that a command line argument is."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run_all(options: argparse.Namespace) -> tuple[list[Run], AdapterReport]:
    """Train every method with every seed, and check the adapter of the first run of VeRA as soon as it is trained."""
    if options.full and find_spec("matplotlib") is None:
        raise DemoError("--full needs the package 'matplotlib': pip install matplotlib, or let `make demo-full` do it")
    quieten_transformers()
    base_directory = model_directory()
    compared = comparison_of(options)
    split = load_split(base_directory, options.rows, compared.test_rows)
    bench = Workbench(base_directory, split, options.epochs, compared.evaluations)
    print(
        f"MiniLM on sentences of Rotten Tomatoes: {options.rows:,} to train on, {len(split.test):,} to test on"
        f" ({100 * split.test.majority:.1f} % of them in the larger of two classes);"
        f" {bench.steps} steps of {BATCH_SIZE} for each method"
    )
    runs: list[Run] = []
    adapters: list[AdapterReport] = []
    with tqdm(total=options.seeds * len(compared.methods) * bench.steps, unit="step", dynamic_ncols=True) as bar:
        for seed in range(options.seeds):
            for method in compared.methods:
                run, model, logits = bench.run(method, seed, bar)
                runs.append(run)
                bar.write(f"  {method.name}, seed {seed}: {run.accuracy:.1f} % in {run.history.seconds:.0f} s")
                if method is VERA and not adapters:
                    directory = options.output / "adapter"
                    adapters.append(check_adapter(model, logits, base_directory, split.test, directory))
    write_rows(options.output / "rows.csv", compared.test_rows)
    return runs, adapters[0]


def saved_size(method: Method, model: nn.Module) -> int:
    """Return the size of the file that the method has to keep beside the base model's."""
    with tempfile.TemporaryDirectory() as scratch:
        method.save(model, Path(scratch))
        return weights_size(Path(scratch))


def command_line() -> str:
    """Return how to call veratune's command line in this environment."""
    path = shutil.which("veratune", path=str(Path(sys.executable).parent))
    if path is None:
        return f"{sys.executable} -m veratune"
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path


def print_results(runs: list[Run], adapter: AdapterReport, compare: bool) -> None:
    summaries = summarize(runs)
    print(f"\n{table(summaries)}\n")
    if compare:
        print(comparison(summaries, VERA.name, LORA.name))
        print(comparison(summaries, VERA_QV.name, LORA_QV.name))
    print(adapter_text(adapter))


def facts(options: argparse.Namespace, adapter: AdapterReport, minutes: float) -> dict[str, Any]:
    """Return what a reader of the numbers needs to know about how they came about."""
    return {
        "environment": {
            **{package: version(package) for package in ("veratune", "torch", "transformers")},
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "options": vars(options),
        "minutes": round(minutes, 1),
        "methods": [asdict(method) for method in comparison_of(options).methods],
        "adapter": asdict(adapter),
    }


if __name__ == "__main__":
    main()
