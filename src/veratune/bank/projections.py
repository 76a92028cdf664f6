"""The projection schemes of a bank's adapters, identified by numbers, and each layer's views of the projections."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from veratune.adapters.plan import input_groups
from veratune.adapters.target import Target
from veratune.bank.layers import BankedLinear, LayerProjections
from veratune.projections.pool import projection_pool
from veratune.projections.schemes import PerDimension, Scheme


class BankProjections:
    """The projection schemes that a bank's adapters use. Callers of its methods must hold the bank's lock.

    Calls refer to a scheme by its number, which is never reused.
    """

    def __init__(self, targets: Sequence[Target], layers: Mapping[str, BankedLinear], rank: int) -> None:
        """Start without schemes.

        Args:
            targets: the layers to adapt.
            layers: the bank's layers that replace them, by name.
            rank: the bank's largest rank.
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
        """Return the number of any scheme, for a test run."""
        return next(iter(self._schemes)) if self._schemes else self.number_of(PerDimension(0))

    def number_of(self, scheme: Scheme) -> int:
        """Return a scheme's number; if the scheme is new, create the layers' views first."""
        for known, other in self._schemes.items():
            if other == scheme:
                return known
        number = self._next
        rank = scheme.largest_rank(self._rank)
        targets = [replace(target, r=rank) for target in self._targets]
        groups = input_groups(targets, scheme)
        shared: dict[str, LayerProjections] = {}
        for target in targets:
            widths = target.parts or (target.out_features,)
            if not (scheme.reaches("A", target.in_features) and scheme.reaches("B", max(widths))):
                continue  # the scheme is too narrow for this layer, so its adapters do not adapt the layer
            views = tuple(projection_pool.view(scheme, "B", rank, width) for width in widths)
            shared[target.name] = LayerProjections(groups[target.name], views)
        for name, views_of_layer in shared.items():
            self._layers[name].projections[number] = views_of_layer
        self._schemes[number] = scheme
        self._next += 1
        return number

    def drop(self, number: int) -> None:
        """Drop the projections of a scheme that no adapter uses any longer."""
        del self._schemes[number]
        for layer in self._layers.values():
            layer.projections.pop(number, None)
