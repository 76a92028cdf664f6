"""Verify an entire bank file, and report how much of it is unused."""

from dataclasses import dataclass

from veratune.bank.layout import BankError
from veratune.bank.store import BankStore


@dataclass(frozen=True)
class Examination:
    """The result of verifying a file.

    Attributes:
        names: the number of names.
        adapters: the number of different adapters.
        problems: one sentence per damaged adapter and per problem that SQLite reports.
        free_bytes: the space of removed adapters, available for new ones; `compact` returns it to the file system.
        total_bytes: the file's size.
    """

    names: int
    adapters: int
    problems: list[str]
    free_bytes: int
    total_bytes: int


def examine(store: BankStore) -> Examination:
    """Read an entire open file and check every page, digest and fingerprint.

    Opening the file has already checked that every name refers to an adapter in it, and that its names and adapters
    match its checksum.
    """
    named: dict[str, list[str]] = {digest: [] for digest in store.adapters}
    for name, digest in store.names.items():
        named[digest].append(name)
    problems = [f"{store.path}: {problem}" for problem in store.structural_problems()]
    for digest, names in named.items():
        if not names:
            problems.append(f"{store.path} contains the adapter {digest}, but no name refers to it")
        try:
            store.row(digest)
        except BankError as error:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{error} ({', '.join(map(repr, names[:3]))}{more})")
    total, free = store.sizes()
    return Examination(len(store.names), len(named), problems, free, total)
