"""Write the pages of all results and the tables of headline figures, so that no figure is copied by hand.

python benchmarks/report.py           writes results/*.md below their marker, and the tables of headline.yaml
python benchmarks/report.py --check   only says which of them differ, and exits with 1 if any does
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import headline
from common import RESULTS, Target, targets_table
from headline import markdown

LONG = 20
MARKER = "<!-- Below this line: made by benchmarks/report.py from {}. -->\n"


def section(table: dict[str, Any], source: str) -> str:
    """Return a titled table; of a long one, only where its rows are."""
    title, rows = table["title"], table["rows"]
    if len(rows) > LONG:
        return f"**{title}**: {len(rows)} rows, in [{source}]({source}) under `tables`."
    # a ratio to a variant that was not measured
    shown = [["-" if cell == "nan" else cell for cell in row] for row in rows]
    return f"**{title}**\n\n{markdown(table['header'], shown)}"


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


def generated(source: Path) -> str:
    """Return all results of one file, in markdown."""
    results = json.loads(source.read_text(encoding="utf-8"))
    targets = targets_table([Target(**target) for target in results["targets"]])
    parts = [machine_line(results)]
    if targets.rows:
        parts.append(markdown(targets.header, targets.rows))
    if source.with_suffix(".png").exists():
        parts.append(f"![{source.stem}]({source.stem}.png)")
    parts += [section(table, source.name) for table in results["tables"]]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[Path, str]:
    """Return the text that the page of every benchmark should have; what is written above its marker stays."""
    found = {}
    for source in sorted(RESULTS.glob("*.json")):
        if "tables" not in json.loads(source.read_text(encoding="utf-8")):
            continue
        page, marker = source.with_suffix(".md"), MARKER.format(source.name)
        above = page.read_text(encoding="utf-8").partition(marker)[0] if page.exists() else f"# {source.stem}\n\n"
        found[page] = above + marker + "\n" + generated(source)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    differing = {
        path: text
        for path, text in {**pages(), **headline.pages()}.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in differing.items():
        print(f"{path.relative_to(headline.REPOSITORY)} {'differs' if options.check else 'written'}")
        if not options.check:
            path.write_text(text, encoding="utf-8")
    sys.exit(1 if options.check and differing else 0)


if __name__ == "__main__":
    main()
