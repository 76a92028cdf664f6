"""Reads a directory of files under a limit of memory, and prints what became of each as JSON.

    python bounded_reader.py DIRECTORY MEGABYTES

The limit is that of the process's address space: as much as it has after good files were read, and so much more.
"""

import json
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mutations import INPUT, SETTINGS, net, state_of
from veratune import AdapterBank, CheckpointError, VeraConfig, VeraModel, get_peft_model
from veratune.adapters.target import TargetError
from veratune.bank.layout import BankError
from veratune.bank.store import BankStore
from veratune.checkpoint.formats import read_contents
from veratune.cli.train.fields import SettingsError
from veratune.cli.train.reading import read_rows
from veratune.cli.train.settings import read_settings
from veratune.utils.outside_files import OutsideFileError

OURS = (CheckpointError, TargetError, BankError, SettingsError, OutsideFileError)


def inspect(path: Path) -> None:
    read_contents(path)


def read_yaml(path: Path) -> None:
    read_settings(path)


def read_data(path: Path) -> None:
    try:
        read_rows(str(path))
    except ValueError as error:
        if not str(error).startswith(f"{path} cannot be read"):
            raise
        raise CheckpointError(str(error)) from None


def unchanged(model: nn.Module, load: Callable[[], object]) -> None:
    """Run something that leaves a model as it is if it raises one of our errors."""
    before = state_of(model)
    try:
        load()
    except OURS:
        assert state_of(model) == before
        raise


def load(path: Path) -> Tensor:
    model = net()
    unchanged(model, lambda: VeraModel.from_pretrained(model, path))
    return model(INPUT)


def load_further(path: Path) -> Tensor:
    projection = "per_dimension" if "native" in path.name else "peft"
    model = get_peft_model(net(), VeraConfig(**SETTINGS, projection=projection))
    unchanged(model, lambda: model.load_adapter(path, "other"))
    model.set_adapter("other")
    return model(INPUT)


def load_into_bank(path: Path) -> Tensor:
    bank = AdapterBank(net(), VeraConfig(**SETTINGS), capacity=1)
    unchanged(bank.model, lambda: bank.load("one", path))
    return bank.model(INPUT, adapters=["one"] * len(INPUT))


def open_bank(path: Path) -> Tensor:
    model = net()
    unchanged(model, lambda: AdapterBank.open(model, path, capacity=1))
    return AdapterBank.open(net(), path, capacity=1).model(INPUT, adapters=["one"] * len(INPUT))


def list_bank(path: Path) -> None:
    store = BankStore(path)
    assert not store.structural_problems()
    for digest in store.adapters:
        store.row(digest)


LOADS = (load, load_further, load_into_bank)
WAYS: dict[str, tuple[Callable[[Path], Tensor | None], ...]] = {
    "adapter": (*LOADS, inspect),
    "file": (load, inspect),
    "claim": LOADS,
    "bank": (open_bank, list_bank),
    "data": (read_data,),
    "settings": (read_yaml,),
}


def kind_of(path: Path) -> str:
    return path.name.split()[0]


class Reader:
    """Reads files, and compares the outputs of each adapter that is read with those of the good one."""

    def __init__(self) -> None:
        self._expected: dict[tuple[str, str], Tensor] = {}

    def outcome(self, way: Callable[[Path], Tensor | None], path: Path) -> str:
        try:
            with torch.no_grad():
                found = way(path)
        except OURS as error:
            return f"refused: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if found is None:
            return "loaded"
        expected = self._expected.setdefault((path.name.partition(",")[0].split()[-1], way.__name__), found)
        return "loaded" if torch.equal(found, expected) else "loaded with other outputs"


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(place: Path, megabytes: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    reader = Reader()
    paths = sorted(path for path in place.iterdir() if kind_of(path) in WAYS)
    for path in paths:
        if "good" in path.name:
            for way in WAYS[kind_of(path)]:
                reader.outcome(way, path)
    limit = address_space() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({path.name: [reader.outcome(way, path)[:400] for way in WAYS[kind_of(path)]] for path in paths}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
