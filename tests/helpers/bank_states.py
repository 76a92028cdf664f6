"""The states of the matrix for banks, and the account of them."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from state_matrix import Env, bits, snapshot
from state_setups import FAMILIES, MODES, Family, adapted, original_of, tiny
from state_truth import IDS, Adapter, Reference, Truth, close, number
from veratune import VeraConfig, VeraModel
from veratune.bank import AdapterBank, BankError
from veratune.bank.store import BankStore

_FUSED = {"target_modules": ["up", "down", "transposed", "fused"], "fused_parts": {"fused": 2}}
BANK_FAMILIES = {
    **{name: FAMILIES[name] for name in ("linear", "heads", "peft", "half", "quantized")},
    "fused": Family(partial(tiny, kinds=True), _FUSED),
}
# What a bank's adapters are called, by what the model has that they come from: seed and adapter.
SOURCES = {"anna": (0, "default"), "bert": (0, "other"), "carl": (1, "default"), "new": (1, "other")}


@dataclass(frozen=True, eq=False)
class BankTruth:
    """The account of a bank's state.

    Attributes:
        adapters: name to adapter, in order.
        is_open: whether it was not unloaded.
    """

    adapters: dict[str, Adapter]
    is_open: bool = True

    def left(self) -> "BankTruth":
        return self

    def changed(self, **values: Any) -> "BankTruth":
        return replace(self, **values)

    def with_(self, name: str, source: Adapter) -> "BankTruth":
        return self.changed(adapters={**{own: a for own, a in self.adapters.items() if own != name}, name: source})

    def without(self, name: str) -> "BankTruth":
        return self.changed(adapters={own: adapter for own, adapter in self.adapters.items() if own != name})


@cache
def source(family: str, seed: int) -> tuple[VeraModel, dict[str, Adapter]]:
    """Return a model with adapters to copy into banks, and what they have learned."""
    own = BANK_FAMILIES[family]
    model, _, truth = adapted(own, seed)
    return model, truth.adapters


def learned(family: str, name: str) -> Adapter:
    seed, adapter = SOURCES[name]
    return source(family, seed)[1][adapter]


def saved_sources(root: Path) -> Callable[[str, str], Path]:
    """Return where a family's adapters are saved: "same" has the values of seed 0, "else" those of seed 1."""

    @cache
    def directory(family: str, which: str) -> Path:
        source(family, 0 if which == "same" else 1)[0].save_pretrained(root / family / which)
        return root / family / which

    return directory


@dataclass
class BankEnv(Env):
    """A bank in some state.

    Attributes:
        bank: the bank.
        file: its file, if it has one.
        surrounding: what surrounds a method's call.
        lease: one that is held, if any.
        known: the outputs of adapters in float64, which take longer than most methods.
    """

    bank: Any = None
    file: Path | None = None
    surrounding: Callable[["BankEnv", Callable[[Any], Any]], Any] = lambda env, call: call(env)
    lease: Any = None
    known: dict[Adapter | None, Tensor] = field(default_factory=dict)

    @property
    def keeps_whole(self) -> bool:
        return False

    def add(self, name: str, source_name: str | None = None, **settings: Any) -> Any:
        seed, adapter = SOURCES[source_name or name]
        return self.bank.add(name, source(self.family, seed)[0], adapter, **settings)

    def saved(self, name: str) -> Path:
        """Return the directory of an adapter."""
        seed, adapter = SOURCES[name]
        place = self.library("same" if seed == 0 else "else")
        return place if adapter == "default" else place / adapter

    def expected(self, names: list[str | None], adapters: dict[str, Adapter] | None = None) -> Tensor:
        """Return the outputs of rows that have these adapters, in float64."""
        told: dict[str | None, Adapter] = dict(self.truth.adapters if adapters is None else adapters)
        return torch.stack([self._outputs(told.get(name))[row] for row, name in enumerate(names)])

    def _outputs(self, adapter: Adapter | None) -> Tensor:
        if adapter not in self.known:
            truth = Truth({} if adapter is None else {"": adapter})
            self.known[adapter] = self.reference.outputs(truth, truth.adapters)
        return self.known[adapter]

    def rows(self, *names: str | None, lease: Any = None) -> Tensor:
        with torch.no_grad():
            return number(self.bank.model(IDS, adapters=list(names) if lease is None else lease))

    def close(self, what: str, actual: Tensor, expected: Tensor) -> None:
        rounding = 5e-2 if torch.is_autocast_enabled("cpu") else 0.0
        close(what, actual, expected, max(self.tolerance, rounding))

    def batches(self) -> list[list[str | None]]:
        names = list(self.truth.adapters)
        return [[None, None], *([name, None] for name in names), *zip(names[1:], names, strict=False)]

    def check(self) -> None:
        """Compare all that the bank computes and says of itself with the account of its state."""
        if not self.truth.is_open:
            with torch.no_grad():
                close("outputs of the base model", self.model(IDS), self.reference.outputs(Truth({}), ()), 2e-5)
            with pytest.raises(BankError, match="unloaded"):
                self.bank.model(IDS, adapters=[None, None])
            return
        assert self.bank.names() == list(self.truth.adapters) and len(self.bank) == len(self.truth.adapters)
        for name, adapter in self.truth.adapters.items():
            info = self.bank.info(name)
            assert name in self.bank and info.name == name
            assert info.rank == max(d.shape[-1] for _, d in adapter.vectors.values())
        for batch in self.batches():
            self.close(f"rows of {batch}", self.rows(*batch), self.expected(batch))
        if self.file is not None:
            held = BankStore(self.file)
            assert held.names == {name: self.bank.info(name).digest for name in self.truth.adapters}
            held.close()

    def snapshot(self) -> dict[str, Any]:
        """Return all that a refused call must leave as it was; which rows are resident is the bank's affair."""
        if not self.truth.is_open:
            return snapshot(self.model)
        infos = {name: replace(self.bank.info(name), resident=False) for name in self.bank.names()}
        rows = {str(batch): bits(self.rows(*batch)) for batch in self.batches()[:2]}
        leases = {own.digest: own.leases for own in self.bank._registry.versions.values()}
        held = {} if self.file is None else {"bytes": self.file.read_bytes()}
        return {**snapshot(self.model), "infos": infos, "rows": rows, "leases": leases, "file": held}

    def leave(self) -> None:
        super().leave()
        self.lease = None


def bank_config(family: str, **settings: Any) -> VeraConfig:
    own = {"r": 3, "target_modules": ["up", "down"], "modules_to_save": []}
    projection = {"projection": BANK_FAMILIES[family].settings.get("projection", "per_dimension")}
    return VeraConfig(**{**own, **BANK_FAMILIES[family].settings, **projection, **settings})


def make_bank(family: str, mode: str, library: Callable[[str, str], Path], place: Path) -> BankEnv:
    """Return a bank in a state.

    Args:
        family: the base model and its adapters.
        mode: what is done to it.
        library: where adapters are saved.
        place: a directory for its file.
    """
    own, state = BANK_FAMILIES[family], BANK_MODES[mode]
    base = own.make()
    original = original_of(base)
    reference = Reference(own.reference(base).eval(), own.rounding)
    env = BankEnv(family, mode, base, reference, BankTruth({}), partial(library, family))  # type: ignore[arg-type]
    env.tolerance, env.traits, env.original = own.tolerance, own.traits | state.traits, original
    if family == "quantized":  # bitsandbytes computes with half-precision numbers in evaluation on a CPU
        env.tolerance = 5e-3
    env.context = ExitStack()
    if state.before is not None:
        inside = copy.copy(env)
        inside.model = _Whole(base)
        MODES[state.before][0](inside)
        env.model = base = inside.model.base_model
    place.mkdir(parents=True, exist_ok=True)
    env.file = place / "bank" if state.in_file else None
    with state.made_within():
        env.bank = AdapterBank(base, bank_config(family), capacity=state.capacity, file=env.file)
        for name in state.names:
            env.add(name)
            env.truth = env.truth.with_(name, learned(family, name))
    state.change(env)
    env.surrounding = state.surrounding
    return env


class _Whole:
    """A base model as the modes of `VeraModel`'s matrix that wrap modules look at it."""

    def __init__(self, model: nn.Module) -> None:
        self.base_model: Any = model

    def gradient_checkpointing_enable(self) -> None:
        self.base_model.gradient_checkpointing_enable()


def leased(env: BankEnv) -> None:
    env.lease = env.context.enter_context(env.bank.lease(["anna", None]))


def after_errors(env: BankEnv) -> None:
    """Let adding, serving, loading and leasing fail, at their beginning and in their midst."""

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    for call in (
        lambda: env.bank.load("new", env.path / "nowhere"),
        lambda: env.bank.add("anna", source(env.family, 1)[0], "other"),
        lambda: env.bank.model(IDS, adapters=["anna"] * 3),
        lambda: env.bank.model(IDS, adapters=["anna", "none"]),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            call()
    handle = env.model.block.down.register_forward_pre_hook(broken)
    with suppress(KeyboardInterrupt):
        env.bank.model(IDS, adapters=["anna", "bert"])
    handle.remove()
    with pytest.MonkeyPatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(env.bank._resident, "put", broken)
        env.add("new")
    if env.file is not None:  # which has it: only making it resident failed
        env.truth = env.truth.with_("new", learned(env.family, "new"))


def opened(env: BankEnv) -> None:
    env.model = env.bank.unload()
    env.bank = AdapterBank.open(env.model, env.file, capacity=2)


def compiled(env: BankEnv) -> None:
    env.context.enter_context(torch.compiler.set_stance("force_eager"))
    env.bank.compile(backend="eager")


def in_training(env: BankEnv) -> None:
    env.bank.model.train()


def unloaded(env: BankEnv) -> None:
    env.model = env.bank.unload()
    env.truth = env.truth.changed(is_open=False)


def in_flight(env: BankEnv, call: Callable[[Any], Any]) -> Any:
    """Call a method in the midst of a call of the model, which has to compute with what it began with."""
    found: dict[str, Any] = {}

    def called(*_: Any) -> None:
        handle.remove()
        try:
            found["result"] = call(env)
        except Exception as error:
            found["error"] = error

    handle = env.model.block.up.register_forward_pre_hook(called)
    env.close("the rows in flight", env.rows("anna", "bert"), env.expected(["anna", "bert"], env.before.adapters))
    if "error" in found:
        raise found["error"]
    return found["result"]


def surrounded(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[BankEnv, Callable[[Any], Any]], Any]:
    def within(env: BankEnv, call: Callable[[Any], Any]) -> Any:
        with context():
            return call(env)

    return within


@dataclass(frozen=True)
class BankMode:
    """How a state is made.

    Attributes:
        change: what is done to the bank when it has its adapters.
        names: its adapters.
        capacity: for how many it has room.
        in_file: whether it has a file.
        before: what is done to the base model first, as in the matrix of `VeraModel`.
        surrounding: what surrounds a method's call.
        made_within: what the bank is made in.
        traits: what a method's needs look at.
    """

    change: Callable[[BankEnv], None] = lambda env: None
    names: tuple[str, ...] = ("anna", "bert", "carl")
    capacity: int = 8
    in_file: bool = False
    before: str | None = None
    surrounding: Callable[[BankEnv, Callable[[Any], Any]], Any] = lambda env, call: call(env)
    made_within: Callable[[], AbstractContextManager[Any]] = ExitStack
    traits: frozenset[str] = field(default_factory=frozenset)


BANK_MODES = {
    "fresh": BankMode(names=()),
    "plain": BankMode(),
    "full": BankMode(capacity=3),
    "file": BankMode(in_file=True),
    "evicting": BankMode(capacity=2, in_file=True),
    "opened": BankMode(opened, in_file=True),
    "leased": BankMode(leased, traits=frozenset({"busy"})),
    "leased_and_evicting": BankMode(leased, capacity=3, in_file=True, traits=frozenset({"busy"})),
    "in_flight": BankMode(surrounding=in_flight, traits=frozenset({"busy"})),
    "in_flight_and_full": BankMode(surrounding=in_flight, capacity=3, traits=frozenset({"busy"})),
    "in_flight_and_evicting": BankMode(surrounding=in_flight, capacity=3, in_file=True, traits=frozenset({"busy"})),
    "after_errors": BankMode(after_errors),
    "after_errors_in_file": BankMode(after_errors, in_file=True, capacity=4),
    "no_grad": BankMode(surrounding=surrounded(torch.no_grad)),
    "inference_mode": BankMode(surrounding=surrounded(torch.inference_mode), capacity=3),
    "autocast": BankMode(surrounding=surrounded(lambda: torch.autocast("cpu", torch.bfloat16))),
    "made_in_inference_mode": BankMode(made_within=torch.inference_mode, capacity=3),
    "offloaded": BankMode(before="offloaded", traits=frozenset({"offloaded"})),
    "checkpoint_wrapped": BankMode(before="checkpoint_wrapped"),
    "in_data_parallel": BankMode(before="in_data_parallel"),
    "layer_compiled": BankMode(before="compiled"),
    "compiled": BankMode(compiled),
    "in_training": BankMode(in_training),
    "unloaded": BankMode(unloaded, traits=frozenset({"unloaded"})),
}
