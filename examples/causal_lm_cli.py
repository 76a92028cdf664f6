"""The same fine-tuning of SmolLM2-135M-Instruct as causal_lm_trl.py, by one command and a file of settings.

    python examples/causal_lm_cli.py

Writes the rows, runs `veratune train --config examples/causal_lm.yaml`, and looks at the adapter that comes out.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from _assets import CACHE, check, failed, quiet, smollm2
from _causal_lm import answer_loss, chats, check_result, load, show_samples
from veratune import VeraModel

OUTPUT = Path("runs/examples/causal-lm-cli")
CONFIG = Path(__file__).with_name("causal_lm.yaml")


def main() -> None:
    quiet()
    smollm2()
    train, held_out = chats()
    for name, rows in (("train", train), ("held-out", held_out)):
        lines = [json.dumps({"messages": chat}) for chat in rows]
        (CACHE / f"chats-{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    command = [sys.executable, "-m", "veratune", "train", "--config", str(CONFIG)]
    print(f"  $ veratune train --config {CONFIG.relative_to(Path.cwd())}", flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        failed("veratune train ends well")
    base, tokenizer = load()
    before = answer_loss(base, tokenizer, held_out)
    show_samples(base, tokenizer, "before:")
    model = VeraModel.from_pretrained(base, OUTPUT / "adapter")
    show_samples(model, tokenizer, "after:")
    check_result(model, tokenizer, OUTPUT / "adapter", before, held_out)
    results = json.loads((OUTPUT / "results.json").read_text())
    check(results["steps"] > 0 and (OUTPUT / "curves.png").is_file(), "results.json and curves.png were written")


if __name__ == "__main__":
    main()
