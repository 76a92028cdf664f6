"""`veratune bank`: files of many adapters of one base model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from veratune.bank import AdapterBank, BankError
from veratune.bank.bank_config import config_for_adapters
from veratune.bank.connection import publish_bank
from veratune.bank.schema import check_spelling, dtype_name
from veratune.bank.store import BankStore
from veratune.bank.verify import examine
from veratune.cli.models import adapter_in, load_model
from veratune.cli.output import bytes_text, print_json, print_table, print_text
from veratune.config import VeraConfig
from veratune.utils.atomic import is_there, temporary_beside

app = typer.Typer(
    help="Files of many adapters of one base model, to serve all of them at once.",
    no_args_is_help=True,
    add_completion=False,
)

FileArgument = Annotated[Path, typer.Argument(help="The bank's file.")]
ModelArgument = Annotated[str, typer.Argument(help="The base model: a directory or a hub name.")]
AdaptersArgument = Annotated[
    list[str],
    typer.Argument(
        help="Directories of adapters or of training runs, or NAME=DIRECTORY. The default name is the directory's last"
        " component."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("build")
def build(
    model: ModelArgument,
    file: Annotated[Path, typer.Argument(help="The file to create; it must not exist.")],
    adapters: AdaptersArgument,
    rank: Annotated[
        int | None,
        typer.Option("--r", min=1, help="Largest rank to hold. The default is the largest of the adapters'."),
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
    numbers = getattr(torch, dtype, None)
    if not isinstance(numbers, torch.dtype):
        raise ValueError(f"--dtype {dtype} is not a dtype of torch; use float32, bfloat16 or float16")
    directories = _directories(adapters)
    for name in directories:
        check_spelling(name)
    if is_there(file):
        raise BankError(f"{file} already exists")
    base = load_model(model, weights=True, adapter=next(iter(directories.values())))
    config = config_for_adapters(base, directories)
    if rank is not None:
        config = config.replace(r=rank)
    if target_modules:
        named = [name.strip() for names in target_modules for name in names.split(",")]
        config = config.replace(target_modules=_targets(named), fused_parts=_fused_parts(config, named))
    temporary = temporary_beside(file)
    try:
        settings = {"peft_config": config, "capacity": 64, "dtype": numbers, "file": temporary}
        bank = AdapterBank.for_adapters(base, directories, **settings)
        bank.unload()
        publish_bank(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    layout = bank.layout
    print_text(
        f"{file}: {len(directories)} adapters, {len(layout.layers)} layers, rank {layout.rank}, {dtype},"
        f" {bytes_text(file.stat().st_size)}"
    )


@app.command("add")
def add(
    file: FileArgument,
    model: ModelArgument,
    adapters: AdaptersArgument,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the adapters of existing names.")] = False,
) -> None:
    """Add adapters to a bank's file. If one of them does not fit, none is added."""
    directories = _directories(adapters)
    known = BankStore(file)
    known.close()
    for name in directories:
        check_spelling(name)
        if (name in known.names) != replace:
            wrong = (
                f"there is no adapter {name!r} in {file} to replace" if replace else f"{name!r} is already in {file}"
            )
            raise BankError(wrong)
    bank = AdapterBank.open(load_model(model, weights=True, adapter=next(iter(directories.values()))), file)
    for directory in directories.values():
        bank.check(directory)
    for name, directory in directories.items():
        bank.load(name, directory, replace=replace)
    bank.unload()
    print_text(f"{file}: {', '.join(directories)} {'replaced' if replace else 'added'}")


@app.command("remove")
def remove(file: FileArgument, names: Annotated[list[str], typer.Argument(help="Names of adapters.")]) -> None:
    """Remove names. Running requests are unaffected, and the space is reused."""
    bank = BankStore(file)
    for name in names:
        if name not in bank.names:
            raise BankError(f"there is no adapter {name!r} in {file}")
    for name in dict.fromkeys(names):
        bank.remove(name, bank.names[name])
    bank.close()
    print_text(f"{file}: {', '.join(dict.fromkeys(names))} removed")


@app.command("list")
def show(file: FileArgument, as_json: JsonOption = False) -> None:
    """List the adapters of a bank's file. This needs no model."""
    bank = BankStore(file)
    rows = [(name, digest, bank.adapters[digest]) for name, digest in bank.names.items()]
    header = bank.header
    size, _ = bank.sizes()
    bank.close()
    summary: dict[str, Any] = {
        "file": str(file),
        "bytes": size,
        "rank": header.layout["rank"],
        "dtype": dtype_name(header.dtype),
        "saved_dtype": None if header.saved_dtype is None else dtype_name(header.saved_dtype),
        "layers": [name for name, *_ in header.layout["layers"]],
        "modules_to_save": [name for name, _ in header.layout["modules_to_save"]],
        "bytes_per_adapter": header.adapter_bytes,
    }
    if as_json:
        listed = [
            {
                "name": name,
                "digest": digest,
                "rank": stored.rank,
                "scheme": stored.scheme["scheme"],
                "key": stored.scheme.get("key"),
                "fingerprint": stored.scheme["fingerprint"],
            }
            for name, digest, stored in rows
        ]
        print_json(summary | {"adapters": listed})
        return
    print_text(
        f"{file}: {len(rows)} adapters, {len(summary['layers'])} layers, rank {summary['rank']}, {summary['dtype']},"
        f" {bytes_text(summary['bytes'])}, {bytes_text(header.adapter_bytes)} for each different adapter"
    )
    if summary["modules_to_save"]:
        print_text(f"trained in full: {', '.join(summary['modules_to_save'])}, {summary['saved_dtype']}")
    table = [(name, digest, str(s.rank), s.scheme["scheme"], s.scheme["fingerprint"]) for name, digest, s in rows]
    print_table(("name", "digest", "rank", "projections", "fingerprint"), table)


@app.command("verify")
def verify(file: FileArgument, as_json: JsonOption = False) -> None:
    """Read and check all of a bank's file. The exit code is 1 if it is damaged. This needs no model."""
    bank = BankStore(file)
    found = examine(bank)
    bank.close()
    if as_json:
        print_json(asdict(found))
    else:
        for problem in found.problems:
            print_text(problem)
        print_text(
            f"{file}: {found.names} names of {found.adapters} adapters, problems: {len(found.problems)};"
            f" {bytes_text(found.free_bytes)} of {bytes_text(found.total_bytes)} are free"
        )
    if found.problems:
        raise typer.Exit(1)


@app.command("compact")
def compact(file: FileArgument) -> None:
    """Return the space of removed adapters to the disk, while other processes wait. This needs no model."""
    bank = BankStore(file)
    before, _ = bank.sizes()
    bank.compact()
    after, _ = bank.sizes()
    bank.close()
    print_text(f"{file}: {bytes_text(before)} before, {bytes_text(after)} now")


def _directories(given: list[str]) -> dict[str, Path]:
    """Return name to directory."""
    directories: dict[str, Path] = {}
    for text in given:
        name, separator, directory = text.partition("=")
        if not separator or _is_directory(text):
            name, directory = Path(text).resolve().name, text
        if name in directories:
            raise BankError(f"{text} and {directories[name]} are both named {name!r}: pass NAME=DIRECTORY")
        if not _is_directory(directory):
            raise BankError(f"{directory} is not a directory of an adapter")
        directories[name] = adapter_in(Path(directory))
    return directories


def _is_directory(text: str) -> bool:
    return is_there(Path(text)) and Path(text).is_dir()


def _targets(given: list[str]) -> list[str] | str:
    return "all-linear" if given == ["all-linear"] else given


def _fused_parts(config: VeraConfig, given: list[str]) -> dict[str, int | list[int]]:
    """Return the parts of the given layers, or of all."""
    if _targets(given) == "all-linear":
        return config.fused_parts
    return {name: parts for name, parts in config.fused_parts.items() if any(name.endswith(end) for end in given)}
