"""Gradient checkpointing: verify that a block is recomputed in the same state as in its forward pass.

The state of a layer (adapters that are active, merged or disabled, modules_to_save, biases, and the versions of
parameters) is recorded with the number of the next autograd node when it changes. A recomputation runs while the engine
is at a node of the original forward pass, and the number of this node determines the state at that time. Each thread
numbers its nodes separately.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from veratune.utils.torch_private import in_backward, may_be_recomputed, next_node_number, node_number_of_backward

# The number of changes to record; recomputing a graph older than all of them raises an error.
_KEPT = 256
_MOST_THREADS = 8

# The version of each parameter, or None for one without a version.
Versions = tuple[int | None, ...]


class State(NamedTuple):
    """The adapters that a module computes with.

    Attributes:
        active: the adapters whose output the module adds.
        merged: the adapters whose deltas are in its weight.
        own_bias: whether its bias is an adapter's.
    """

    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    own_bias: bool = False

    def __str__(self) -> str:
        parts = [*map(repr, self.active), *(f"{name!r} (merged)" for name in self.merged)]
        return ", ".join([*parts, *["an adapter's bias"] * self.own_bias]) or "no adapter"


def recomputed_with_other(owner: str, what: str) -> str:
    """Return the beginning of an error about a module that is recomputed in a different state."""
    return (
        f"{owner} is recomputed in a backward pass (by gradient checkpointing), but with different {what} than in the"
        " forward pass"
    )


def recomputing() -> bool:
    """Return whether this is called within a backward pass; False under torch.compile, which plans recomputations."""
    return not torch.compiler.is_compiling() and in_backward()


def matters(module: nn.Module) -> bool:
    """Return whether the current pass through a module recomputes another pass or may itself be recomputed."""
    if torch.compiler.is_compiling():
        return False
    return in_backward() or may_be_recomputed(training=module.training)


class _Entry(NamedTuple):
    """A module's state in a pass (None if unrecoverable) and the versions of its parameters (empty if unknown)."""

    state: State | None
    versions: Versions = ()

    def fits(self, now: "_Entry") -> bool:
        """Return whether the parameters have the same values as now, given that the states are equal."""
        pairs = zip(self.versions, now.versions, strict=False)
        return all(then is None or here is None or then == here for then, here in pairs)


class _History(NamedTuple):
    """One thread's entries, and the number of the autograd node from which each applies. Immutable: threads share it.

    A pass without gradients may belong to a node that was created before the module ran. `earliest` has the number of
    the first node to which it may belong.
    """

    starts: tuple[int, ...]
    entries: tuple[_Entry, ...]
    earliest: tuple[int, ...]

    @classmethod
    def of(cls, entry: _Entry) -> "_History":
        return cls((-1,), (entry,), (-1,))

    def followed_by(self, entry: _Entry, start: int, earliest: int | None = None) -> "_History":
        kept = -1 if start == self.starts[-1] else len(self.starts)  # no node belongs to the last entry
        return _History(
            (*self.starts[:kept], start)[-_KEPT:],
            (*self.entries[:kept], entry)[-_KEPT:],
            (*self.earliest[:kept], start if earliest is None else earliest)[-_KEPT:],
        )

    def at(self, number: int) -> list[_Entry]:
        """Return the entries that may describe the pass that a node belongs to."""
        found = bisect_right(self.starts, number)
        possible = [self.entries[found - 1] if found else _Entry(None)]
        if found < len(self.starts) and self.earliest[found] <= number:
            possible.append(self.entries[found])
        return possible


class StateLog:
    """The states of a module in earlier passes, which may be recomputed.

    Args:
        state: the initial state.
    """

    def __init__(self, state: State = State()) -> None:  # noqa: B008  # a tuple
        self._state = state
        self._first = _Entry(state)
        self._computed = state != State()
        self._histories: dict[int, _History] = {}
        # For each thread: the next node's number when it last ran the module in a pass that may be recomputed, and
        # whether gradients were enabled.
        self._seen: dict[int, tuple[int, bool]] = {}

    def record(self, state: State) -> None:
        """Record that the module is in this state from now on."""
        if state == self._state:
            return
        self._state = state
        self._computed |= state != State()
        self._append(_Entry(state))

    def _append(self, entry: _Entry) -> None:
        thread = threading.get_ident()
        history = self._histories.get(thread, _History.of(self._first))
        self._histories[thread] = history.followed_by(entry, next_node_number())

    def _note(self, entry: _Entry) -> None:
        """Record the entry of a pass that may be recomputed and whose node may already exist."""
        thread = threading.get_ident()
        history = self._histories.get(thread)
        now, gradients = next_node_number(), torch.is_grad_enabled()
        if history is None:
            history = _History.of(entry)
        elif history.entries[-1] == _Entry(entry.state):  # recorded when the state changed, without versions
            history = history.followed_by(entry, history.starts[-1], history.earliest[-1])
        elif history.entries[-1] != entry:
            # Reentrant checkpointing creates its node before this run of the module, but after the previous one.
            last, had_gradients = self._seen.get(thread, (now, True))
            if gradients or had_gradients:
                history = history.followed_by(entry, now, now if gradients else last)
            else:
                history = history.followed_by(entry, last)
        self._histories[thread] = history
        self._seen[thread] = now, gradients
        if len(self._histories) > _MOST_THREADS:
            oldest = next(iter(self._histories))
            self._histories.pop(oldest, None)
            self._seen.pop(oldest, None)

    def forget(self, name: str) -> None:
        """Record that an adapter was removed, so that passes with it cannot be recomputed."""

        def without(entry: _Entry) -> _Entry:
            gone = entry.state is None or name in entry.state.active or name in entry.state.merged
            return _Entry(None) if gone else entry

        self._first = without(self._first)
        for thread, history in list(self._histories.items()):
            self._histories[thread] = history._replace(entries=tuple(map(without, history.entries)))
        if without(_Entry(self._state)).state is None:
            self._state = State()

    def has_computed(self) -> bool:
        """Return whether any adapter was active or merged in a recorded state."""
        return self._computed

    def void(self) -> None:
        """Record that no earlier pass can be recomputed, regardless of the module's state."""
        self._first, now = _Entry(None), _Entry(self._state)
        for thread in list(self._histories):
            self._histories[thread] = _History.of(self._first)
        self._append(now)

    def forward(self, owner: str, parameters: Iterable[Any]) -> None:
        """Record the parameters' versions in a pass that `matters`, or check them if it recomputes another pass.

        Args:
            owner: the module's name in the message.
            parameters: the parameters that it computes with, in an order that depends only on its state.

        Raises:
            RuntimeError: this recomputes a pass with different adapters or values.
        """
        versions = _versions(parameters)
        if in_backward():
            self.check(owner, versions)
        else:
            self._note(_Entry(self._state, versions))

    def check(self, owner: str, versions: Versions = ()) -> None:
        """Raise RuntimeError if this recomputes a pass that ran in a different state.

        Args:
            owner: the module's name in the message.
            versions: the versions of the parameters that it computes with.
        """
        number = node_number_of_backward()
        if number is None:
            return
        now = _Entry(self._state, versions)
        own = self._histories.get(threading.get_ident())
        # On devices other than the CPU, backward passes run in separate threads.
        histories = list(self._histories.values()) if own is None else [own]
        entries = [entry for history in histories for entry in history.at(number)] or [self._first]
        if any(entry.state == now.state and entry.fits(now) for entry in entries):
            return
        then = next((entry for entry in entries if entry.state == now.state), entries[0])
        if then.state == now.state:
            raise RuntimeError(
                f"{recomputed_with_other(owner, 'values')}: its parameters were written to in between. Call backward()"
                " before optimizer.step(), restore, load_state_dict or other writes, or train without gradient"
                " checkpointing"
            )
        raise RuntimeError(
            f"{recomputed_with_other(owner, 'adapters')}: then {then.state or 'an adapter since removed'}, now"
            f" {now.state}. Call backward() before activating, merging, disabling or removing adapters, or train"
            " without gradient checkpointing"
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no pending passes, and its nodes may be numbered by another process.
        return {**self.__dict__, "_first": _Entry(self._state), "_histories": {}, "_seen": {}}


def _versions(parameters: Iterable[Any]) -> Versions:
    """Return each parameter's version; None for tensors that are created in every pass, such as FSDP's."""
    try:
        return tuple([own._version if type(own) is nn.Parameter else None for own in parameters])
    except RuntimeError:  # created in inference mode
        return ()
