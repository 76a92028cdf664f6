"""Generate with the exported adapters in vLLM, in its own environment. `serve_vllm.py DIRECTORY`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


def serve(directory: Path) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    asked = json.loads((directory / "prompts.json").read_text())
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["ids"]]
    sampling = SamplingParams(temperature=0, max_tokens=asked["new"], logprobs=2 * asked["top"], ignore_eos=True)
    engine = LLM(
        model=str(directory / "base"),
        dtype="float32",
        enable_lora=True,
        max_lora_rank=256,
        max_model_len=256,
        enforce_eager=True,
        seed=0,
    )
    loras = {lora.parent.name: lora for lora in sorted(directory.glob("*/lora"))}
    requests = {name: LoRARequest(name, i + 1, str(path)) for i, (name, path) in enumerate(loras.items())}
    found = {
        name: [_answer(output) for output in engine.generate(prompts, sampling, lora_request=request)]
        for name, request in ({"base": None} | requests).items()
    }
    (directory / "vllm.json").write_text(json.dumps(found))


def _answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    likeliest = [
        sorted(((token, found.logprob) for token, found in step.items()), key=lambda pair: -pair[1])
        for step in completion.logprobs
    ]
    return {"tokens": list(completion.token_ids), "likeliest": likeliest}


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
