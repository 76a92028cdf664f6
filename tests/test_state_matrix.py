"""Every public method in every state: right by float64 algebra, or refused with everything as it was."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from state_matrix import Kept, Method, never, public_names, run, run_kept
from state_methods import METHODS, expected, live_on
from state_setups import STATES, make_env, saved_adapters
from veratune import VeraModel

KEPT = Kept()
# Where what is always refused is tried; elsewhere it is refused by the same lines.
FULL = [(family, mode) for family, mode in STATES if family == "linear" or mode == "plain"]


def has_meaning(mode: str, method: str) -> bool:
    """Return whether a pair is veratune's affair: FSDP2 and accelerate's hooks let no model be copied."""
    return not (method in ("copy.deepcopy", "pickle") and mode in ("sharded", "offloaded", "offloaded_before"))


def pairs() -> Iterator[Any]:
    for family, mode in STATES:
        for method in METHODS:
            refused = never in method.needs and (family, mode) not in FULL
            if refused or not has_meaning(mode, method.name):
                continue
            yield pytest.param(family, mode, method, id=f"{family}-{mode}-{method.id}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    return saved_adapters(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    yield
    KEPT.forget()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


pytestmark = pytest.mark.filterwarnings(
    "ignore:veratune. merging into:UserWarning",
    "ignore:veratune. head shares its weight:UserWarning",
    "ignore:FSDP2-wrapped module:UserWarning",
)
# What makes tensors, or moves them, that are trained or computed with later.
_NAMES = {"add_adapter", "load_adapter", "restore", "load_state_dict", "delete_adapter", "disable_adapter"}
_NAMES |= {"merge_adapter", "unmerge_adapter", "merge_and_unload"}
MAKING = [method for method in METHODS if method.name in _NAMES]


@pytest.mark.parametrize(("family", "mode", "method"), list(pairs()))
def test_a_method_in_a_state(
    family: str, mode: str, method: Method, library: Callable[[str, str], Path], places: Iterator[Path]
) -> None:
    run_kept(KEPT, (family, mode), lambda: make_env(family, mode, library), next(places), method, expected, live_on)


@pytest.mark.parametrize("method", MAKING, ids=[method.id for method in MAKING])
@pytest.mark.parametrize("family", ["heads", "kinds"])
def test_a_method_in_inference_mode(family: str, method: Method, library: Callable[[str, str], Path]) -> None:
    env = make_env(family, "plain", library)
    run(env, replace(method, call=torch.inference_mode()(method.call)), expected, live_on)


def test_every_public_method_is_in_the_matrix() -> None:
    assert public_names(VeraModel) <= {method.name for method in METHODS}
    assert len({method.id for method in METHODS}) == len(METHODS)
