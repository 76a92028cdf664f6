"""Gradient checkpointing: a block is recomputed in the backward pass, in the state of its forward pass.

The state of a layer besides its inputs and parameters (adapters that are active, merged or disabled, modules_to_save,
biases) is recorded with the number of the next autograd node when it changes. A recomputation runs while the engine is
at a node of the original forward pass, whose number determines the state at that time.
"""

from bisect import bisect_right
from typing import NamedTuple

import torch

from veratune.utils.torch_private import in_backward, next_node_number, node_number_of_backward

# Changes that are recorded; a graph older than all of them is refused.
_KEPT = 256


class State(NamedTuple):
    """The adapters that a module computes with.

    Attributes:
        active: the adapters whose output it adds.
        merged: the adapters whose deltas are in its weight.
        own_bias: whether its bias is an adapter's.
    """

    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    own_bias: bool = False

    def __str__(self) -> str:
        parts = [*map(repr, self.active), *(f"{name!r} (merged)" for name in self.merged)]
        return ", ".join([*parts, *["an adapter's bias"] * self.own_bias]) or "no adapter"


def recomputing() -> bool:
    """Return whether this runs within a backward pass. A compiler plans recomputations itself."""
    return not torch.compiler.is_compiling() and in_backward()


class StateLog:
    """The states of a module, and the autograd node from which on each applies.

    Args:
        state: the first one.
    """

    def __init__(self, state: State = State()) -> None:  # noqa: B008  # a tuple
        self._starts = [-1]
        self._states: list[State | None] = [state]

    def record(self, state: State) -> None:
        """Record that the module is in this state from now on."""
        if state == self._states[-1]:
            return
        now = next_node_number()
        if now == self._starts[-1]:  # no node was created in the previous state
            self._states[-1] = state
        else:
            self._starts.append(now)
            self._states.append(state)
        del self._starts[:-_KEPT], self._states[:-_KEPT]

    def forget(self, name: str) -> None:
        """Record that an adapter was removed, so that passes with it cannot be recomputed."""
        self._states = [
            None if state is None or name in state.active or name in state.merged else state for state in self._states
        ]

    def has_computed(self) -> bool:
        """Return whether an adapter took part in any recorded state."""
        return any(state is None or state != State() for state in self._states)

    def void(self) -> None:
        """Record that no earlier pass can be recomputed, whatever the module did in it."""
        self._starts, self._states = [-1, next_node_number()], [None, self._states[-1]]

    def check(self, owner: str) -> None:
        """Raise RuntimeError if this recomputes a pass that ran in another state.

        Args:
            owner: the module's name in the message.
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
                " backward() before activating, merging, disabling or removing adapters, or train without gradient"
                " checkpointing"
            )
