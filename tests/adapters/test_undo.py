"""Whatever interrupts a change to a model's adapters, the model is as before, or as after, and never in between."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import peft
import pytest
import torch
from torch.overrides import TorchFunctionMode

import veratune
from reference import randomise
from small_net import FIRST_LAYER, small_net
from undoing import TOKENS, merged, net, seen, settings, tuned, tuned_merged, two
from veratune import CheckpointError, VeraConfig, VeraModel, get_peft_model
from veratune.integrations.peft import VeratuneConfig, install

install()

_PACKAGES = (str(Path(veratune.__file__).parent), str(Path(peft.__file__).parent))
_MOST_TRIALS = 10  # faults in each change, spread over its length


class _FailingOperation(TorchFunctionMode):
    """Runs out of memory at one of torch's operations."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise MemoryError("no memory left")
        return func(*args, **(kwargs or {}))


class _Interrupt:
    """Presses Ctrl-C at one of the lines that run in veratune or PEFT."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._line

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_PACKAGES) else None

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


Fault = Callable[[int], Any]
FAULTS: dict[str, Fault] = {"memory": _FailingOperation, "ctrl-c": _Interrupt}


def check_undone(make: Callable[[], Any], change: Callable[[Any], Any], fault: Fault) -> int:
    """Let a change fail at many points, and compare what is left with what was there and with what should become."""
    model = make()
    old = seen(model)
    assert seen(make()) == old
    change(model)  # once without counting, for what is made on first use
    model = make()
    with fault(0) as counter:
        change(model)
    new, total = seen(model), counter.count
    assert new != old and total > 0
    failed = 0
    for at in range(1, total + 1, max(1, total // _MOST_TRIALS)):
        model = make()
        try:
            with fault(at):
                change(model)
        except (MemoryError, KeyboardInterrupt, RuntimeError, CheckpointError) as error:
            # torch's load_state_dict makes an error of its own of what it meets, and so does the reader of a file.
            if isinstance(error, RuntimeError) and "no memory left" not in str(error):
                raise
            if isinstance(error, CheckpointError) and "does not fit into memory" not in str(error):
                raise
            # An interrupt inside torch's own no_grad leaves gradients off.
            torch.set_grad_enabled(True)
            failed += 1
            left = seen(model)
            if left == old:
                change(model)
                left = seen(model)
            assert left == new, at
    assert failed
    return failed


# veratune's own models


def saved_at(path: Path) -> Path:
    model = get_peft_model(net(), VeraConfig(**settings(bias="all")))
    torch.manual_seed(6)
    randomise(model, 0.3)
    model.save_pretrained(path)
    return path


def seeded(change: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> None:
        torch.manual_seed(9)
        change(*args)

    return run


NATIVE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "get_peft_model": (net, lambda m: get_peft_model(m, VeraConfig(**settings(bias="all")))),
    "add_adapter": (two, lambda m: m.add_adapter("three", VeraConfig(**settings(bias="all")))),
    "add_adapter while merged": (merged, lambda m: m.add_adapter("three", VeraConfig(**settings(bias="all")))),
    "set_adapter": (two, lambda m: m.set_adapter("two")),
    "delete_adapter": (two, lambda m: m.delete_adapter("one")),
    "merge_adapter": (two, lambda m: m.merge_adapter(["two", "one"])),
    "unmerge_adapter": (merged, lambda m: m.unmerge_adapter()),
    "unload": (two, lambda m: m.unload()),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("change", NATIVE)
def test_a_change_that_fails_is_undone(change: str, fault: str) -> None:
    check_undone(*NATIVE[change], FAULTS[fault])


@pytest.mark.parametrize("fault", FAULTS)
def test_loading_that_fails_is_undone(fault: str, tmp_path: Path) -> None:
    directory = saved_at(tmp_path)
    check_undone(net, lambda m: VeraModel.from_pretrained(m, directory), FAULTS[fault])
    check_undone(two, lambda m: m.load_adapter(directory, "three"), FAULTS[fault])


@pytest.mark.parametrize("fault", FAULTS)
def test_restoring_that_fails_keeps_the_values(fault: str, tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)

    def other() -> VeraModel:
        model = two()
        torch.manual_seed(8)
        with torch.no_grad():
            for name in model.peft_config:
                for parameter in model.adapter_state(name).parameters():
                    parameter.normal_()
        return model

    check_undone(other, lambda m: m.restore(tmp_path), FAULTS[fault])


@pytest.mark.parametrize("fault", FAULTS)
def test_merging_for_good_that_fails_computes_the_same_and_goes_on(fault: str) -> None:
    with torch.no_grad():
        expected = two()(TOKENS)
        counter = FAULTS[fault](0)
        model = two()
        with counter:
            model.merge_and_unload()
        for at in range(1, counter.count + 1, max(1, counter.count // _MOST_TRIALS)):
            model = two()
            try:
                with FAULTS[fault](at):
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
def test_a_start_that_the_vectors_cannot_hold_is_refused(value: float, tmp_path: Path) -> None:
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
    tuned().save_pretrained(tmp_path)
    file = tmp_path / "two" / "adapter_config.json"
    file.write_text(file.read_text().replace('"d_initial": 0.1', f'"d_initial": {value!r}'))
    with pytest.raises(CheckpointError, match="d_initial"):
        other.load_adapter(tmp_path / "two", "three")
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
    check_undone(*PLUGIN[change], FAULTS[fault])


@pytest.mark.parametrize("fault", FAULTS)
def test_loading_in_peft_that_fails_is_undone(fault: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(net(), VeratuneConfig(**settings()))
    torch.manual_seed(6)
    randomise(model, 0.3)
    model.save_pretrained(tmp_path)
    check_undone(net, lambda m: peft.PeftModel.from_pretrained(m, tmp_path), FAULTS[fault])
    check_undone(tuned, lambda m: m.load_adapter(tmp_path, "three"), FAULTS[fault])


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
