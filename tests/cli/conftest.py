from pathlib import Path

import pytest

from tiny_models import tiny_model
from training_runs import sentences, with_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The directory of a classifier."""
    tiny_model("bert").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an encoder and its tokenizer."""
    return with_tokenizer("bert", tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a decoder and its tokenizer."""
    return with_tokenizer("llama", tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of sentences with their classes."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in sentences()), encoding="utf-8")
    return path
