"""Every public method of a `PeftModel` with veratune's layers in every state, against float64 algebra."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch.distributed as dist
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from state_matrix import WIDE, Kept, Method, never, public_names, run_kept
from tuned_methods import NOT_OURS, TUNED_METHODS, expected, live_on
from tuned_states import TUNED_MODES, make_tuned, saved_by_peft
from veratune.integrations.peft import VeratuneTuner, install

KEPT = Kept()
_OF_FAMILIES: dict[str, tuple[str, ...]] = {
    "linear": (
        *("plain", "several", "merged", "merged_other", "disabled", "disabled_while_merged", "frozen"),
        *("for_inference", "offloaded", "compiled", "sharded"),
    ),
    "heads": ("plain", "disabled_while_merged", "offloaded"),
    "kinds": ("disabled_while_merged",),
    "half": ("plain",),
    "vera": ("merged",),
}
if WIDE:
    alone = tuple(mode for mode in TUNED_MODES if mode not in ("several", "merged_both", "merged_other"))
    _OF_FAMILIES = {family: alone if family in ("heads", "half") else tuple(TUNED_MODES) for family in _OF_FAMILIES}
STATES = [(family, mode) for family, modes in _OF_FAMILIES.items() for mode in modes]


def pairs() -> Iterator[Any]:
    for family, mode in STATES:
        for method in TUNED_METHODS:
            if never not in method.needs or family == "linear" or mode == "plain":
                yield pytest.param(family, mode, method, id=f"{family}-{mode}-{method.id}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    return saved_by_peft(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module", autouse=True)
def _installed() -> Iterator[None]:
    install()
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    install(replace_vera=True)
    yield
    PEFT_TYPE_TO_TUNER_MAPPING.update(before)
    KEPT.forget()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "mode", "method"), list(pairs()))
def test_a_method_in_a_state(
    family: str, mode: str, method: Method, library: Callable[[str, str], Path], places: Iterator[Path]
) -> None:
    run_kept(KEPT, (family, mode), lambda: make_tuned(family, mode, library), next(places), method, expected, live_on)


def test_every_public_method_is_in_the_matrix() -> None:
    public = public_names(peft.PeftModel, VeratuneTuner, of=("peft.", "veratune."))
    assert public - NOT_OURS <= {method.name for method in TUNED_METHODS}
    assert len({method.id for method in TUNED_METHODS}) == len(TUNED_METHODS)
