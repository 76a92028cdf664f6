from pathlib import Path

import pytest

from training_runs import sentences


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of sentences with their classes."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in sentences()), encoding="utf-8")
    return path
