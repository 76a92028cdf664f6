"""For gradient checkpointing, record which adapter's copy of a module trained in full is used by PEFT."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from veratune.layers.recomputation import State, StateLog, matters


class SavedCheck:
    """A forward pre-hook for PEFT's wrapper of a module trained in full.

    It raises RuntimeError if a block is recomputed with a different copy or different values than in its forward pass.
    """

    def __init__(self, wrapper: Any) -> None:
        self.log = StateLog(_state(wrapper))

    def __call__(self, wrapper: Any, args: Any) -> None:
        if matters(wrapper):
            called = f"a {type(wrapper.original_module).__name__} that adapters train in full"
            self.log.forward(called, wrapper.parameters())


@contextmanager
def saved_states_noted(model: nn.Module, *, removed: str | None = None) -> Iterator[None]:
    """Record which copies PEFT's wrappers in a model use before and after a change within this context.

    Args:
        model: the model.
        removed: the adapter that the change removes.
    """
    for wrapper in wrappers_in(model):
        _check_of(wrapper)
    yield
    for wrapper in wrappers_in(model):
        log = _check_of(wrapper).log
        log.record(_state(wrapper))
        if removed is not None:
            log.forget(removed)


def wrappers_in(model: nn.Module) -> list[Any]:
    """Return PEFT's wrappers of modules trained in full."""
    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def _check_of(wrapper: AuxiliaryTrainingWrapper) -> SavedCheck:
    found = next((hook for hook in wrapper._forward_pre_hooks.values() if isinstance(hook, SavedCheck)), None)
    if found is None:
        found = SavedCheck(wrapper)
        wrapper.register_forward_pre_hook(found)
    return found


def _state(wrapper: Any) -> State:
    return State(() if wrapper.disable_adapters else tuple(wrapper.active_adapters))
