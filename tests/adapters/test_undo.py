"""Whatever interrupts a change to a model's adapters, the model is as before, or as after, and never in between."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import peft
import pytest
import torch

from allocations import PACKAGES, check_each, is_of_memory
from small_net import FIRST_LAYER, small_net
from undoing import (
    TOKENS,
    merged,
    net,
    one,
    saved_at,
    saved_by_peft,
    seen,
    settings,
    tuned,
    tuned_merged,
    two,
    two_others,
)
from veratune import CheckpointError, VeraConfig, VeraModel, get_peft_model
from veratune.integrations.peft import VeratuneConfig, install

install()

# How many of the lines of a change fail, spread over it; `make fuzz` tries every line.
_MOST_LINES = sys.maxsize if "VERATUNE_FUZZ" in os.environ else 12


class _FailingLine:
    """Raises an error at one of the lines that run in veratune or PEFT.

    Attributes:
        count: how many have run.
        firsts: when each line of the code ran for the first time.
    """

    def __init__(self, fault: type[BaseException], at: int = 0) -> None:
        self.count, self.firsts = 0, {}
        self._fault, self._at = fault, at

    firsts: dict[tuple[str, int], int]

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.count += 1
            self.firsts.setdefault((frame.f_code.co_filename, frame.f_lineno), self.count)
            if self.count == self._at:
                raise self._fault("no memory left")
        return self._line

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGES) else None

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


FAULTS = {"memory": MemoryError, "ctrl-c": KeyboardInterrupt}


def lines_of(make: Callable[[], Any], change: Callable[[Any], Any]) -> list[int]:
    """Return at which lines of a change to let it fail."""
    with _FailingLine(KeyboardInterrupt) as counter:
        change(make())
    firsts = sorted(counter.firsts.values())
    return firsts[:: max(1, len(firsts) // _MOST_LINES)]


def check_lines(make: Callable[[], Any], change: Callable[[Any], Any], fault: str) -> None:
    """Make a change fail at many lines; see `check_each`."""

    def expected(error: BaseException) -> bool:
        own = isinstance(error, MemoryError | KeyboardInterrupt | RuntimeError | CheckpointError)
        return own and (not isinstance(error, Exception) or is_of_memory(error))

    check_each(make, change, lines_of, partial(_FailingLine, FAULTS[fault]), expected)


# veratune's own models


NATIVE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "get_peft_model": (net, lambda m: get_peft_model(m, VeraConfig(**settings(bias="all")))),
    "add_adapter": (two, lambda m: m.add_adapter("three", VeraConfig(**settings(bias="all")))),
    "add_adapter while merged": (merged, lambda m: m.add_adapter("three", VeraConfig(**settings(bias="all")))),
    "set_adapter": (two, lambda m: m.set_adapter("two")),
    "delete_adapter": (two, lambda m: m.delete_adapter("one")),
    "merge_adapter": (two, lambda m: m.merge_adapter(["two", "one"])),
    "unmerge_adapter": (merged, lambda m: m.unmerge_adapter()),
    "unload": (two, lambda m: m.unload()),
    "unload while merged": (merged, lambda m: m.unload()),
    "delete_adapter, the last one": (one, lambda m: m.delete_adapter("one")),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("change", NATIVE)
def test_a_change_that_fails_is_undone(change: str, fault: str) -> None:
    check_lines(*NATIVE[change], fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_loading_that_fails_is_undone(fault: str, tmp_path: Path) -> None:
    directory = saved_at(tmp_path)
    check_lines(net, lambda m: VeraModel.from_pretrained(m, directory), fault)
    check_lines(two, lambda m: m.load_adapter(directory, "three"), fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_restoring_that_fails_keeps_the_values(fault: str, tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    check_lines(two_others, lambda m: m.restore(tmp_path), fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_merging_for_good_that_fails_computes_the_same_and_goes_on(fault: str) -> None:
    with torch.no_grad():
        expected = two()(TOKENS)
        for at in lines_of(two, VeraModel.merge_and_unload):
            model = two()
            try:
                with _FailingLine(FAULTS[fault], at):
                    model.merge_and_unload()
            except (MemoryError, KeyboardInterrupt):
                torch.testing.assert_close(model(TOKENS), expected)
                if any(layer.merged_for_good for layer in model.vera_layers().values()):
                    with pytest.raises(ValueError, match="merge_and_unload"):
                        model.unmerge_adapter()
                    with pytest.raises(ValueError, match="interrupted"):
                        model.merge_and_unload(adapter_names=["two"])
            if model.peft_config:
                model.merge_and_unload()
            torch.testing.assert_close(model.base_model(TOKENS), expected)
            assert not any("vera" in type(module).__name__.lower() for module in model.base_model.modules())


@pytest.mark.parametrize("value", [1e39, -1e39, 1e-44])
def test_a_start_that_the_vectors_cannot_hold_is_refused(value: float) -> None:
    model = net()
    before = seen(model)
    with pytest.raises(ValueError, match="d_initial"):
        get_peft_model(model, VeraConfig(**settings(d_initial=value)))
    with pytest.raises(ValueError, match="d_initial"):
        peft.get_peft_model(model, VeratuneConfig(**settings(d_initial=value)))
    assert seen(model) == before
    other = two()
    before = seen(other)
    with pytest.raises(ValueError, match="d_initial"):
        other.add_adapter("three", VeraConfig(**settings(d_initial=value)))
    assert seen(other) == before


# In PEFT


PLUGIN: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "get_peft_model": (net, lambda m: peft.get_peft_model(m, VeratuneConfig(**settings()))),
    "add_adapter": (tuned, lambda m: m.add_adapter("three", VeratuneConfig(**settings()))),
    "delete_adapter": (tuned, lambda m: m.base_model.delete_adapter("two")),
    "set_adapter": (tuned, lambda m: m.base_model.set_adapter("two")),
    "disabling": (tuned_merged, lambda m: m.base_model.disable_adapter_layers()),
    "merge_adapter": (tuned, lambda m: m.merge_adapter(["one", "two"])),
    "unmerge_adapter": (tuned_merged, lambda m: m.unmerge_adapter()),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("change", PLUGIN)
def test_a_change_in_peft_that_fails_is_undone(change: str, fault: str) -> None:
    check_lines(*PLUGIN[change], fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_loading_in_peft_that_fails_is_undone(fault: str, tmp_path: Path) -> None:
    directory = saved_by_peft(tmp_path)
    check_lines(net, lambda m: peft.PeftModel.from_pretrained(m, directory), fault)
    check_lines(tuned, lambda m: m.load_adapter(directory, "three"), fault)


def test_a_module_that_cannot_be_copied_leaves_the_model_unchanged():
    model = small_net()
    model[2].thing = (i for i in range(3))  # generators cannot be copied
    flags = [p.requires_grad for p in model.parameters()]
    types = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="generator"):
        get_peft_model(model, VeraConfig(**{**FIRST_LAYER, "modules_to_save": ["2"]}))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [type(m) for m in model.modules()] == types
    host = get_peft_model(model, VeraConfig(**FIRST_LAYER))
    with pytest.raises(TypeError, match="generator"):
        host.add_adapter("b", VeraConfig(**{**FIRST_LAYER, "modules_to_save": ["2"]}))
    assert list(host.base_model[0].entries) == list(host.peft_config) == ["default"]
