from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a bank's file is to be."""
    return tmp_path / "bank"
