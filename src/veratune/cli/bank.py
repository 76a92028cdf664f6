"""`veratune bank`: files of many adapters of one base model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from veratune.bank import AdapterBank, BankError
from veratune.bank.configs import config_for_adapters
from veratune.bank.connection import publish_bank
from veratune.bank.schema import check_spelling, dtype_name
from veratune.bank.store import BankStore
from veratune.bank.verify import examine
from veratune.cli.models import adapter_in, load_model
from veratune.cli.output import bytes_text, print_json, print_table, print_text
from veratune.config import VeraConfig
from veratune.utils.atomic import is_there, temporary_beside

app = typer.Typer(
    help="Files of many adapters of one base model, to serve them all at once.",
    no_args_is_help=True,
    add_completion=False,
)

FileArgument = Annotated[Path, typer.Argument(help="The bank's file.")]
ModelArgument = Annotated[str, typer.Argument(help="The base model: a directory or a hub name.")]
AdaptersArgument = Annotated[
    list[str],
    typer.Argument(
        help="Directories of adapters or of training runs, or NAME=DIRECTORY. Without a name it is the directory's last"
        " part."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("build")
def build(
    model: ModelArgument,
    file: Annotated[Path, typer.Argument(help="The file to make; it must not exist.")],
    adapters: AdaptersArgument,
    rank: Annotated[
        int | None, typer.Option("--r", min=1, help="Largest rank to hold. Without it, the largest of the adapters'.")
    ] = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to hold: all-linear, or names with commas. Without it, those that any of the adapters adapts."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="How to hold the vectors: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Make a bank's file that holds adapters. If one of them does not fit, no file is made."""
    numbers = getattr(torch, dtype, None)
    if not isinstance(numbers, torch.dtype):
        raise ValueError(f"--dtype {dtype}: not a dtype of torch; try float32 or bfloat16")
    places = _places(adapters)
    for name in places:
        check_spelling(name)
    if is_there(file):
        raise BankError(f"{file} exists already")
    base = load_model(model, weights=True, adapter=next(iter(places.values())))
    config = config_for_adapters(base, places)
    if rank is not None:
        config = config.replace(r=rank)
    if target_modules:
        named = [name.strip() for names in target_modules for name in names.split(",")]
        config = config.replace(target_modules=_targets(named), fused_parts=_parts(config, named))
    temporary = temporary_beside(file)
    try:
        bank = AdapterBank(base, config, dtype=numbers, file=temporary)
        for name, place in places.items():
            bank.load(name, place)
        bank.unload()
        publish_bank(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    layout = bank.layout
    print_text(
        f"{file}: {len(places)} adapters, {len(layout.layers)} layers, rank {layout.rank}, {dtype},"
        f" {bytes_text(file.stat().st_size)}"
    )


@app.command("add")
def add(
    file: FileArgument,
    model: ModelArgument,
    adapters: AdaptersArgument,
    replace: Annotated[bool, typer.Option("--replace", help="Give names that are there another adapter.")] = False,
) -> None:
    """Add adapters to a bank's file. If one of them does not fit, none is added."""
    places = _places(adapters)
    known = BankStore(file)
    known.close()
    for name in places:
        check_spelling(name)
        if (name in known.names) != replace:
            wrong = (
                f"there is no adapter {name!r} in {file} to replace" if replace else f"{name!r} is in {file} already"
            )
            raise BankError(wrong)
    bank = AdapterBank.open(load_model(model, weights=True, adapter=next(iter(places.values()))), file)
    for place in places.values():
        bank.check(place)
    for name, place in places.items():
        bank.load(name, place, replace=replace)
    bank.unload()
    print_text(f"{file}: {', '.join(places)} {'replaced' if replace else 'added'}")


@app.command("remove")
def remove(file: FileArgument, names: Annotated[list[str], typer.Argument(help="Names of adapters.")]) -> None:
    """Let names mean nothing any more. Requests that are running are not disturbed, and the space is used again."""
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
    """Show the adapters of a bank's file. It needs no model."""
    bank = BankStore(file)
    rows = [(name, bank.adapters[digest]) for name, digest in bank.names.items()]
    header = bank.header
    size, _ = bank.sizes()
    bank.close()
    summary: dict[str, Any] = {
        "file": str(file),
        "bytes": size,
        "rank": header.layout["rank"],
        "dtype": dtype_name(header.dtype),
        "head_dtype": None if header.head_dtype is None else dtype_name(header.head_dtype),
        "layers": [name for name, *_ in header.layout["layers"]],
        "heads": [name for name, _ in header.layout["heads"]],
        "bytes_per_adapter": header.adapter_bytes,
    }
    if as_json:
        listed = [
            {
                "name": name,
                "digest": stored.digest,
                "rank": stored.rank,
                "scheme": stored.scheme["scheme"],
                "key": stored.scheme["key"],
                "fingerprint": stored.scheme["fingerprint"],
            }
            for name, stored in rows
        ]
        print_json(summary | {"adapters": listed})
        return
    print_text(
        f"{file}: {len(rows)} adapters, {len(summary['layers'])} layers, rank {summary['rank']}, {summary['dtype']},"
        f" {bytes_text(summary['bytes'])}, {bytes_text(header.adapter_bytes)} for each different adapter"
    )
    if summary["heads"]:
        print_text(f"trained in full: {', '.join(summary['heads'])}, {summary['head_dtype']}")
    table = [(name, s.digest, str(s.rank), s.scheme["scheme"], s.scheme["fingerprint"]) for name, s in rows]
    print_table(("name", "digest", "rank", "projections", "fingerprint"), table)


@app.command("verify")
def verify(file: FileArgument, as_json: JsonOption = False) -> None:
    """Read all of a bank's file and check it. Exit code 1 if it is damaged. It needs no model."""
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
    """Give the space of removed adapters back to the disk. Other processes wait meanwhile. It needs no model."""
    bank = BankStore(file)
    before, _ = bank.sizes()
    bank.compact()
    after, _ = bank.sizes()
    bank.close()
    print_text(f"{file}: {bytes_text(before)} before, {bytes_text(after)} now")


def _places(given: list[str]) -> dict[str, Path]:
    """Return name to directory."""
    places: dict[str, Path] = {}
    for text in given:
        name, separator, place = text.partition("=")
        if not separator or _is_directory(text):
            name, place = Path(text).resolve().name, text
        if name in places:
            raise BankError(f"{text} and {places[name]} are both named {name!r}: give NAME=DIRECTORY")
        if not _is_directory(place):
            raise BankError(f"{place} is no directory of an adapter")
        places[name] = adapter_in(Path(place))
    return places


def _is_directory(text: str) -> bool:
    return is_there(Path(text)) and Path(text).is_dir()


def _targets(given: list[str]) -> list[str] | str:
    return "all-linear" if given == ["all-linear"] else given


def _parts(config: VeraConfig, given: list[str]) -> dict[str, int | list[int]]:
    """Return the parts of the layers that are named, or of all of them."""
    if _targets(given) == "all-linear":
        return config.fused_parts
    return {name: own for name, own in config.fused_parts.items() if any(name.endswith(end) for end in given)}
