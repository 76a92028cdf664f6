"""Arguments and options that several commands share: each has one name and one meaning."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

# A training run's settings, in its output directory.
SETTINGS_NAME = "train.yaml"

AdapterArgument = Annotated[Path, typer.Argument(help="A training run's output directory, or an adapter's directory.")]
OutputArgument = Annotated[Path, typer.Argument(help="Directory to write; it must be new or empty.")]
BankArgument = Annotated[Path, typer.Argument(help="The bank's file.")]
ModelOption = Annotated[
    str | None,
    typer.Option(help="The base model: a directory or a hub name. The default is the one that the adapter names."),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the GPU if there is one.")]
SeedOption = Annotated[int, typer.Option(min=0, help="For everything random.")]


class Engine(StrEnum):
    """Engines whose support for a LoRA can be checked."""

    VLLM = "vllm"


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
