"""Run all examples, one after another, and print a line for each.

    python examples/run_all.py [NAME ...]

What an example prints goes to runs/examples/NAME.log, and is shown where it fails.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LOGS = Path("runs/examples")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
EXAMPLES: dict[str, list[str]] = {
    "trainer": [],
    "peft_plugin": [],
    "sentence_embeddings": [],
    "ddp": TORCHRUN,
    "fsdp2": TORCHRUN,
    "deepspeed_zero": TORCHRUN,
    "pipelines": [],
    "causal_lm_trl": [],
    "causal_lm_cli": [],
    "trl_sft_peft": [],
    "trl_dpo": [],
    "many_customers": [],
}
SHOWN = 25


def main() -> None:
    names = sys.argv[1:] or list(EXAMPLES)
    unknown = [name for name in names if name not in EXAMPLES]
    if unknown:
        sys.exit(f"run_all.py: there are no examples {unknown}: there are {list(EXAMPLES)}")
    LOGS.mkdir(parents=True, exist_ok=True)
    failed = []
    begin = time.monotonic()
    for name in names:
        start = time.monotonic()
        log = LOGS / f"{name}.log"
        with log.open("w", encoding="utf-8") as output:
            command = [sys.executable, *EXAMPLES[name], str(HERE / f"{name}.py")]
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, check=False, env=environment
            ).returncode
        print(f"{name:<22}{'ok' if code == 0 else f'failed ({code})':<14}{time.monotonic() - start:5.0f} s", flush=True)
        if code != 0:
            failed.append(name)
            print(
                "\n".join(f"    {line}" for line in log.read_text(encoding="utf-8").splitlines()[-SHOWN:]), flush=True
            )
    print(
        f"{len(names) - len(failed)} of {len(names)} in {(time.monotonic() - begin) / 60:.1f} minutes; logs in {LOGS}"
    )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
