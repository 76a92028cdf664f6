"""What every adapted layer has: its vectors, its corners of the projections, and merging."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veratune.functional import delta_weight, without_autocast
from veratune.layers.adapted_weight import AdaptedWeight
from veratune.layers.shared import SharedDown
from veratune.projection import Corner, projection_pool
from veratune.routing import LayerShape, MemoryName, RouteName
from veratune.sources import Source


def _vector_device(base_layer: nn.Module, weight: Tensor) -> torch.device:
    """Return where a layer's vectors belong: with its weight, or where accelerate brings an offloaded weight."""
    hook = getattr(base_layer, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if weight.is_meta and device is not None else weight.device


@dataclass(frozen=True)
class VectorInit:
    """How a new adapter's vectors start on one layer.

    Attributes:
        rank: length of d.
        d_initial: value of d; b starts at zero.
        standard: False starts b at one and d from a standard normal distribution instead, as PEFT does for tests.
        dtype: dtype of both vectors.
    """

    rank: int
    d_initial: float
    standard: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class InputGroup:
    """What an adapter has in common on layers that may read the same input: A, and the last product with it.

    Attributes:
        a: A's corner.
        down: the product that these layers hand to each other.
        size: how many layers these are.
    """

    a: Corner
    down: SharedDown
    size: int


@dataclass(frozen=True)
class ComputeSettings:
    """How an adapter is to be computed.

    Attributes:
        dropout: probability of dropout on the adapter's input.
        route: which ways of computing are allowed.
        memory: what may be kept for the backward pass.
    """

    dropout: float
    route: RouteName
    memory: MemoryName


@dataclass(frozen=True)
class Slot:
    """What one adapter has on one layer beside its two vectors.

    Attributes:
        name: the layer's name, which tells it apart within its group.
        group: what it has in common with the layers beside it.
        b: B's corner.
        gain: factor that belongs into B.
        settings: how it is computed.
        shape: the layer's dimensions and the rank, without tokens.
    """

    name: str
    group: InputGroup
    b: Corner
    gain: float
    settings: ComputeSettings
    shape: LayerShape

    @property
    def a(self) -> Corner:
        return self.group.a

    @property
    def rank(self) -> int:
        return self.a.rank


class VeraLayer(nn.Module):
    """A linear layer and the VeRA adapters on it: h = W0 x + sum over active adapters of diag(b) B diag(d) A x.

    Attributes:
        base_layer: the layer as it was.
        vera_lambda_b: adapter name to b, (out,).
        vera_lambda_d: adapter name to d, (r,).
        vera_dropout: adapter name to the dropout on that adapter's input, where it has any.
        slots: adapter name to its projections and settings; plain attributes, in no state dict.
        active_adapters: the active adapters that this layer has, in order.
        merged_adapters: the adapters whose deltas are in the base layer's weight at the moment.
        added_adapters: the adapters whose deltas `forward` adds: the active ones that are not merged.
    """

    # The weight's axis of output features: 0 for (out, in), 1 for (in, out).
    out_axis: ClassVar[int] = 0

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.vera_lambda_b = nn.ParameterDict()
        self.vera_lambda_d = nn.ParameterDict()
        self.vera_dropout = nn.ModuleDict()
        self.slots: dict[str, Slot] = {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.added_adapters: list[str] = []
        # In a dict, so that nn.Module does not register the parameter that waits there while a merged one stands in.
        self._unmerged: dict[str, nn.Parameter] = {}
        self.training = base_layer.training

    @property
    def base_weight(self) -> Tensor:
        """The base layer's weight as it is, W0 or, while merged, what stands in for it."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight(self) -> Tensor:
        """The weight for code that reads it without calling the layer: W0, with the deltas of active adapters added.

        Some models compute with it themselves (Mamba's dt_proj, WavLM's attention). It is differentiable to the
        vectors, and made only when something is computed with it: asking for its dtype or shape costs nothing.
        """
        base = self.base_weight
        if not self.added_adapters:
            return base
        return self.adapted_weight() if torch.compiler.is_compiling() else AdaptedWeight.of(base, self.adapted_weight)

    def adapted_weight(self) -> Tensor:
        """Return W0 with the deltas of the adapters that `forward` adds, in W0's layout and dtype, differentiably."""
        weight = self.base_weight
        for name in self.added_adapters:
            slot = self.slots[name]
            b, d = self.vectors(name)
            dtype = torch.promote_types(b.dtype, torch.float32)
            a_projection = slot.a.tensor(weight.device, dtype)
            b_projection = slot.b.tensor(weight.device, dtype)
            delta = (b_projection * b).t() @ (d[:, None] * slot.gain * a_projection)
            weight = (weight + (delta if self.out_axis == 0 else delta.t())).to(weight.dtype)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever sets a linear layer's weight or bias (tying weights, swapping a bias) means the base layer's.
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def add_adapter(
        self,
        name: str,
        layer_name: str,
        source: Source,
        init: VectorInit,
        settings: ComputeSettings,
        group: InputGroup,
    ) -> None:
        """Give this layer the vectors of another adapter; it is not active yet."""
        device = _vector_device(self.base_layer, self.base_weight)
        b = torch.zeros(self.out_features, dtype=init.dtype, device=device)
        d = torch.full((init.rank,), init.d_initial, dtype=init.dtype, device=device)
        if not init.standard:
            b.fill_(1.0)
            d.normal_()
        self.vera_lambda_b[name] = nn.Parameter(b, requires_grad=False)
        self.vera_lambda_d[name] = nn.Parameter(d, requires_grad=False)
        if settings.dropout > 0.0:
            self.vera_dropout[name] = nn.Dropout(settings.dropout).train(self.training)
        self.slots[name] = Slot(
            name=layer_name,
            group=group,
            b=projection_pool.corner(source, "B", init.rank, self.out_features),
            gain=source.gain(init.rank),
            settings=settings,
            shape=LayerShape(self.in_features, self.out_features, init.rank, 0, group.size),
        )

    def delete_adapter(self, name: str) -> None:
        del self.vera_lambda_b[name], self.vera_lambda_d[name], self.slots[name]
        if name in self.vera_dropout:
            del self.vera_dropout[name]
        self.activate(self.active_adapters)

    def activate(self, names: Sequence[str]) -> None:
        """Let those of these adapters that the layer has be the active ones."""
        self.active_adapters = [name for name in names if name in self.slots]
        self._choose_added()

    def _choose_added(self) -> None:
        self.added_adapters = [name for name in self.active_adapters if name not in self.merged_adapters]

    def weight_at_hand(self, name: str) -> bool:
        """Return whether an adapter's output may be computed from the weight itself, if it is the only active one."""
        return False

    def vectors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return (b, d) of an adapter: parameters, or what `torch.func.functional_call` has put in their place."""
        b, d = self.vera_lambda_b[name], self.vera_lambda_d[name]
        assert isinstance(b, Tensor) and isinstance(d, Tensor)
        return b, d

    def get_delta_weight(self, name: str) -> Tensor:
        """Return an adapter's delta of the weight, in the weight's own layout, in the vectors' dtype, without a graph.

        The dtype is float32 at least, so that merging into a half-precision weight rounds once.
        """
        slot = self.slots[name]
        b, d = self.vectors(name)
        dtype = torch.promote_types(torch.promote_types(b.dtype, self.base_weight.dtype), torch.float32)
        device = self.base_weight.device
        with torch.no_grad(), without_autocast(device):
            delta = delta_weight(
                slot.a.tensor(device, dtype), slot.b.tensor(device, dtype), b.to(dtype), d.to(dtype), slot.gain
            )
        return delta if self.out_axis == 0 else delta.t()

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """Return the weight with these adapters' deltas added, computed at least in float32 and rounded once."""
        with torch.no_grad():
            total = self.get_delta_weight(names[0])
            for name in names[1:]:
                total = total + self.get_delta_weight(name)
            return (total + self.base_weight.detach()).to(self.base_weight.dtype).contiguous()

    def why_not_mergeable(self) -> str | None:
        """Return None if `merge` can work, otherwise the reason."""
        weight = self.base_layer._parameters.get("weight")
        if weight is None:
            return "its weight is computed from other parameters"
        if weight.is_meta:
            return "its weight is on the meta device and has no values"
        if not weight.is_floating_point():
            return f"its weight is of the type {weight.dtype}"
        return None

    def merge(self, names: Sequence[str]) -> None:
        """Let a new parameter with these adapters' deltas stand in for the weight.

        The weight itself is kept aside untouched: whatever it is tied to stays as it is, and `unmerge` puts the same
        bits back.
        """
        base = self.base_layer
        original = base.weight
        assert isinstance(original, nn.Parameter)
        base.weight = nn.Parameter(self.merged_weight(names), requires_grad=original.requires_grad)
        self._unmerged["weight"] = original
        self.merged_adapters = list(names)
        self._choose_added()

    def unmerge(self) -> None:
        """Put the weight from before `merge` back, on the device and in the dtype the layer has now."""
        if not self.merged_adapters:
            return
        original, merged = self._unmerged["weight"], self.base_weight
        if original.device != merged.device or original.dtype != merged.dtype:
            original.data = original.data.to(merged.device, merged.dtype)
        self.base_layer.weight = original
        del self._unmerged["weight"]
        self.merged_adapters = []
        self._choose_added()

    def release_projections(self) -> None:
        """Free this layer's hold on drawn projections; the next use draws them again."""
        for slot in self.slots.values():
            slot.a.release()
            slot.b.release()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        dtype = self.base_weight.dtype
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.base_weight.device
        if self.base_weight.dtype != dtype:
            self.release_projections()
        for slot in self.slots.values():
            slot.a.keep_only(device)
            slot.b.keep_only(device)
        return result

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={slot.rank}" for name, slot in self.slots.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, adapters={{{adapters}}}"
