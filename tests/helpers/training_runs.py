import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tiny_models import tiny_model
from veratune.cli import main

WORDS = ["good", "bad", "film", "very", "not", "the", "a", "was", "boring", "fine"]


def with_tokenizer(kind: str, directory: Path) -> Path:
    vocabulary = {name: number for number, name in enumerate(["[BOS]", "[EOS]", "[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", bos_token="[BOS]"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(directory)
    model = tiny_model(kind)
    (model.bert if kind == "bert" else model).save_pretrained(directory)
    return directory


def sentences(count: int = 40) -> list[tuple[str, str]]:
    return [
        (f"the film was {'very good' if i % 2 else 'not fine'} {WORDS[i % 10]}", "pos" if i % 2 else "neg")
        for i in range(count)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(*arguments: object) -> int:
    return main(["train", *map(str, arguments)])
