from pathlib import Path
from typing import Any

import pytest
import transformers

from veratune.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def loaded(base: Path) -> Any:
    """Return the classifier in a directory."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(base).eval()
