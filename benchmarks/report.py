"""Write the tables of all results into README.md, between its markers, so that no number is copied by hand.

python benchmarks/report.py
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import bank
import quick
from common import RESULTS, ROOT, Table, Target, targets_table

README = ROOT / "README.md"
LONG = 20
MARKERS = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in markdown, its first column aligned left, the others right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def section(table: dict[str, Any]) -> str:
    """Return a titled table, folded away if it is long."""
    text = markdown(table["header"], table["rows"])
    if len(table["rows"]) > LONG:
        summary = f"<summary>{table['title']} ({len(table['rows'])} rows)</summary>"
        return f"<details>\n{summary}\n\n{text}\n\n</details>"
    return f"**{table['title']}**\n\n{text}"


def machine_line(results: dict[str, Any]) -> str:
    """Return a sentence on the machine, the date and the load of the measurements."""
    machine, cases = results["machine"], results["cases"]
    loads = [case["load"] for case in cases]
    moments = sorted(case["date"] for case in cases)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft"))
    return (
        f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores, {machine['gpu'] or 'no GPU'};"
        f" {versions}; {moments[0]} to {moments[-1]}; load average when a case began {min(loads):.2f} to"
        f" {max(loads):.2f}, the benchmark's own included."
    )


def report(name: str) -> str:
    """Return all results of one benchmark, in markdown."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet.\n"
    results = json.loads(path.read_text(encoding="utf-8"))
    targets: Table = targets_table([Target(**target) for target in results["targets"]])
    parts = [machine_line(results)]
    if targets.rows:
        parts.append(markdown(targets.header, targets.rows))
    if path.with_suffix(".png").exists():
        parts.append(f"![{name}](results/{name}.png)")
    parts += map(section, results["tables"])
    return "\n\n".join(parts) + "\n"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    marked = {match[2] for match in MARKERS.finditer(text)}
    if missing := {*quick.ORDER, *bank.ORDER} - marked:
        raise SystemExit(f"README.md has no markers for {sorted(missing)}")
    README.write_text(MARKERS.sub(lambda match: match[1] + "\n" + report(match[2]) + "\n" + match[3], text), "utf-8")


if __name__ == "__main__":
    main()
