"""The projections that a bank's adapters have: numbered, and each layer of the bank given its views of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from veratune.adapters.plan import input_groups
from veratune.adapters.target import Target
from veratune.bank.layers import BankedLinear, SharedProjections
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import PerDimension, Scheme


class BankProjections:
    """The kinds of projections that a bank has adapters with. Whoever calls a method holds the bank's lock.

    A kind's number is what calls know it by, and is never given to another one.
    """

    def __init__(self, targets: Sequence[Target], layers: Mapping[str, BankedLinear], rank: int) -> None:
        """Begin without any.

        Args:
            targets: the layers of the bank.
            layers: what stands in their places, by name.
            rank: the bank's largest.
        """
        self._targets = targets
        self._layers = layers
        self._rank = rank
        self._schemes: dict[int, Scheme] = {}
        self._next = 0

    def __getitem__(self, number: int) -> Scheme:
        return self._schemes[number]

    def numbers(self) -> list[int]:
        """Return all numbers, in ascending order."""
        return list(self._schemes)

    def any_number(self) -> int:
        """Return the number of projections for a trial, whichever they are."""
        return next(iter(self._schemes)) if self._schemes else self.number_of(PerDimension(0))

    def number_of(self, scheme: Scheme) -> int:
        """Return a source's number, after giving the layers its projections if it is new."""
        for known, other in self._schemes.items():
            if other == scheme:
                return known
        number = self._next
        rank = scheme.largest_rank(self._rank)
        targets = [replace(target, r=rank) for target in self._targets]
        groups = input_groups(targets, scheme)
        shared: dict[str, SharedProjections] = {}
        for target in targets:
            widths = target.parts or (target.out_features,)
            if not (scheme.reaches("A", target.in_features) and scheme.reaches("B", max(widths))):
                continue  # as narrow as the layers that its adapters have, and this one is none of them
            views = tuple(projection_pool.view(scheme, "B", rank, width) for width in widths)
            shared[target.name] = SharedProjections(groups[target.name], views)
        for name, own in shared.items():
            self._layers[name].projections[number] = own
        self._schemes[number] = scheme
        self._next += 1
        return number

    def drop(self, number: int) -> None:
        """Let go of projections that no adapter has any more."""
        del self._schemes[number]
        for layer in self._layers.values():
            layer.projections.pop(number, None)
