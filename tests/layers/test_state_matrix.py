"""Every public method of adapted layers of every kind, called on the layers of a model in every state."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from layer_methods import METHODS, run_all
from state_matrix import Env, public_names, same, snapshot
from state_setups import STATES, make_env, saved_adapters
from veratune.layers import VeraParameter
from veratune.layers.registry import LAYER_KINDS

# What computes with sharded weights is called by their owner, which gathers them.
STATES_OF_LAYERS = [
    (family, mode)
    for family, mode in STATES
    if mode != "sharded" and (family in ("linear", "kinds") or mode in ("plain", "merged"))
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    return saved_adapters(tmp_path_factory.mktemp("saved"))


pytestmark = pytest.mark.filterwarnings(
    "ignore:veratune. merging into:UserWarning", "ignore:veratune. head shares its weight:UserWarning"
)
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def check_all(env: Env, context: Callable[[], AbstractContextManager[Any]]) -> None:
    env.check()
    before, wrong = snapshot(env.model), []
    for method in METHODS:
        if method.variant == "merged" and not env.truth.merged:
            continue
        try:
            with context():
                run_all(env, method)
            same(before, snapshot(env.model))
        except Exception as error:
            wrong.append(f"{method.id}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    env.check()


@pytest.mark.parametrize(("family", "mode"), STATES_OF_LAYERS, ids=map("-".join, STATES_OF_LAYERS))
def test_layers_in_a_state(family: str, mode: str, library: Callable[[str, str], Path]) -> None:
    env = make_env(family, mode, library)
    with env.context:
        check_all(env, nullcontext)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("family", "mode"), [("kinds", "plain"), ("quantized", "merged")])
def test_layers_in_a_context(family: str, mode: str, context: str, library: Callable[[str, str], Path]) -> None:
    env = make_env(family, mode, library)
    with env.context:
        check_all(env, CONTEXTS[context])


def test_every_public_method_is_in_the_matrix() -> None:
    assert public_names(*LAYER_KINDS, VeraParameter) <= {method.name for method in METHODS}
