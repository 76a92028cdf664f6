"""The versions of PEFT that the plug-in works in."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

peft = pytest.importorskip("peft")

from veratune.integrations.peft import install  # noqa: E402
from veratune.integrations.peft import method as peft_method  # noqa: E402


@pytest.mark.parametrize("version", ["0.17.1", "0.20.0", "0.22.0", "1.0.0rc1"])
def test_another_version_is_refused_with_what_to_do(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_method, "version", lambda _: version)
    with pytest.raises(ImportError, match=r"works with peft 0\.21, but .* is installed: pip install"):
        install()


def test_no_peft_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError("peft")

    monkeypatch.setattr(peft_method, "version", missing)
    with pytest.raises(ImportError, match=r"pip install 'veratune\[peft\]'"):
        peft_method.check_version()


def test_the_extra_asks_for_the_same_versions() -> None:
    project = tomllib.loads(Path(__file__).parents[3].joinpath("pyproject.toml").read_text())["project"]
    oldest, newest = peft_method.OLDEST, peft_method.NEWEST
    wanted = f"peft>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"
    assert wanted in project["optional-dependencies"]["peft"]
