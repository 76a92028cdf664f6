import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The tests' products are so small that a second thread costs more than it brings.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _frozen_imports() -> None:
    # What libraries hold lives to the end, and a full collection, as unloading needs one, takes ever longer for it.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directories to write to, one after the other, each for one test of a module."""
    root = tmp_path_factory.mktemp("written")
    return (root / str(count) for count in itertools.count())


@pytest.fixture(params=["VeratuneConfig", "VeraConfig"])
def peft_config(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes configurations for PEFT by a kind of model: veratune's own, and PEFT's own on veratune's layers."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from peft_suite import TARGETS
    from veratune.integrations.peft import VeratuneConfig, install

    own = request.param == "VeratuneConfig"
    config_class = VeratuneConfig if own else peft.VeraConfig

    def make(kind: str = "mlp", **settings: Any) -> Any:
        return config_class(**{"r": 4, "target_modules": TARGETS[kind], **settings})

    install()
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    if not own:
        install(replace_vera=True)
    yield make
    PEFT_TYPE_TO_TUNER_MAPPING.update(before)
