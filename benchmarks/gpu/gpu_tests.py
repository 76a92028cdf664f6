"""Stage: the tests that need a GPU, in a process of their own."""

import os
import re
import subprocess
import sys

from common import ROOT
from gpu.harness import Figures, Stage

MARK = "needs a GPU"
LEAST_SECONDS = 40.0
"""Starting Python, torch and pytest alone takes more than ten."""


def test_files() -> list[str]:
    """Return the test files that have tests which are skipped without a GPU."""
    found = sorted((ROOT.parent / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT.parent)) for path in found if MARK in path.read_text(encoding="utf-8")]


def run(stage: Stage) -> None:
    for path in test_files():
        stage.case(path, lambda path=path: run_file(stage, path), seconds=5)


def run_file(stage: Stage, path: str) -> Figures:
    """Run one file's tests; the figures are what pytest counted."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", path]
    if stage.toy:  # on a CPU the tests would be skipped: it is enough that they are found
        command.append("--collect-only")
    # Other packages' plug-ins may warn, which the tests' settings turn into errors.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT.parent / "src")}
    ran = subprocess.run(
        command,
        cwd=ROOT.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=max(LEAST_SECONDS, stage.left),
        check=False,
    )
    last = (ran.stdout.strip().splitlines() or ["nothing was printed"])[-1]
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?|tests? collected)", last)
    }
    skipped = ran.stdout.count(MARK)
    passed = ran.returncode == 0 and (stage.toy or (counts.get("passed", 0) > 0 and not skipped))
    found: Figures = {"passed": passed, "counts": counts, "rc": ran.returncode, "line": last}
    return found if ran.returncode == 0 else found | {"output": (ran.stdout + ran.stderr)[-4000:]}
