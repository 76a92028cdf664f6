"""The commands but `train` and `bank`: their arguments and help. What they do is imported when they run.

Importing torch and transformers takes seconds, which `--help` must not wait for.
"""

from pathlib import Path
from typing import Annotated

import typer

from veratune.cli.options import (
    AdapterArgument,
    DeviceOption,
    Engine,
    JsonOption,
    ModelOption,
    OutputArgument,
    SeedOption,
)

EXAMPLES = {
    "predict": (
        "veratune predict run --data rows.csv",
        "veratune predict run --data rows.csv --output predictions.jsonl",
        "echo 'a fine film' | veratune predict run --data -",
    ),
    "chat": (
        "veratune chat run",
        "veratune chat run --compare-base",
        "echo 'What is VeRA?' | veratune chat run --max-new-tokens 100",
    ),
    "inspect": (
        "veratune inspect MODEL --r 1024 --tokens 8192",
        "veratune inspect run --plot vectors.png",
        "veratune inspect run --json",
    ),
    "merge": ("veratune merge run merged", "veratune merge run merged --model MODEL"),
    "export": (
        "veratune export run for-peft --format peft",
        "veratune export run for-engines --format lora --dtype bfloat16",
    ),
    "convert": ("veratune convert peft-adapter adapter --model MODEL",),
    "diff": ("veratune diff run other-run --json",),
    "bench": ("veratune bench MODEL", "veratune bench MODEL --r 256 --r 1024 --batch-size 8 --length 512 --json"),
}


def epilog(name: str) -> str | None:
    """Return the examples that follow a command's help."""
    lines = EXAMPLES.get(name, ())
    return "\n\n".join(("Examples:" if len(lines) > 1 else "Example:", *lines)) if lines else None


def predict(
    run: AdapterArgument,
    data: Annotated[
        str,
        typer.Option(
            help="Rows: a CSV, TSV, JSON, JSONL or Parquet file, a data set's hub name, or - for standard input, with"
            " one text a line."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="New file for the predictions: .csv, .tsv or .jsonl. [default: standard output]")
    ] = None,
    model: ModelOption = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the text, or of words. [default: as in training, or text]")
    ] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="Column of a second text. [default: as in training]")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(help="Column of the label, if there is one to score. [default: as in training, or label]"),
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a data set on the hub.")] = None,
    split: Annotated[str, typer.Option(help="Part of a data set on the hub.")] = "test",
    encoding: Annotated[
        str | None, typer.Option(help="Encoding of a text file, such as gb18030. [default: utf-8]")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens after which a text is cut. [default: as in training, or 256]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 16,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of CSV.")] = False,
) -> None:
    """Label rows with a trained classifier, token classifier or regression model; score them if they have labels."""
    from veratune.cli.prediction import predict as predict_rows

    given = {
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "label_column": label_column,
        "max_length": max_length,
        "subset": subset,
        "split": split,
        "encoding": encoding,
        "batch_size": batch_size,
    }
    predict_rows(run, data, output, model, given, device=device, as_json=as_json)


def chat(
    run: AdapterArgument,
    model: ModelOption = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Also print the answers of the base model, without the adapter.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue each line as plain text, without a chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message that begins the chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Temperature to sample with; 0 takes the most likely token.")
    ] = 0.0,
    seed: SeedOption = 0,
    device: DeviceOption = None,
) -> None:
    """Talk to a trained language model. Reads one message a line; /new starts another chat."""
    from veratune.cli.chatting import Generation
    from veratune.cli.chatting import chat as talk

    settings = Generation(max_new_tokens, temperature, seed)
    talk(run, model, settings, compare_base=compare_base, plain=plain, system=system, device=device)


def inspect(
    path_or_repo: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_ADAPTER",
            help="A model or an adapter: a directory, an adapter's file, a training run's output directory, or a"
            " model's hub name.",
        ),
    ],
    r: Annotated[int, typer.Option("--r", "-r", min=1, help="Rank for the numbers of a model.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch, for the routes.")] = 4096,
    every: Annotated[bool, typer.Option("--all", help="Show every weight or layer instead of groups.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of an adapter's vectors to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model's layers grouped by shape, or an adapter's configuration and vectors."""
    from veratune.cli.inspecting import inspect as inspect_path

    inspect_path(path_or_repo, r, tokens, every=every, plot=plot, as_json=as_json)


def merge(
    adapter: AdapterArgument,
    output: OutputArgument,
    model: ModelOption = None,
    safe: Annotated[bool, typer.Option(help="Check that all merged weights are finite.")] = True,
) -> None:
    """Merge an adapter into its base model and save a plain model."""
    from veratune.cli.adapters import merge as merge_adapter

    merge_adapter(adapter, output, model, safe=safe)


def export(
    adapter: AdapterArgument,
    output: OutputArgument,
    to: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="[peft|lora|gguf]",
            help="peft: PEFT's VeRA. lora: a LoRA. gguf: a LoRA for llama.cpp.",
        ),
    ],
    model: ModelOption = None,
    dtype: Annotated[str, typer.Option(help="dtype of the matrices of a LoRA.")] = "float32",
    r: Annotated[
        int | None,
        typer.Option(
            "--r",
            "-r",
            min=1,
            help="lora: a rank other than the adapter's, if it can represent the deltas exactly.",
        ),
    ] = None,
    engine: Annotated[Engine | None, typer.Option(help="lora: check that this engine can load it.")] = None,
) -> None:
    """Write an adapter in another format, with the same outputs."""
    from veratune.cli.adapters import export as export_adapter

    export_adapter(adapter, output, to, model, dtype=dtype, rank=r, engine=engine)


def convert(
    adapter: Annotated[
        Path,
        typer.Argument(help="Directory of a VeRA adapter that PEFT wrote, also with veratune's layers."),
    ],
    output: OutputArgument,
    model: ModelOption = None,
) -> None:
    """Convert a VeRA adapter that PEFT wrote to veratune's format."""
    from veratune.cli.adapters import convert as convert_adapter

    convert_adapter(adapter, output, model)


def diff(first: AdapterArgument, second: AdapterArgument, as_json: JsonOption = False) -> None:
    """Compare the settings, layers and vectors of two adapters. The exit code is 1 if they differ."""
    from veratune.cli.adapters import diff as compare

    if compare(first, second, as_json=as_json):
        raise typer.Exit(1)


def bench(
    model: Annotated[str, typer.Argument(help="A transformers model: a directory or a hub name.")],
    r: Annotated[
        list[int] | None,
        typer.Option("--r", "-r", min=1, help="Rank; may be given more than once. [default: 256]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a row.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="How often each step is timed.")] = 5,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="dtype of the base model; that of its file by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time training steps of a model on this machine: veratune's, PEFT's, full fine-tuning, and the frozen model.

    All linear layers are adapted. The steps take turns, and each is compared with the frozen model's in the same round.
    """
    from veratune.cli.bench import bench as time_steps

    time_steps(model, r or [256], batch_size, length, rounds, device=device, dtype=dtype, as_json=as_json)


def doctor(as_json: JsonOption = False) -> None:
    """Show versions and devices, and the packages that features are missing."""
    from veratune.cli.doctor import doctor as examine

    examine(as_json=as_json)
