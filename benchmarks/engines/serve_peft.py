"""Generate with the exported adapters in the real peft package. `serve_peft.py DIRECTORY`."""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from prepare import greedy


def serve(directory: Path) -> None:
    prompts = json.loads((directory / "prompts.json").read_text())["ids"]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()
    found = {"base": [greedy(model, prompt) for prompt in prompts]}
    for lora in sorted(directory.glob("*/lora")):
        adapted = peft.PeftModel.from_pretrained(model, lora).eval()
        found[lora.parent.name] = [greedy(adapted, prompt) for prompt in prompts]
        model = adapted.unload()
    (directory / "peft.json").write_text(json.dumps(found))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
