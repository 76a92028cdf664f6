"""Run PEFT's own tests of VeRA twice: as they are, and with its `VeraConfig` on veratune's layers.

    python benchmarks/peft_suite/run.py SOURCE    # an unpacked source distribution of peft, which carries its tests

It exits with 1 where fewer pass on veratune's layers than `EXPECTED_PASSES`, where another test fails than with plain
PEFT and those named in `DIFFERENT`, or where one of these passes by now.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

HERE = Path(__file__).parent
TESTS = ("tests/test_vera.py", "tests/test_custom_models.py")
EXPECTED_PASSES = 813
DIFFERENT = {
    # It writes to vera_A and vera_B, which are for reading here: many models may share these tensors.
    "test_save_projection_true_restores_saved_projections",
    # It expects that a second key is refused; with veratune each adapter has a key of its own.
    "test_multiple_adapters_different_prng_raises",
}


def outcomes(source: Path, results: Path, *, plug_in: bool) -> dict[str, set[str]]:
    """Return the names of the tests by outcome: passed, failed (or in error) and skipped."""
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "--rootdir", ".", *TESTS, "-k", "vera"]
    command += ["-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", "--junitxml", str(results)]
    command += ["-p", "veratune_layers"] if plug_in else []
    paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    code = subprocess.run(command, cwd=source, env=environment, check=False).returncode
    if code not in (0, 1) or not results.is_file():
        raise SystemExit(f"pytest ended with {code} before it had run the tests in {source}")
    found: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}
    for case in ET.parse(results).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[outcome].add(f"{case.get('classname')}.{case.get('name')}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="unpacked source distribution of peft")
    source = parser.parse_args().source.resolve()
    (source / "tests" / "__init__.py").touch()  # its tests import each other relatively
    plain = outcomes(source, source / "plain.xml", plug_in=False)
    ours = outcomes(source, source / "veratune.xml", plug_in=True)
    for title, found in (("plain PEFT", plain), ("on veratune's layers", ours)):
        print(f"{title}: " + ", ".join(f"{len(names)} {outcome}" for outcome, names in found.items()))
    more = {name for name in ours["failed"] if name not in plain["failed"]}
    different = {name for name in more if _last(name) in DIFFERENT}
    wrong = [f"{name} fails on veratune's layers alone" for name in sorted(more - different)]
    wrong += [f"{name} passes now: take it off the list" for name in sorted(DIFFERENT - {_last(n) for n in different})]
    if len(ours["passed"]) < EXPECTED_PASSES:
        wrong.append(f"{len(ours['passed'])} tests pass on veratune's layers, and {EXPECTED_PASSES} must")
    print("\n".join(wrong) or f"as expected: only {', '.join(sorted(DIFFERENT))} fail on veratune's layers alone")
    return 1 if wrong else 0


def _last(name: str) -> str:
    return name.rpartition(".")[2]


if __name__ == "__main__":
    sys.exit(main())
