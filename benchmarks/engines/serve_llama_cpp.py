"""Generate with the exported adapters in llama.cpp, in its own environment. `serve_llama_cpp.py DIRECTORY`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama

# By default keys and values are kept in half precision.
_SETTINGS: dict[str, Any] = {"n_ctx": 256, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}


def serve(directory: Path) -> None:
    asked = json.loads((directory / "prompts.json").read_text())
    files = {file.parent.parent.name: file for file in sorted(directory.glob("*/gguf/*.gguf"))}
    found = {}
    for name, file in ({"base": None} | files).items():
        lora = {} if file is None else {"lora_path": str(file)}
        engine = Llama(str(directory / "base.gguf"), logits_all=True, verbose=False, **_SETTINGS, **lora)
        found[name] = [_greedy(engine, ids, asked["new"], 2 * asked["top"]) for ids in asked["ids"]]
        engine.close()
    (directory / "llama_cpp.json").write_text(json.dumps(found))


def _greedy(engine: Llama, prompt: list[int], new: int, top: int) -> dict[str, Any]:
    engine.reset()
    tokens: list[int] = []
    likeliest: list[list[tuple[int, float]]] = []
    pending = prompt
    for _ in range(new):
        engine.eval(pending)
        logits = np.asarray(engine.scores[engine.n_tokens - 1], dtype=np.float64)
        logs = logits - logits.max()
        logs -= np.log(np.exp(logs).sum())
        best = np.argsort(-logs)[:top]
        tokens.append(int(best[0]))
        likeliest.append([(int(token), float(logs[token])) for token in best])
        pending = tokens[-1:]
    return {"tokens": tokens, "likeliest": likeliest}


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
