from importlib.util import find_spec
from pathlib import Path


def package_file(package: str, *parts: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, f"{package} ships a model that this test needs: make test installs it"
    return Path(spec.submodule_search_locations[0]).joinpath(*parts)
