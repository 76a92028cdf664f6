"""Gradient checkpointing: a block is computed again in the backward pass, and has to be computed as it was.

Whatever a layer computes by besides its inputs and parameters (adapters that are active, merged or disabled, heads,
biases) is noted with the number of the next autograd node when it changes. A recomputation runs while the engine is at
a node of its own forward pass, whose number says what was in force then.
"""

from bisect import bisect_right
from typing import NamedTuple

import torch

from veratune.utils.torch_private import in_backward, next_node_number, node_number_of_backward

# Changes that are remembered; a graph that is older than all of them is refused.
_KEPT = 256


class State(NamedTuple):
    """Which adapters a module computes with.

    Attributes:
        active: those whose part it computes.
        merged: those whose deltas are in its weight.
        own_bias: whether its bias is one that an adapter trains.
    """

    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    own_bias: bool = False

    def __str__(self) -> str:
        parts = [*map(repr, self.active), *(f"{name!r} (merged)" for name in self.merged)]
        return ", ".join([*parts, *["an adapter's bias"] * self.own_bias]) or "no adapter"


def recomputing() -> bool:
    """Return whether this is computed within a backward pass. A compiler plans recomputations itself."""
    return not torch.compiler.is_compiling() and in_backward()


class StateLog:
    """The states that a module has computed in, and from which autograd node on.

    Args:
        state: the first one.
    """

    def __init__(self, state: State = State()) -> None:  # noqa: B008  # a tuple
        self._starts = [-1]
        self._states: list[State | None] = [state]

    def record(self, state: State) -> None:
        """Note that the module computes in this state from now on."""
        if state == self._states[-1]:
            return
        now = next_node_number()
        if now == self._starts[-1]:  # no node was made in the state before
            self._states[-1] = state
        else:
            self._starts.append(now)
            self._states.append(state)
        del self._starts[:-_KEPT], self._states[:-_KEPT]

    def forget(self, name: str) -> None:
        """Note that an adapter was removed: what was computed with it cannot be computed again."""
        self._states = [
            None if state is None or name in state.active or name in state.merged else state for state in self._states
        ]

    def has_computed(self) -> bool:
        """Return whether any adapter computed in a state that is remembered."""
        return any(state is None or state != State() for state in self._states)

    def void(self) -> None:
        """Note that nothing that was computed up to now can be computed again, whatever the module itself did."""
        self._starts, self._states = [-1, next_node_number()], [None, self._states[-1]]

    def check(self, owner: str) -> None:
        """Raise RuntimeError if this is a recomputation of what was computed in another state.

        Args:
            owner: what the message calls the module.
        """
        number = node_number_of_backward()
        if number is None:
            return
        found = bisect_right(self._starts, number) - 1
        then, now = (self._states[found] if found >= 0 else None), self._states[-1]
        if then is None or then != now:
            raise RuntimeError(
                f"{owner} is computed again for a backward pass, as gradient checkpointing does, but with other"
                f" adapters than in the forward pass: then {then or 'one that was removed since'}, now {now}. Call"
                " backward() before you choose, merge, disable or remove adapters, or train without gradient"
                " checkpointing"
            )
