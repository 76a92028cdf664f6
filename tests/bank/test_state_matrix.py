"""Every public method of a bank, its model and its leases in every state, against float64 algebra."""

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bank_methods import BANK_METHODS, expected, live_on
from bank_states import BANK_MODES, make_bank, saved_sources
from state_matrix import WIDE, Kept, Method, never, public_names, run_kept
from veratune.adapters.wrapper import ModelWrapper
from veratune.bank import AdapterBank
from veratune.bank.model import BankModel
from veratune.bank.resident import Lease

KEPT = Kept()
_OF_FAMILIES: dict[str, tuple[str, ...]] = {
    "linear": (
        *(
            "fresh",
            "plain",
            "evicting",
            "opened",
            "leased_and_evicting",
            "in_flight_and_full",
            "in_flight_and_evicting",
        ),
        *("after_errors_in_file", "inference_mode", "autocast", "made_in_inference_mode", "offloaded"),
        *("layer_compiled", "in_training", "unloaded"),
    ),
    "heads": ("evicting", "in_flight", "after_errors"),
    "fused": ("plain",),
    "half": ("plain",),
    "quantized": ("plain",),
}
if WIDE:  # modules trained in full have no values while they are offloaded, which a bank refuses
    _OF_FAMILIES |= {family: tuple(BANK_MODES) for family in ("linear", "fused", "half", "peft")}
    _OF_FAMILIES["heads"] = tuple(mode for mode in BANK_MODES if mode != "offloaded")


def has_meaning(family: str, mode: str, variant: str) -> bool:
    if variant == "taken":
        return mode != "fresh"
    if variant == "packed":  # the other family's convolution mixes what stands side by side
        return family != "fused"
    # A model may call itself, and the base model is what remains of a bank.
    return variant != "of the base model" or not (mode == "unloaded" or mode.startswith("in_flight"))


def pairs() -> Iterator[Any]:
    for family, modes in _OF_FAMILIES.items():
        for mode, method in itertools.product(modes, BANK_METHODS):
            refused = never in method.needs and family != "linear" and mode != "plain"
            if not refused and has_meaning(family, mode, method.variant):
                yield pytest.param(family, mode, method, id=f"{family}-{mode}-{method.id}")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    return saved_sources(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module", autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    KEPT.forget()
    gc.collect()


@pytest.mark.parametrize(("family", "mode", "method"), list(pairs()))
def test_a_method_in_a_state(
    family: str, mode: str, method: Method, library: Callable[[str, str], Path], places: Iterator[Path]
) -> None:
    call, path = method.call, next(places)
    surrounded = method if method.name == "live on" else replace(method, call=lambda env: env.surrounding(env, call))
    run_kept(
        KEPT,
        (family, mode),
        lambda: make_bank(family, mode, library, next(places)),
        path,
        surrounded,
        expected,
        live_on,
    )


def test_every_public_method_is_in_the_matrix() -> None:
    public = public_names(AdapterBank, BankModel, Lease) - public_names(ModelWrapper)
    assert public <= {method.name for method in BANK_METHODS}
    assert len({method.id for method in BANK_METHODS}) == len(BANK_METHODS)
