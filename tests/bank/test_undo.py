"""Memory that runs out at any allocation of a change to a bank leaves it as before or as after the change."""

import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from allocations import Allocations, check_every_allocation
from mutations import INPUT, SETTINGS, bits, net, randomised
from undoing import seen
from veratune import AdapterBank, VeraConfig, VeraModel, get_peft_model

CONFIG = VeraConfig(**SETTINGS)


def other(key: int = 0) -> VeraModel:
    model: VeraModel = randomised(get_peft_model(net(), CONFIG.replace(projection_prng_key=key)))
    return model


def seen_in(bank: AdapterBank) -> dict[str, Any]:
    """Return all that a bank answers, and whether a row or the projections of a failed change are kept."""
    with torch.no_grad():
        answers = {name: bits(bank.model(INPUT, adapters=[name] * len(INPUT))) for name in (*bank.names(), None)}
    versions = bank._registry.versions
    resident = sum(version.row is not None for version in versions.values())
    return {
        "answers": answers,
        "names": bank.names(),
        "infos": [bank.info(name) for name in bank.names()],
        "versions": sorted(versions),
        "projections": len(bank._projections.numbers()),
        "lost rows": bank.capacity - len(bank._resident.free) - resident,
        "layers": [len(getattr(module, "projections", ())) for module in bank.model.modules()],
    }


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
@pytest.mark.parametrize("change", ["add", "grow", "replace", "load"])
def test_a_change_is_undone(change: str, kept: str, tmp_path: Path) -> None:
    model, new = other(), other(7)
    new.save_pretrained(tmp_path / "adapter")
    count = itertools.count()

    def make() -> AdapterBank:
        file = tmp_path / f"bank{next(count)}" if kept == "in a file" else None
        bank = AdapterBank(net(), CONFIG, capacity=1 if change == "grow" else 2, file=file)
        bank.add("anna", model)
        return bank

    if change == "load":
        check_every_allocation(make, lambda bank: bank.load("new", tmp_path / "adapter"), seen_in)
    else:
        replace = change == "replace"
        name = "anna" if replace else "new"
        check_every_allocation(make, lambda bank: bank.add(name, new, replace=replace), seen_in)


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
def test_removing_needs_no_memory(kept: str, tmp_path: Path) -> None:
    bank = AdapterBank(net(), CONFIG, capacity=2, file=tmp_path / "bank" if kept == "in a file" else None)
    bank.add("anna", other())
    bank.add("bert", other(7))
    before = seen_in(bank)
    with Allocations() as counter:
        bank.remove("bert")
    assert counter.count == 0
    bank.add("bert", other(7))
    after = seen_in(bank)
    assert {key: value for key, value in after.items() if key != "infos"} == {
        key: value for key, value in before.items() if key != "infos"
    }


def test_following_a_file_that_others_change_is_undone(tmp_path: Path) -> None:
    count = itertools.count()

    def make() -> AdapterBank:
        file = tmp_path / f"bank{next(count)}"
        bank = AdapterBank(net(), CONFIG, capacity=2, file=file)
        bank.add("anna", other())
        with torch.no_grad():
            bank.model(INPUT, adapters=["anna"] * len(INPUT))
        second = AdapterBank.open(net(), file, capacity=2)
        second.add("anna", other(7), replace=True)
        second.add("bert", other(9))
        return bank

    for at in range(1, 40):
        bank = make()
        with Allocations(at) as counter, suppress(MemoryError):
            bank.refresh()
        bank.refresh()
        expected = make()
        expected.refresh()
        assert seen_in(bank)["answers"] == seen_in(expected)["answers"]
        if counter.count < at:
            break
    else:
        pytest.fail("refresh allocates more than that")


def test_making_a_bank_leaves_the_model_as_it_was() -> None:
    check_every_allocation(net, lambda model: AdapterBank(model, CONFIG), seen)


@pytest.mark.parametrize("step", ["RowMaker", "load_calibration", "BankModel"])
def test_a_bank_that_fails_when_its_layers_are_in_takes_them_out(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no memory left")

    model = net()
    before = seen(model)
    with monkeypatch.context() as patched:
        patched.setattr(f"veratune.bank.bank.{step}", fail)
        with pytest.raises(MemoryError):
            AdapterBank(model, CONFIG)
    assert seen(model) == before
    bank = AdapterBank(model, CONFIG)
    bank.add("anna", other())
    assert bank.names() == ["anna"]
