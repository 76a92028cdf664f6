"""Files that claim or hide sizes without end end with one of our errors, in a process that has little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hostile_corpus import write_corpus

# Besides what the process has after it has read good files. JSON of 64 MB is read, some of it as text of 256 MB.
MEGABYTES = 512


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is that of Linux's address spaces")
def test_hostile_files_of_every_format_are_read_in_bounded_memory(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    reader = Path(__file__).parent.parent / "helpers" / "bounded_reader.py"
    done = subprocess.run(
        [sys.executable, str(reader), str(tmp_path), str(MEGABYTES)], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    assert len(found) > 100
    wrong = {}
    for name, outcomes in found.items():
        allowed = {"loaded"} if "good" in name else {"refused"}
        if name.startswith("claim"):  # of what some formats do not read; what is loaded is right
            allowed.add("loaded")
        if not {outcome.partition(":")[0] for outcome in outcomes} <= allowed:
            wrong[name] = outcomes
    assert not wrong
