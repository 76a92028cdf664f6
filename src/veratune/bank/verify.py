"""Looking through a bank's file: whether all that it holds is whole, and what of it nothing leads to any more."""

from dataclasses import dataclass

from veratune.bank.file import BankFile
from veratune.bank.layout import BankError, digest_of
from veratune.bank.record import pack


@dataclass(frozen=True)
class Examination:
    """What was found in a file.

    Attributes:
        names: how many names mean an adapter.
        adapters: how many different adapters these are.
        problems: a sentence for each damaged adapter; empty for a whole file.
        unnamed: digests of adapters without a name.
        unreachable_bytes: what these and superseded names take, and what an interrupted writer left behind the end.
        total_bytes: the file's size.
    """

    names: int
    adapters: int
    problems: list[str]
    unnamed: list[str]
    unreachable_bytes: int
    total_bytes: int


def examine(file: BankFile) -> Examination:
    """Read all of an open file and check every SHA-256, digest and fingerprint.

    That every record is whole, and every name means an adapter that is there, was checked when the file was opened.
    """
    named: dict[str, list[str]] = {}
    for name, digest in file.names.items():
        named.setdefault(digest, []).append(name)
    problems = []
    for digest in file.adapters:
        problem = _problem(file, digest)
        if problem is not None:
            names = named.get(digest, [])
            shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            problems.append(f"{problem} ({shown or 'no name means it'})")
    unnamed = [digest for digest in file.adapters if digest not in named]
    committed, size = file.end()
    reachable = file.records_at + sum(file.adapters[digest].record_bytes for digest in named)
    reachable += sum(len(pack({"kind": "name", "name": name, "digest": digest})) for name, digest in file.names.items())
    return Examination(len(file.names), len(named), problems, unnamed, committed - reachable + (size - committed), size)


def _problem(file: BankFile, digest: str) -> str | None:
    try:
        row = file.row(digest)
    except BankError as error:
        return str(error)
    if digest_of(row.source, row.vectors, row.heads) != digest:
        return f"{file.path} is damaged: what is stored as adapter {digest} is another one"
    return None
