"""The methods of banks, of their models and of leases for the state matrix."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bank_states import BANK_FAMILIES, BankEnv, BankTruth, learned, source
from state_matrix import Method, bits, flags, never
from state_methods import unwrapped
from state_truth import IDS, Truth, close, number
from veratune import VeraConfig, get_peft_model
from veratune.bank import AdapterBank
from veratune.bank.layer_call import serving


def is_open(env: BankEnv) -> bool:
    return env.truth.is_open


def idle(env: BankEnv) -> bool:
    return "busy" not in env.traits


def has(*names: str) -> Callable[[BankEnv], bool]:
    return lambda env: env.truth.is_open and {*names} <= env.truth.adapters.keys()


def has_not(name: str) -> Callable[[BankEnv], bool]:
    return lambda env: name not in env.truth.adapters


def has_room(count: int) -> Callable[[BankEnv], bool]:
    """Return whether so many adapters more than those in use can be resident."""

    def is_room(env: BankEnv) -> bool:
        return env.file is None or env.bank._resident.capacity - (1 if env.lease is not None else 0) >= count

    return is_room


def puts(name: str, source_name: str | None = None) -> Callable[[BankEnv, BankTruth], BankTruth]:
    return lambda env, truth: truth.with_(name, learned(env.family, source_name or name))


def expected(env: BankEnv, method: Method) -> BankTruth:
    """Return the state that a method promises."""
    after: Any = method.after
    return env.truth if method.after is Method.after else after(env, env.truth)


def live_on(env: BankEnv) -> None:
    """Take a bank through the rest of its life: its context left, an adapter replaced, all removed, and unloaded."""
    env.leave()
    if not env.truth.is_open:
        return
    for name in list(env.truth.adapters):
        env.bank.remove(name)
        env.truth = env.truth.without(name)
    env.add("again", "anna")
    env.truth = env.truth.with_("again", learned(env.family, "anna"))
    env.check()
    base_back(env, env.bank.unload())


def base_back(env: BankEnv, result: nn.Module) -> None:
    """Check that a model is what it was before the bank, to the bit."""
    with torch.no_grad():
        close("outputs of the base model", result(IDS), env.reference.outputs(Truth({}), ()), env.tolerance)
    if unwrapped(env) and not {"offloaded", "quantized"} & env.traits:  # bitsandbytes packs codes in evaluation
        found = dict(result.named_parameters())
        assert [name for name, _ in result.named_modules()] == env.original["names"]
        assert flags(result) == env.original["flags"]
        assert all(bits(found[name]) == bits(value) for name, value in env.original["bits"].items())


def head_bytes(env: BankEnv) -> int:
    return int(env.bank.layout.saved_numbers) * (2 if env.family == "half" else 4)


# Calls, and what they give back


def equal(expected: Callable[[BankTruth], Any]) -> Callable[[BankEnv, Any], None]:
    def check(env: BankEnv, result: Any) -> None:
        assert not env.truth.is_open or result == expected(env.truth)

    return check


def row_of(*names: str | None) -> Callable[[BankEnv, Any], None]:
    def check(env: BankEnv, result: Any) -> None:
        rounded = 5e-2 if env.mode == "autocast" else 0.0
        close(f"rows of {names}", result, env.expected(list(names)), max(env.tolerance, rounded))

    return check


def with_lease(env: BankEnv) -> Tensor:
    with env.bank.lease(["anna", None]) as lease:
        return env.rows(lease=lease)


def with_versions(env: BankEnv) -> Tensor:
    with env.bank.lease(["anna", None]) as first, env.bank.lease_versions([first.versions[0], None]) as lease:
        first.release()
        return env.rows(lease=lease)


def with_another(env: BankEnv) -> Tensor:
    with env.bank.lease(["anna", None]) as first, env.bank.lease_again(first) as lease:
        first.release()
        return env.rows(lease=lease)


def with_released(env: BankEnv) -> Any:
    lease = env.bank.lease([None, None])
    lease.release()
    lease.release()
    assert not lease.is_open and lease.is_of(env.bank._resident)
    return env.bank.lease_again(lease)


def by_call(env: BankEnv) -> Tensor:
    with env.bank.lease(["anna", None]) as lease, serving(env.bank.call_of(lease)), torch.no_grad():
        return number(env.bank.model.base_model(IDS))


def packed(env: BankEnv) -> Tensor:
    """Serve both rows as one, behind each other."""
    with torch.no_grad():
        flat = env.bank.model(IDS.view(1, -1), adapters=["anna", None], adapter_lengths=[5, 5])
    return number(flat).view(2, 5, -1)


def generated(env: BankEnv) -> Tensor:
    with torch.no_grad():
        ids: Tensor = env.bank.model.generate(IDS, adapters=["anna", None])
    return ids


def is_next(env: BankEnv, ids: Tensor) -> None:
    if env.mode != "autocast":
        assert torch.equal(ids[:, -1], env.expected(["anna", None])[:, -1].argmax(-1))


def of_another_rank(env: BankEnv) -> Any:
    base = BANK_FAMILIES[env.family].make()
    settings = {**BANK_FAMILIES[env.family].settings, "modules_to_save": []}
    config = VeraConfig(**{"target_modules": ["up", "down"], **settings, "r": 9})
    return env.bank.add("new", get_peft_model(base, config))


def made_of_directories(env: BankEnv) -> Any:
    base = BANK_FAMILIES[env.family].make()
    return AdapterBank.for_adapters(base, {"anna": env.saved("anna"), "carl": env.saved("carl")})


def opened(env: BankEnv) -> Any:
    """Make another bank of the file, as another process would."""
    return None if env.file is None else AdapterBank.open(BANK_FAMILIES[env.family].make(), env.file, capacity=2)


def serves(*names: str) -> Callable[[BankEnv, Any], None]:
    def check(env: BankEnv, bank: Any) -> None:
        if bank is None:
            return
        adapters = {name: learned(env.family, name) for name in names} or env.truth.adapters
        assert bank.names() == list(adapters)
        for name in adapters:
            with torch.no_grad():
                rows = bank.model(IDS, adapters=[name, None])
            close(f"rows of another bank's {name}", rows, env.expected([name, None], adapters), env.tolerance)
        bank.unload()

    return check


def serves_eagerly(env: BankEnv, _: Any) -> None:
    """Check a bank that was compiled without compiling anything, which other tests do."""
    with torch.compiler.set_stance("force_eager"):
        env.check()


def methods() -> list[Method]:
    """Return all ways of calling the public methods of a bank, its model and its leases."""

    def refused(name: str, variant: str, call: Callable[[BankEnv], Any]) -> Method:
        return Method(name, call, (never,), variant=variant)

    def changing(name: str, call: Callable[[BankEnv], Any], needs: Any, after: Any, variant: str = "") -> Method:
        return Method(name, call, needs, after, variant=variant)

    def gone(name: str) -> Any:
        return lambda env, truth: truth.without(name)

    one, two = has_room(1), has_room(2)
    return [
        Method("names", lambda env: env.bank.names(), check=equal(lambda truth: list(truth.adapters))),
        Method("__len__", lambda env: len(env.bank), check=equal(lambda truth: len(truth.adapters))),
        Method("__contains__", lambda env: ("anna" in env.bank, "none" in env.bank, 3 in env.bank),
               check=equal(lambda truth: ("anna" in truth.adapters, False, False))),
        Method("__repr__", lambda env: repr(env.bank), check=lambda env, text: equal(lambda truth: True)(
            env, text.startswith(f"AdapterBank({len(env.truth.adapters)} adapters of "))),
        Method("info", lambda env: env.bank.info("anna").fingerprint, (has("anna"),), check=lambda env, found: equal(
            lambda _: source(env.family, 0)[0].projection_scheme("default").fingerprint())(env, found)),
        refused("info", "unknown", lambda env: env.bank.info("none")),
        Method("capacity", lambda env: env.bank.capacity >= len(env.truth.adapters) or env.file is not None,
               check=equal(lambda _: True)),
        Method("nbytes", lambda env: env.bank.nbytes, check=lambda env, size: equal(lambda _: size)(
            env, (env.bank.capacity + 1) * (4 * env.bank.layout.numbers + head_bytes(env)))),
        changing("add", lambda env: env.add("new"), (is_open, has_not("new")), puts("new")),
        changing("add", lambda env: env.add("anna", "new", replace=True), (has("anna"),), puts("anna", "new"),
                 "replace"),
        changing("add", lambda env: env.add("twin", "anna"), (is_open,), puts("twin", "anna"), "equal values"),
        refused("add", "taken", lambda env: env.add("anna", "new")),
        refused("add", "unknown", lambda env: env.add("none", "new", replace=True)),
        refused("add", "bad name", lambda env: env.add("a\nb", "new")),
        refused("add", "of another rank", of_another_rank),
        changing("load", lambda env: env.bank.load("new", env.saved("new")), (is_open, has_not("new")), puts("new")),
        changing("load", lambda env: env.bank.load("anna", env.saved("new"), replace=True), (has("anna"),),
                 puts("anna", "new"), "replace"),
        refused("load", "missing", lambda env: env.bank.load("new", env.path / "nowhere")),
        Method("check", lambda env: env.bank.check(env.saved("new"))),
        refused("check", "missing", lambda env: env.bank.check(env.path / "nowhere")),
        changing("remove", lambda env: env.bank.remove("anna"), (has("anna"),), gone("anna")),
        refused("remove", "unknown", lambda env: env.bank.remove("none")),
        Method("refresh", lambda env: env.bank.refresh()),
        Method("lease", with_lease, (has("anna"), one), check=row_of("anna", None)),
        refused("lease", "unknown", lambda env: env.bank.lease(["none"])),
        refused("lease", "text", lambda env: env.bank.lease("anna")),
        Method("lease_versions", with_versions, (has("anna"), one), check=row_of("anna", None)),
        Method("lease_again", with_another, (has("anna"), one), check=row_of("anna", None)),
        refused("lease_again", "released", with_released),
        refused("release", "twice", with_released),
        refused("is_of", "released", with_released),
        Method("call_of", by_call, (has("anna"), one), check=row_of("anna", None)),
        Method("check_isolation", lambda env: env.bank.check_isolation(ids=IDS), (is_open,)),
        Method("compile", lambda env: env.bank.compile(backend="eager"), (is_open,), check=serves_eagerly, ends=True),
        Method("follow_model", lambda env: env.bank.follow_model()),
        Method("for_adapters", made_of_directories, check=serves("anna", "carl")),
        refused("for_adapters", "served already", lambda env: AdapterBank.for_adapters(
            env.bank.model.base_model, {"anna": env.saved("anna"), "none": env.path / "nowhere"})),
        Method("open", opened, check=serves()),
        refused("open", "missing", lambda env: AdapterBank.open(env.bank.model.base_model, env.path / "nowhere")),
        Method("forward", lambda env: env.rows("anna", None), (has("anna"), one), check=row_of("anna", None)),
        Method("forward", lambda env: env.rows("anna", "bert"), (has("anna", "bert"), two),
               check=row_of("anna", "bert"), variant="both"),
        Method("forward", lambda env: env.rows(None, None), (is_open,), check=row_of(None, None), variant="base"),
        Method("forward", packed, (has("anna"), one), check=row_of("anna", None), variant="packed"),
        refused("forward", "three names", lambda env: env.rows(None, None, None)),
        refused("forward", "unknown", lambda env: env.rows("none", None)),
        refused("forward", "of the base model", lambda env: env.bank.model.base_model(IDS)),
        Method("generate", generated, (has("anna"), one), check=is_next),
        refused("save_pretrained", "", lambda env: env.bank.model.save_pretrained(env.path)),
        refused("copy.deepcopy", "", lambda env: copy.deepcopy(env.bank)),
        refused("pickle", "", lambda env: pickle.dumps(env.bank.model)),
        Method("unload", lambda env: env.bank.unload(), (idle, is_open), check=base_back, ends=True),
        Method("live on", lambda env: None),
    ]  # fmt: skip


BANK_METHODS = methods()
