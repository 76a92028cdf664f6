"""Merge adapters into the base layer's weight, and unmerge them bit-exactly."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veratune.layers.geometry import Geometry
from veratune.layers.holder import AdapterHolder
from veratune.layers.offloading import is_offloaded, loaded, why_no_values
from veratune.ops.delta import delta_weight
from veratune.utils.sharding import describe_sharding
from veratune.utils.tensors import checksum, without_autocast


class MergeableLayer(AdapterHolder):
    """A weight whose adapters can be merged into it."""

    def __init__(self, base_layer: nn.Module, geometry: Geometry) -> None:
        super().__init__(base_layer, geometry)
        # In a dict, so that nn.Module does not register the original parameter while a merged one replaces it.
        self._unmerged: dict[str, nn.Parameter] = {}
        # Dtype, shape and checksum of the merged weight; no checksum if it was written to.
        self._merged_values: tuple[torch.dtype, torch.Size, tuple[int, int] | None] | None = None

    def get_delta_weight(self, name: str) -> Tensor:
        """Return an adapter's delta weight, in the weight's layout and the vectors' dtype, without a graph.

        The dtype is at least float32 and at least the weight's dtype, so that merging rounds once.
        """
        dtype = torch.promote_types(self.vectors(name)["b"].dtype, torch.float32)
        if self.base_weight.is_floating_point() and self.base_weight.dtype.itemsize > 1:
            dtype = torch.promote_types(dtype, self.base_weight.dtype)
        with torch.no_grad(), without_autocast(self.device):
            return self.like_weight(self._outputs_first(self._delta_matrices(name, dtype)))

    def _delta_matrices(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return an adapter's delta as (..., out, in)."""
        deltas = []
        for part in self.factors_by_part(name, self.device, dtype):
            factors = part.factors._replace(b=part.factors.b.to(dtype), d=part.factors.d.to(dtype))
            if self.geometry.count is None:
                deltas.append(delta_weight(factors))
            else:  # one at a time, which takes less memory
                deltas += [delta_weight(factors.at(matrix)) for matrix in range(self.geometry.count)]
        return torch.cat(deltas) if self.geometry.count is None else torch.stack(deltas)

    def full_weight(self) -> Tensor:
        """Return `base_weight` as a floating-point tensor of the shape that the layer computes with.

        An offloaded weight is loaded.
        """
        if is_offloaded(self.base_layer, self.weight_name):
            return loaded(self.base_layer, self.weight_name)
        return self.base_weight

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """Return `full_weight` with these adapters' deltas added, computed at least in float32 and rounded once.

        Raises:
            ValueError: an adapter is not on this layer, or is already merged.
        """
        if merged := [name for name in names if name in self.merged_adapters]:
            raise ValueError(f"the weight of {self._called()} already contains the deltas of {merged}: unmerge first")
        with torch.no_grad():
            total = self.get_delta_weight(names[0])
            for name in names[1:]:
                total = total + self.get_delta_weight(name)
            base = self.full_weight().detach()
            return (total + base).to(base.dtype).contiguous()

    def why_not_mergeable(self) -> str | None:
        """Return None if adapters can be merged into the weight, otherwise the reason."""
        weight = self.base_layer._parameters.get(self.weight_name)
        if weight is None:
            return "its weight is computed from other parameters"
        if weight.is_meta:
            return why_no_values(self.base_layer, self.weight_name)
        if not weight.is_floating_point():
            return f"its weight has the dtype {weight.dtype}"
        return None

    def check_mergeable(self, names: Sequence[str], *, safe: bool, called: str) -> None:
        """Raise ValueError if adapters cannot be merged here; nothing is changed.

        Args:
            names: the adapters to merge; those that are not on this layer are ignored.
            safe: also refuse a result that is not finite.
            called: the layer's name, for the message.
        """
        names = [name for name in names if name in self.entries and name not in self.merged_adapters]
        if not names:
            return
        vectors = [vector for name in names for vector in self.vectors(name).values()]
        tensors = [self.base_layer._parameters.get(self.weight_name), *vectors]
        sharding = next((how for how in map(describe_sharding, tensors) if how is not None), None)
        if sharding is not None:
            raise ValueError(
                f"cannot merge into {called}: its weight or its vectors are sharded across processes ({sharding}). Call"
                " save_pretrained in all of them, then load the adapter in one process and merge it there"
            )
        reason = self.why_not_mergeable()
        if reason is not None:
            raise ValueError(f"cannot merge into {called}: {reason}")
        if safe and not torch.isfinite(self.merged_weight(names)).all():
            raise ValueError(
                f"merging {names} into {called} gives weights that are not finite (NaNs or infinities); nothing was"
                " merged"
            )

    def loss_of_merging(self) -> str | None:
        """Return the loss from merging beyond rounding to the weight's dtype, phrased to follow "merging", or None."""
        return None

    def merge(self, names: Sequence[str]) -> None:
        """Replace the weight with a new parameter that includes these adapters' deltas.

        The original parameter is kept: modules that share it are not changed, and `unmerge` restores the same bits.

        Raises:
            ValueError: `names` is empty, other adapters are merged, or as for `check_mergeable`; nothing is changed.
        """
        if self.merged_adapters or not names:
            remedy = f"unmerge {self.merged_adapters} first" if self.merged_adapters else "pass at least one adapter"
            raise ValueError(f"cannot merge {list(names)} into {self._called()}: {remedy}")
        for name in names:
            self.vectors(name)
        self.check_mergeable(names, safe=False, called=self._called())
        original = self.base_weight
        assert isinstance(original, nn.Parameter)
        with torch.inference_mode(False):  # gradients may flow through the weight later, outside inference mode
            merged = self._as_parameter(self.merged_weight(names), original)
        setattr(self.base_layer, self.weight_name, merged)
        self._unmerged["weight"] = original
        self.merged_adapters = list(names)
        self._note_merged()
        self._choose_added()

    def _merged_bits(self) -> Tensor:
        """Return the tensor that holds the merged weight's values, for a checksum."""
        return self.base_weight

    def _note_merged(self) -> None:
        weight = self._merged_bits()
        found = None if describe_sharding(weight) is not None else checksum(weight)
        self._merged_values = None if found is None else (weight.dtype, weight.shape, found)

    def merged_weight_changed(self) -> bool:
        """Return whether the merged weight has been written to. Sharded weights are not checked."""
        if self._merged_values is None or not self._unmerged:
            return False
        (dtype, shape, before), weight = self._merged_values, self._merged_bits()
        if weight.dtype != dtype or weight.shape != shape or describe_sharding(weight) is not None:
            return False
        now = checksum(weight)
        return now is not None and now != before

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        changed = self.merged_weight_changed()
        result = super()._apply(fn, recurse)
        if changed:
            bits = self._merged_bits()
            self._merged_values = bits.dtype, bits.shape, None
        elif self._merged_values is not None:
            self._note_merged()
        return result

    def merge_again(self, names: Sequence[str]) -> None:
        """Merge adapters again after `unmerge`."""
        self.merge(names)

    def _as_parameter(self, merged: Tensor, original: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(merged, requires_grad=original.requires_grad)

    @property
    def merged_for_good(self) -> bool:
        """Whether the original weight has been discarded, as in an interrupted `merge_and_unload`."""
        return bool(self.merged_adapters) and not self._unmerged

    def unmerge(self) -> None:
        """Restore the original weight, on the layer's current device and in its current dtype."""
        if not self.merged_adapters:
            return
        if self.merged_for_good:
            raise ValueError(
                f"{self.merged_adapters} cannot be unmerged, because an interrupted merge_and_unload has discarded"
                " the original weights: call merge_and_unload again to complete it"
            )
        self.check_unmergeable()
        original, merged = self._unmerged["weight"], self.base_weight
        if original.device != merged.device or original.dtype != merged.dtype:
            original.data = original.data.to(merged.device, merged.dtype)
        setattr(self.base_layer, self.weight_name, original)
        del self._unmerged["weight"]
        self.merged_adapters, self._merged_values = [], None
        self._choose_added()

    def check_unmergeable(self) -> None:
        """Raise ValueError if the merged weight has been offloaded or written to since merging; nothing is changed."""
        if self.merged_adapters and self.base_weight.is_meta and not self._unmerged["weight"].is_meta:
            reason = why_no_values(self.base_layer, self.weight_name)
            raise ValueError(f"cannot unmerge {self.merged_adapters}: {reason}")
        if self.merged_weight_changed():
            raise ValueError(
                f"cannot unmerge {self.merged_adapters}: the merged weight of"
                f" {next(iter(self.entries.values())).name or 'the model'} was written to since merging, and restoring"
                " the original would lose that change. To keep the current weights, call merge_and_unload; to change"
                " the original weight, write to it while no adapter is merged"
            )
