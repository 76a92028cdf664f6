"""Every public method in every state: right by float64 algebra, or refused with everything as it was."""

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from state_matrix import Adapter, Env, Truth, is_ours, same
from state_methods import METHODS, Method, base_back, fresh, never
from state_setups import FAMILIES, STATES, adapted, make_env
from veratune import VeraModel

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
    """Adapters in files: of the same values as those in the states, and of others."""
    made: dict[tuple[str, str], Path] = {}

    def directory(family: str, which: str) -> Path:
        if (family, which) not in made:
            made[family, which] = tmp_path_factory.mktemp(f"{family}-{which}")
            adapted(FAMILIES[family], seed=0 if which == "same" else 1)[0].save_pretrained(made[family, which])
        return made[family, which]

    return directory


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directories to write to, each for one pair."""
    root = tmp_path_factory.mktemp("written")
    return (root / str(count) for count in itertools.count())


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    yield
    forget()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


# The state of the last test, while nothing has changed it.
_KEPT: dict[tuple[str, str], Env] = {}


@pytest.mark.filterwarnings(
    "ignore:veratune. merging into:UserWarning",
    "ignore:veratune. head shares its weight:UserWarning",
    "ignore:FSDP2-wrapped module:UserWarning",
)
@pytest.mark.parametrize(("family", "mode", "method"), list(pairs()))
def test_a_method_in_a_state(
    family: str, mode: str, method: Method, library: Callable[[str, str], Path], places: Iterator[Path]
) -> None:
    env = _KEPT.pop((family, mode), None)
    forget()
    if env is None:
        env = make_env(family, mode, library)
    env.path = next(places)
    try:
        unchanged = run(env, method)
    except BaseException:
        env.context.close()
        raise
    if unchanged:
        _KEPT[family, mode] = env
    else:
        env.context.close()


def forget() -> None:
    for env in _KEPT.values():
        env.context.close()
    _KEPT.clear()


def run(env: Env, method: Method) -> bool:
    """Call a method, check what came of it, and return whether the model is in the same state still."""
    before = env.last
    if not before:
        env.check()
        before = env.last = env.snapshot()
    env.before = env.truth
    unmet = [need.__name__ for need in method.needs if not need(env)] + ["kept by hooks"] * env.keeps_whole
    result: Any = None
    error: Exception | None = None
    try:
        result = method.call(env)
    except Exception as raised:
        error = raised
    if error is not None:
        assert is_ours(error), f"{type(error).__name__} that is none of ours: {error}"
        assert unmet, f"refused, though nothing speaks against it: {error}"
        same(before, env.snapshot())
        return True
    assert not {"never", "are_together"} & set(unmet), "not refused"
    env.truth = expected(env, method)
    if method.ends:
        assert not env.model.peft_config
        method.check(env, result)
        env.context.close()
        method.check(env, result)
        return False
    method.check(env, result)
    if method.name != "live on" and env.truth is env.before:
        same(before, env.snapshot())
        return True
    env.check()
    try:
        live_on(env)
    except (ValueError, RuntimeError) as refusal:
        if not (env.keeps_whole and is_ours(refusal)):
            raise
    return False


def expected(env: Env, method: Method) -> Truth:
    """Return the state that a method promises."""
    after = method.after(env.truth)
    adapters = dict(after.adapters)
    if method.name in ("add_adapter", "install_adapter"):
        adapters["new"] = fresh(env.truth, env.reference.weights())
    elif method.name == "load_adapter":
        adapters["new"] = replace(other_values(env.family)["default"], frozen=method.variant == "frozen")
    elif method.name == "restore":
        others = other_values(env.family)
        adapters = {name: replace(others[name], frozen=own.frozen) for name, own in adapters.items()}
    elif after is env.truth:
        return after
    return after.changed(adapters=adapters)


_OTHER: dict[str, dict[str, Adapter]] = {}


def other_values(family: str) -> dict[str, Adapter]:
    if family not in _OTHER:
        _OTHER[family] = adapted(FAMILIES[family], seed=1)[2].adapters
    return _OTHER[family]


def live_on(env: Env) -> None:
    """Take a model through the rest of its life: out of its context, unmerged, with each adapter, and without any."""
    env.leave()
    env.check()
    if env.truth.merged:
        env.model.unmerge_adapter()
        env.truth = env.truth.changed(merged=())
        env.check()
    for name, adapter in env.truth.adapters.items():
        env.model.set_adapter(name)
        trainable = frozenset() if adapter.frozen else frozenset({name})
        env.truth = env.truth.changed(active=(name,), trainable=trainable)
        env.check()
    base_back(env, env.model.unload())


def test_every_public_method_is_in_the_matrix() -> None:
    public = {
        name
        for cls in VeraModel.__mro__
        if cls.__module__.startswith("veratune.")
        for name in vars(cls)
        if not name.startswith("_")
    }
    assert public <= {method.name for method in METHODS}
    assert len({method.id for method in METHODS}) == len(METHODS)
