"""All checks of `sweep_check` on all architectures of `sweep_models`."""

from pathlib import Path
from typing import Any

import pytest

from sweep_check import CHECKS
from sweep_models import ARCHITECTURES


def _cases() -> list[Any]:
    return [
        pytest.param(
            name,
            check,
            marks=[pytest.mark.xfail(strict=True, reason=reason)] if (reason := architecture.fails.get(check)) else [],
        )
        for name, architecture in ARCHITECTURES.items()
        for check in CHECKS
    ]


@pytest.mark.parametrize(("name", "check"), _cases())
def test_architecture(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](ARCHITECTURES[name], tmp_path)


def test_there_are_enough_architectures() -> None:
    assert len(ARCHITECTURES) >= 45
