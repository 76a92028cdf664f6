"""Memory that runs out at any allocation of a change leaves the model as it was before, or as it is after."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from allocations import Allocations, allocations_of, check_every_allocation
from undoing import (
    TOKENS,
    merged,
    net,
    one,
    saved_at,
    saved_by_peft,
    settings,
    tuned,
    tuned_merged,
    two,
    two_others,
)
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.integrations.peft import VeratuneConfig, install

install()


@pytest.fixture(autouse=True)
def _drawn() -> Iterator[None]:
    """Keep the projections in the pool. That drawing them fails is a test in itself."""
    model = two()
    with torch.no_grad():
        model(TOKENS)
    yield
    assert model.peft_config


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "get_peft_model": (net, lambda m: get_peft_model(m, VeraConfig(**settings(bias="all")))),
    "add_adapter": (two, lambda m: m.add_adapter("three", VeraConfig(**settings(bias="all")))),
    "add_adapter while merged": (merged, lambda m: m.add_adapter("three", VeraConfig(**settings(bias="all")))),
    "merge_adapter": (two, lambda m: m.merge_adapter(["two", "one"])),
    "merge_adapter, safely": (two, lambda m: m.merge_adapter(["two"], safe_merge=True)),
    "unmerge_adapter": (merged, lambda m: m.unmerge_adapter()),
    "unload while merged": (merged, lambda m: m.unload()),
    "PEFT: get_peft_model": (net, lambda m: peft.get_peft_model(m, VeratuneConfig(**settings()))),
    "PEFT: inject_adapter_in_model": (net, lambda m: peft.inject_adapter_in_model(VeratuneConfig(**settings()), m)),
    "PEFT: add_adapter": (tuned, lambda m: m.add_adapter("three", VeratuneConfig(**settings()))),
    "PEFT: merge_adapter": (tuned, lambda m: m.merge_adapter(["one", "two"])),
    "PEFT: disable_adapter_layers": (tuned_merged, lambda m: m.base_model.disable_adapter_layers()),
    "PEFT: unmerge_adapter": (tuned_merged, lambda m: m.unmerge_adapter()),
}
# These write to no new memory.
WITHOUT: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "set_adapter": (two, lambda m: m.set_adapter("two")),
    "delete_adapter": (two, lambda m: m.delete_adapter("one")),
    "unload": (two, lambda m: m.unload()),
    "delete_adapter, the last one": (one, lambda m: m.delete_adapter("one")),
    "PEFT: delete_adapter": (tuned, lambda m: m.base_model.delete_adapter("two")),
    "PEFT: set_adapter": (tuned, lambda m: m.base_model.set_adapter("two")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_undone(change: str) -> None:
    check_every_allocation(*CHANGES[change])


@pytest.mark.parametrize("change", WITHOUT)
def test_what_makes_room_needs_none(change: str) -> None:
    """Who is out of memory can remove and choose adapters still."""
    make, act = WITHOUT[change]
    model = make()
    with Allocations() as counter:
        act(model)
    assert counter.count == 0


def test_drawing_projections_fails_like_anything_else() -> None:
    # A key that no other model has drawn.
    config = VeraConfig(r=2, target_modules=["lin"], modules_to_save=[], projection_prng_key=77)

    def one() -> VeraModel:
        model = get_peft_model(net(), config)
        with torch.no_grad():
            for parameter in model.adapter_state("default").parameters():
                parameter.fill_(0.5)
        return model

    assert check_every_allocation(one, VeraModel.merge_adapter) > 10


def test_a_load_is_undone(tmp_path: Path) -> None:
    directory = saved_at(tmp_path)
    check_every_allocation(net, lambda m: VeraModel.from_pretrained(m, directory))
    check_every_allocation(two, lambda m: m.load_adapter(directory, "three"))


def test_restoring_keeps_the_values(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    check_every_allocation(two_others, lambda m: m.restore(tmp_path))


def test_a_load_in_peft_is_undone(tmp_path: Path) -> None:
    directory = saved_by_peft(tmp_path)
    check_every_allocation(net, lambda m: peft.PeftModel.from_pretrained(m, directory))
    check_every_allocation(tuned, lambda m: m.load_adapter(directory, "three"))


def test_merging_for_good_computes_the_same_and_goes_on() -> None:
    with torch.no_grad():
        expected = two()(TOKENS)
        for at in allocations_of(two, VeraModel.merge_and_unload):
            model = two()
            with Allocations(at) as counter, suppress(MemoryError):
                model.merge_and_unload()
            assert counter.count == at or not model.peft_config
            if model.peft_config:
                torch.testing.assert_close(model(TOKENS), expected)
                model.merge_and_unload()  # the layers that were done stay so
            torch.testing.assert_close(model.base_model(TOKENS), expected)


def test_disabling_merged_adapters_computes_the_same_whatever_fails() -> None:
    """Merging again may fail at the end of the context. The adapters are then active, and not merged."""

    def change(model: VeraModel) -> None:
        with model.disable_adapter():
            pass

    with torch.no_grad():
        expected = merged()(TOKENS)
        points = allocations_of(merged, change)
        assert points
        for at in points:
            model = merged()
            with Allocations(at), suppress(MemoryError):
                change(model)
            assert model.merged_adapters in ([], ["one", "two"])
            if not model.merged_adapters:
                model.set_adapter("one")
                model.merge_adapter(["one", "two"])
            torch.testing.assert_close(model(TOKENS), expected)
