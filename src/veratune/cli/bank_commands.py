"""`veratune bank`: the arguments and help of its commands. What they do is imported when they run."""

from pathlib import Path
from typing import Annotated

import typer

from veratune.cli.options import BankArgument, JsonOption, ModelOption

app = typer.Typer(
    help="Files of many adapters of one base model, to serve all of them at once.",
    no_args_is_help=True,
    add_completion=False,
)

AdaptersArgument = Annotated[
    list[str],
    typer.Argument(
        help="Directories of adapters or of training runs, or NAME=DIRECTORY. The default name is the directory's last"
        " component."
    ),
]


@app.command("build")
def build(
    file: Annotated[Path, typer.Argument(help="The file to create; it must not exist.")],
    adapters: AdaptersArgument,
    model: ModelOption = None,
    r: Annotated[
        int | None,
        typer.Option("--r", "-r", min=1, help="Largest rank to hold. The default is the largest of the adapters'."),
    ] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to hold: all-linear, or comma-separated names. The default is all that any adapter adapts."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of stored vectors: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Create a bank's file with adapters. If one of them does not fit, no file is created."""
    from veratune.cli import bank

    bank.build(file, adapters, model, rank=r, target_modules=target_modules, dtype=dtype)


@app.command("add")
def add(
    file: BankArgument,
    adapters: AdaptersArgument,
    model: ModelOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the adapters of existing names.")] = False,
) -> None:
    """Add adapters to a bank's file. If one of them does not fit, none is added."""
    from veratune.cli import bank

    bank.add(file, adapters, model, replace=replace)


@app.command("remove")
def remove(file: BankArgument, names: Annotated[list[str], typer.Argument(help="Names of adapters.")]) -> None:
    """Remove names. Running requests are unaffected, and the space is reused."""
    from veratune.cli import bank

    bank.remove(file, names)


@app.command("list")
def show(file: BankArgument, as_json: JsonOption = False) -> None:
    """List the adapters of a bank's file. This needs no model."""
    from veratune.cli import bank

    bank.show(file, as_json=as_json)


@app.command("verify")
def verify(file: BankArgument, as_json: JsonOption = False) -> None:
    """Read and check all of a bank's file. The exit code is 1 if it is damaged. This needs no model."""
    from veratune.cli import bank

    if bank.verify(file, as_json=as_json):
        raise typer.Exit(1)


@app.command("compact")
def compact(file: BankArgument) -> None:
    """Return the space of removed adapters to the disk, while other processes wait. This needs no model."""
    from veratune.cli import bank

    bank.compact(file)
