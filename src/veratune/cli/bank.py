"""`veratune bank`: files of many adapters of one base model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veratune.bank import AdapterBank, BankError
from veratune.bank.bank_config import config_for_adapters
from veratune.bank.connection import publish_bank
from veratune.bank.schema import check_spelling, dtype_name
from veratune.bank.store import BankStore
from veratune.bank.verify import examine
from veratune.cli.models import GIVE_BASE, adapter_in, base_of, load_model
from veratune.cli.output import bytes_text, print_json, print_table, print_text
from veratune.config import VeraConfig
from veratune.utils.atomic import is_there, temporary_beside
from veratune.utils.text import counted


def build(
    file: Path,
    adapters: list[str],
    model: str | None,
    *,
    rank: int | None,
    target_modules: list[str] | None,
    dtype: str,
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
    base = _base(directories, model)
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
        f"{file}: {counted(len(directories), 'adapter')}, {counted(len(layout.layers), 'layer')},"
        f" rank {layout.rank}, {dtype}, {bytes_text(file.stat().st_size)}"
    )


def add(file: Path, adapters: list[str], model: str | None, *, replace: bool) -> None:
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
    bank = AdapterBank.open(_base(directories, model), file)
    for directory in directories.values():
        bank.check(directory)
    for name, directory in directories.items():
        bank.load(name, directory, replace=replace)
    bank.unload()
    print_text(f"{file}: {', '.join(directories)} {'replaced' if replace else 'added'}")


def remove(file: Path, names: list[str]) -> None:
    """Remove names. Running requests are unaffected, and the space is reused."""
    bank = BankStore(file)
    for name in names:
        if name not in bank.names:
            raise BankError(f"there is no adapter {name!r} in {file}")
    for name in dict.fromkeys(names):
        bank.remove(name, bank.names[name])
    bank.close()
    print_text(f"{file}: {', '.join(dict.fromkeys(names))} removed")


def show(file: Path, *, as_json: bool) -> None:
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
        f"{file}: {counted(len(rows), 'adapter')}, {counted(len(summary['layers']), 'layer')},"
        f" rank {summary['rank']}, {summary['dtype']}, {bytes_text(summary['bytes'])},"
        f" {bytes_text(header.adapter_bytes)} for each different adapter"
    )
    if summary["modules_to_save"]:
        print_text(f"trained in full: {', '.join(summary['modules_to_save'])}, {summary['saved_dtype']}")
    table = [(name, digest, str(s.rank), s.scheme["scheme"], s.scheme["fingerprint"]) for name, digest, s in rows]
    print_table(("name", "digest", "rank", "projections", "fingerprint"), table)


def verify(file: Path, *, as_json: bool) -> bool:
    """Read and check all of a bank's file, and return whether it is damaged. This needs no model."""
    bank = BankStore(file)
    found = examine(bank)
    bank.close()
    if as_json:
        print_json(asdict(found))
    else:
        for problem in found.problems:
            print_text(problem)
        print_text(
            f"{file}: {counted(found.names, 'name')} of {counted(found.adapters, 'adapter')},"
            f" problems: {len(found.problems)}; {bytes_text(found.free_bytes)} of {bytes_text(found.total_bytes)} are"
            " free"
        )
    return bool(found.problems)


def compact(file: Path) -> None:
    """Return the space of removed adapters to the disk, while other processes wait. This needs no model."""
    bank = BankStore(file)
    before, _ = bank.sizes()
    bank.compact()
    after, _ = bank.sizes()
    bank.close()
    print_text(f"{file}: {bytes_text(before)} before, {bytes_text(after)} now")


def _base(directories: dict[str, Path], model: str | None) -> nn.Module:
    """Return the base model: the given one, or the one that all adapters name."""
    named = {base_of(directory, model): name for name, directory in directories.items()}
    if len(named) > 1:
        (base, name), (other, second) = list(named.items())[:2]
        raise BankError(
            f"adapter {name!r} was trained on {base}, and {second!r} on {other}: give the bank's base model with"
            " --model"
        )
    return load_model(
        next(iter(named)),
        weights=True,
        adapter=next(iter(directories.values())),
        remedy=GIVE_BASE,
    )


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
