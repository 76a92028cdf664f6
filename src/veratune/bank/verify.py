"""Looking through a bank's file: whether all that it holds is whole, and how much of it is not used."""

from dataclasses import dataclass

from veratune.bank.layout import BankError
from veratune.bank.store import BankStore


@dataclass(frozen=True)
class Examination:
    """What was found in a file.

    Attributes:
        names: how many names mean an adapter.
        adapters: how many different adapters there are.
        problems: a sentence for each damaged adapter, and for what SQLite finds; empty for a whole file.
        free_bytes: what removed adapters took, which others will use; `compact` gives it back.
        total_bytes: the file's size.
    """

    names: int
    adapters: int
    problems: list[str]
    free_bytes: int
    total_bytes: int


def examine(store: BankStore) -> Examination:
    """Read all of an open file and check every page, digest and fingerprint.

    That every name means an adapter that is there, and that these are the last ones written, was checked when the file
    was opened.
    """
    named: dict[str, list[str]] = {digest: [] for digest in store.adapters}
    for name, digest in store.names.items():
        named[digest].append(name)
    problems = [f"{store.path}: {problem}" for problem in store.structural_problems()]
    for digest, names in named.items():
        if not names:
            problems.append(f"{store.path} holds adapter {digest}, which no name means")
        try:
            store.row(digest)
        except BankError as error:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{error} ({', '.join(map(repr, names[:3]))}{more})")
    total, free = store.sizes()
    return Examination(len(store.names), len(named), problems, free, total)
