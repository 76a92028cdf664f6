"""What is published agrees with itself: versions, tested requirements, and the commands that documents name."""

import json
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from veratune import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_oldest_versions_that_are_named_are_those_that_are_tested() -> None:
    pinned: dict[str, set[str]] = {}
    for path in (ROOT / ".ci" / "oldest.txt", ROOT / "constraints.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                name, version = line.split("==")
                pinned.setdefault(name, set()).add(version)
    gpu = json.loads((ROOT / "benchmarks" / "results" / "gpu_nvidia_h200.json").read_text(encoding="utf-8"))
    pinned["torch"] = {".".join(gpu["machine"]["torch"].split(".")[:2])}
    extras = [name for names in PROJECT["optional-dependencies"].values() for name in names]
    for text in (*PROJECT["dependencies"], *extras):
        requirement = Requirement(text)
        oldest = next(clause.version for clause in requirement.specifier if clause.operator == ">=")
        tested = {Version(version) for version in pinned.get(requirement.name, set())}
        assert Version(oldest) in tested, f"{text} is not tested: {tested}"


def test_every_file_names_the_same_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == __version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == __version__


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    named = {
        (page.name, target)
        for page in pages
        for target in re.findall(r"`make ([a-z-]+)`", page.read_text(encoding="utf-8"))
    }
    assert ("CONTRIBUTING.md", "test") in named
    assert not {(page, target) for page, target in named if target not in targets}
