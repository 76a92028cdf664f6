"""What every adapted layer has: its vectors, its views of the projections, and merging."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from veratune.layers.biases import check_biases, only_bias_checks
from veratune.layers.geometry import Geometry, slices
from veratune.layers.input_cache import InputCache
from veratune.layers.lazy_weight import View
from veratune.layers.offloading import (
    HOOK_ATTRIBUTES,
    ResidentParameters,
    execution_device,
    is_hooked,
    is_offloaded,
    loaded,
    through_hooks,
    why_no_values,
)
from veratune.layers.products import add, compute_dtype, multiply
from veratune.layers.read_only_weight import read_only
from veratune.layers.recomputation import State, StateLog, recomputing
from veratune.ops.costs import LayerShape
from veratune.ops.delta import add_delta, delta_weight
from veratune.ops.factors import Factors
from veratune.ops.planning import MemoryName, RouteName
from veratune.ops.rows import stack_residual
from veratune.projections.pool import ProjectionView, projection_pool
from veratune.projections.schemes import Scheme
from veratune.utils.sharding import describe_sharding
from veratune.utils.tensors import without_autocast


def vector_device(base_layer: nn.Module, weight: Tensor) -> torch.device:
    """Return where a layer's vectors belong: with its weight, or where accelerate brings an offloaded weight."""
    device = execution_device(base_layer) if weight.is_meta else None
    return weight.device if device is None else device


@dataclass(frozen=True)
class VectorInit:
    """How a new adapter's vectors start on one layer.

    Attributes:
        r: length of d.
        d_initial: value of d; b starts at zero.
        init_weights: False starts b at one and d from a standard normal distribution instead, as PEFT does for tests.
        dtype: dtype of both vectors.
    """

    r: int
    d_initial: float
    init_weights: bool
    dtype: torch.dtype

    def check(self, layer_name: str) -> None:
        """Raise ValueError if the dtype has no number for `d_initial`."""
        limits = torch.finfo(self.dtype)
        if abs(self.d_initial) > limits.max or 0.0 < abs(self.d_initial) < limits.smallest_normal:
            raise ValueError(
                f"d_initial={self.d_initial!r} is out of range for {layer_name}, whose vectors are {self.dtype}: its"
                f" magnitude must be between {limits.smallest_normal:.3g} and {limits.max:.3g}"
            )


@dataclass(frozen=True)
class InputGroup:
    """What an adapter has in common on layers that may read the same input: A, and the last product with it.

    Attributes:
        a: A's view.
        cache: the product that these layers hand to each other.
        size: how many layers these are.
    """

    a: ProjectionView
    cache: InputCache
    size: int


@dataclass(frozen=True)
class ComputeSettings:
    """How an adapter is to be computed.

    Attributes:
        vera_dropout: probability of dropout on the adapter's input.
        route: which ways of computing are allowed.
        memory: what may be kept for the backward pass.
    """

    vera_dropout: float
    route: RouteName
    memory: MemoryName


@dataclass(frozen=True)
class AdapterEntry:
    """What one adapter has on one layer beside its vectors.

    Attributes:
        name: the layer's name, which tells it apart within its group.
        group: what it has in common with the layers beside it.
        b: B's view; where the weight stands for several parts side by side, one for each.
        scale: factor that belongs into B.
        settings: how it is computed.
        shapes: the dimensions and the rank, without tokens, of the matrix, or of each part.
        parts: the outputs of each part; empty where the weight stands for one layer.
    """

    name: str
    group: InputGroup
    b: tuple[ProjectionView, ...]
    scale: float
    settings: ComputeSettings
    shapes: tuple[LayerShape, ...]
    parts: tuple[int, ...]

    @property
    def a(self) -> ProjectionView:
        return self.group.a

    @property
    def rank(self) -> int:
        return self.a.rank

    @property
    def views(self) -> tuple[ProjectionView, ...]:
        return (self.a, *self.b)


class Piece(NamedTuple):
    """One adapter's share in consecutive outputs of a layer that has vectors and projections for them alone."""

    outputs: slice
    factors: Factors


class VeraLayer(nn.Module):
    """A weight and the VeRA adapters on it: h = W0 x + sum over active adapters of diag(b) B diag(d) A x.

    Attributes:
        base_layer: the module that holds the weight, as it was.
        geometry: how the weight is seen as matrices.
        vera_lambda_b: adapter name to b, (out,); for a stack (count, out).
        vera_lambda_d: adapter name to d, (r,); for a stack (count, r), for parts (parts, r).
        vera_dropout: adapter name to the dropout on that adapter's input, where it has any.
        entries: adapter name to its projections and settings; plain attributes, in no state dict.
        active_adapters: the active adapters that this layer has, in order.
        merged_adapters: the adapters whose deltas are in the base layer's weight at the moment.
        added_adapters: the adapters whose deltas `forward` adds: the active ones that are not merged.
        weight_was_read: whether something has computed with the adapted weight without calling the layer.
    """

    kind: ClassVar[str] = "linear"
    # The weight's axis of output features, as `matrix` sees it: 0 for (..., out, in), 1 for (..., in, out).
    out_axis: Literal[0, 1] = 0
    weight_name: str = "weight"
    # Whether products with the weight, and with some matrices of a stack, are made without adding it up.
    shown_in_parts: ClassVar[bool] = True
    weight_was_read: bool = False

    def __init__(self, base_layer: nn.Module, geometry: Geometry) -> None:
        super().__init__()
        self._hold(base_layer)
        self.geometry = geometry
        self.in_features = geometry.in_features
        self.out_features = geometry.out_features
        self.vera_lambda_b = ResidentParameters()
        self.vera_lambda_d = ResidentParameters()
        self.vera_dropout = nn.ModuleDict()
        self.entries: dict[str, AdapterEntry] = {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.added_adapters: list[str] = []
        self._log = StateLog()
        # In a dict, so that nn.Module does not register the parameter that waits there while a merged one stands in.
        self._unmerged: dict[str, nn.Parameter] = {}
        self.training = base_layer.training

    def _hold(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return vector_device(self.base_layer, self.base_weight)

    @property
    def base_weight(self) -> Tensor:
        """The base layer's weight as it is, W0 or, while merged, what stands in for it."""
        weight = getattr(self.base_layer, self.weight_name, None)
        if not isinstance(weight, Tensor):  # kept in another form, of which this is a part
            weight = next(itertools.chain(self.base_layer.parameters(), self.base_layer.buffers()))
        return weight

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as matrices: a view (..., out, in), or (..., in, out) by `out_axis`."""
        return weight

    def like_weight(self, matrix: Tensor) -> Tensor:
        """Undo `matrix`."""
        return matrix

    def _outputs_first(self, matrix: Tensor) -> Tensor:
        return matrix if self.out_axis == 0 else matrix.mT

    @property
    def weight(self) -> Tensor:
        """The weight for code that reads it without calling the layer: W0, with the deltas of active adapters added.

        Some models compute with it themselves (Mamba's dt_proj, WavLM's attention). It is differentiable to the
        vectors, and made only when something is computed with it: asking for its dtype or shape costs nothing.
        """
        return self.weight_over(self.base_weight, outside=True)

    def weight_over(self, base: Tensor, *, outside: bool = False) -> Tensor:
        """Return the same for a W0 that is given, such as a replica's.

        Args:
            base: W0.
            outside: whether code that may not call the layer asks, which is noted when it computes with the weight.
        """
        self.check_recomputation()
        if base.is_meta and is_offloaded(self.base_layer, self.weight_name):
            base = loaded(self.base_layer, self.weight_name)
        if not self.added_adapters:
            return base
        matrix = self.matrix(base)
        if torch.compiler.is_compiling() or not plain_tensor(base):
            return self.added_up(base)
        if matrix.shape != base.shape or not self.shown_in_parts:
            return read_only(self.added_up(base), self, outside=outside)
        return View(self, base, outside=outside).stand_in()

    def adapted_weight(self) -> Tensor:
        """Return W0 with the deltas of the adapters that `forward` adds, in W0's layout and dtype, differentiably."""
        return self.added_up(self.full_weight())

    def added_up(self, base: Tensor) -> Tensor:
        """Return a W0 that is given, in its own layout, with the deltas of the adapters that `forward` adds."""
        return self.like_weight(self.adapted_part(self.matrix(base), None))

    def adapted_part(self, base: Tensor, index: Any) -> Tensor:
        """Return W0 with deltas, of all matrices (`index` None) or those that `base` was chosen from the stack with."""
        weight = self._outputs_first(base)
        for name in self.added_adapters:
            dtype = torch.promote_types(self.vectors(name)[0].dtype, torch.float32)
            pieces = self.pieces(name, weight.device, dtype)
            if len(pieces) == 1:
                weight = add_delta(weight, pieces[0].factors.at(index))
            else:
                weight = torch.cat([add_delta(weight[piece.outputs], piece.factors) for piece in pieces])
        return self._outputs_first(weight)

    def product(self, x: Tensor, base: Tensor, index: Any, bias: Tensor | None = None) -> Any:
        """Return x W^T + bias, (..., out), with W the adapted weight; NotImplemented where torch refuses the dtypes.

        Args:
            x: (..., in).
            base: a part of W0, in the layer's own layout.
            index: which matrices of the stack `base` is; None for all, or where there is no stack.
            bias: (out,) or None; None where `base` is a stack.
        """
        dtype = compute_dtype(x, base.dtype)
        if dtype is None:
            return NotImplemented
        x = x.to(dtype)
        if base.ndim == 2:
            flat = x.reshape(math.prod(x.shape[:-1]), self.in_features)
            first, *others = self.added_adapters
            if self.entries[first].parts:
                return NotImplemented
            bias = None if bias is None else bias.to(dtype)
            output = multiply(self, first, flat, base.to(dtype), bias, index=index)
            for name in others:
                output = add(self, name, output, flat, index=index)
            return output.view(*x.shape[:-1], self.out_features)
        output = torch.matmul(x, self._outputs_first(base).to(dtype).mT)
        if x.ndim < 3 or len(x) != len(base):
            x = x.expand(*output.shape[:-1], self.in_features)
        chosen = torch.arange(len(base), device=x.device) if index is None else index.to(torch.int64)
        # One matrix for each of the next to last but one dimension: its rows belong together.
        groups = chosen.repeat_interleave(output.shape[-2]).repeat(math.prod(output.shape[:-3]))
        rows = output.reshape(-1, self.out_features)
        return self.add_rows(rows, x.reshape(-1, self.in_features), groups).view(output.shape)

    def add_rows(self, start: Tensor, x: Tensor, groups: Tensor) -> Tensor:
        """Return start + x delta W^T, where each row of x belongs to one matrix of the stack.

        Args:
            start: (T, out).
            x: (T, in).
            groups: int64 (T,), the matrices.
        """
        for name in self.added_adapters:
            (piece,) = self.pieces(name, x.device, x.dtype)
            start = stack_residual(start, x, piece.factors, groups)
        return start

    def pieces(self, name: str, device: torch.device, dtype: torch.dtype) -> list[Piece]:
        """Return an adapter's pieces: one, or one for each part."""
        entry = self.entries[name]
        b, d = self.vectors(name)
        A = entry.a.matrix(device, dtype)  # noqa: N806
        if not entry.parts:
            return [Piece(slice(None), Factors(A, entry.b[0].matrix(device, dtype), b, d, entry.scale))]
        return [
            Piece(outputs, Factors(A, view.matrix(device, dtype), b[outputs], d[part], entry.scale))
            for part, (outputs, view) in enumerate(zip(slices(entry.parts), entry.b, strict=True))
        ]

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.base_layer, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever sets a linear layer's weight or bias (tying weights, swapping a bias) means the base layer's.
        if name in ("weight", "bias"):
            if name == "weight" and self.merged_adapters:
                raise ValueError(
                    f"the weight cannot be set while the adapters {self.merged_adapters} are merged into it, as"
                    " unmerging would put the old one back: call unmerge_adapter first"
                )
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def add_adapter(
        self,
        name: str,
        layer_name: str,
        scheme: Scheme,
        init: VectorInit,
        settings: ComputeSettings,
        group: InputGroup,
        parts: tuple[int, ...] = (),
    ) -> None:
        """Give this layer the vectors of another adapter; it is not active yet."""
        init.check(layer_name)
        device, r = vector_device(self.base_layer, self.base_weight), init.r
        b = torch.zeros(self.geometry.b_shape, dtype=init.dtype, device=device)
        d = torch.full(self.geometry.d_shape(r, parts), init.d_initial, dtype=init.dtype, device=device)
        if not init.init_weights:
            b.fill_(1.0)
            d.normal_()
        self.vera_lambda_b[name] = nn.Parameter(b, requires_grad=False)
        self.vera_lambda_d[name] = nn.Parameter(d, requires_grad=False)
        if settings.vera_dropout > 0.0:
            self.vera_dropout[name] = nn.Dropout(settings.vera_dropout).train(self.training)
        views = tuple(projection_pool.view(scheme, "B", r, width) for width in parts or (self.out_features,))
        self.entries[name] = AdapterEntry(
            name=layer_name,
            group=group,
            b=views,
            scale=scheme.scale(r),
            settings=settings,
            shapes=tuple(
                LayerShape(self.in_features, view.features, r, 0, group.size, view.structure.density) for view in views
            ),
            parts=parts,
        )

    def delete_adapter(self, name: str) -> None:
        del self.vera_lambda_b[name], self.vera_lambda_d[name], self.entries[name]
        if name in self.vera_dropout:
            del self.vera_dropout[name]
        self._log.forget(name)
        self.activate(self.active_adapters)

    def activate(self, names: Sequence[str]) -> None:
        """Let those of these adapters that the layer has be the active ones."""
        self.active_adapters = [name for name in names if name in self.entries]
        self._choose_added()

    def _computing(self) -> list[str]:
        """Return the active adapters, unless something disables them."""
        return self.active_adapters

    def _choose_added(self) -> None:
        computing = [name for name in self._computing() if name in self.entries]
        self.added_adapters = [name for name in computing if name not in self.merged_adapters]
        self._log.record(State(tuple(self.added_adapters), tuple(self.merged_adapters)))

    def check_recomputation(self) -> None:
        """Raise RuntimeError if this is a recomputation of what was computed with other adapters."""
        if recomputing():
            self._log.check(next((entry.name for entry in self.entries.values()), type(self.base_layer).__name__))
            check_biases(self.base_layer)

    def weight_readable(self, name: str) -> bool:
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
        dtype = torch.promote_types(self.vectors(name)[0].dtype, torch.float32)
        if self.base_weight.is_floating_point() and self.base_weight.dtype.itemsize > 1:
            dtype = torch.promote_types(dtype, self.base_weight.dtype)
        with torch.no_grad(), without_autocast(self.device):
            return self.like_weight(self._outputs_first(self._delta_matrices(name, dtype)))

    def _delta_matrices(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return an adapter's delta as (..., out, in)."""
        deltas = []
        for piece in self.pieces(name, self.device, dtype):
            factors = piece.factors._replace(b=piece.factors.b.to(dtype), d=piece.factors.d.to(dtype))
            if self.geometry.count is None:
                deltas.append(delta_weight(factors))
            else:  # one by one, which takes less memory
                deltas += [delta_weight(factors.at(matrix)) for matrix in range(self.geometry.count)]
        return torch.cat(deltas) if self.geometry.count is None else torch.stack(deltas)

    def full_weight(self) -> Tensor:
        """Return W0 as a floating-point tensor of the shape that the layer computes with, loaded if it is offloaded."""
        if is_offloaded(self.base_layer, self.weight_name):
            return loaded(self.base_layer, self.weight_name)
        return self.base_weight

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """Return the weight with these adapters' deltas added, computed at least in float32 and rounded once."""
        with torch.no_grad():
            total = self.get_delta_weight(names[0])
            for name in names[1:]:
                total = total + self.get_delta_weight(name)
            base = self.full_weight().detach()
            return (total + base).to(base.dtype).contiguous()

    def why_not_mergeable(self) -> str | None:
        """Return None if `merge` can work, otherwise the reason."""
        weight = self.base_layer._parameters.get(self.weight_name)
        if weight is None:
            return "its weight is computed from other parameters"
        if weight.is_meta:
            return why_no_values(self.base_layer, self.weight_name)
        if not weight.is_floating_point():
            return f"its weight is of the type {weight.dtype}"
        return None

    def check_mergeable(self, names: Sequence[str], *, safe: bool, called: str) -> None:
        """Raise ValueError if adapters cannot be merged here; nothing is changed.

        Args:
            names: the adapters that would be merged; those that are not on this layer do not count.
            safe: also refuse a result that is not finite.
            called: what the message calls this layer.
        """
        names = [name for name in names if name in self.entries]
        if not names:
            return
        tensors = [self.base_layer._parameters.get(self.weight_name)]
        tensors += [own[name] for name in names for own in (self.vera_lambda_b, self.vera_lambda_d)]
        spread = next((how for how in map(describe_sharding, tensors) if how is not None), None)
        if spread is not None:
            raise ValueError(
                f"cannot merge into {called}: its weight or its vectors are spread over processes ({spread}): let all"
                " of them call save_pretrained, and merge the adapter after loading it in one process"
            )
        reason = self.why_not_mergeable()
        if reason is not None:
            raise ValueError(f"cannot merge into {called}: {reason}")
        if safe and not torch.isfinite(self.merged_weight(names)).all():
            raise ValueError(
                f"merging {names} into {called} gives NaNs or infinities, weights that are not finite; nothing was"
                " merged"
            )

    def loss_of_merging(self) -> str | None:
        """Return what merging loses beside rounding to the weight's dtype, to stand behind "merging"; usually None."""
        return None

    def merge(self, names: Sequence[str]) -> None:
        """Let a new parameter with these adapters' deltas stand in for the weight.

        The weight itself is kept aside untouched: whatever it is tied to stays as it is, and `unmerge` puts the same
        bits back.
        """
        original = self.base_weight
        assert isinstance(original, nn.Parameter)
        merged = self._as_parameter(self.merged_weight(names), original)
        setattr(self.base_layer, self.weight_name, merged)
        self._unmerged["weight"] = original
        self.merged_adapters = list(names)
        self._choose_added()

    def merge_again(self, names: Sequence[str]) -> None:
        """Merge adapters that were merged before, after `unmerge`."""
        self.merge(names)

    def _as_parameter(self, merged: Tensor, original: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(merged, requires_grad=original.requires_grad)

    @property
    def merged_for_good(self) -> bool:
        """Whether the weight from before merging is gone, as in an interrupted `merge_and_unload`."""
        return bool(self.merged_adapters) and not self._unmerged

    def unmerge(self) -> None:
        """Put the weight from before `merge` back, on the device and in the dtype the layer has now."""
        if not self.merged_adapters:
            return
        if self.merged_for_good:
            raise ValueError(
                f"{self.merged_adapters} cannot be unmerged, because an interrupted merge_and_unload has let go of the"
                " weights from before: call merge_and_unload again, which goes on from there"
            )
        self.check_unmergeable()
        original, merged = self._unmerged["weight"], self.base_weight
        if original.device != merged.device or original.dtype != merged.dtype:
            original.data = original.data.to(merged.device, merged.dtype)
        setattr(self.base_layer, self.weight_name, original)
        del self._unmerged["weight"]
        self.merged_adapters = []
        self._choose_added()

    def check_unmergeable(self) -> None:
        """Raise ValueError if `unmerge` cannot work, as the merged weight was offloaded; nothing is changed."""
        if self.merged_adapters and self.base_weight.is_meta and not self._unmerged["weight"].is_meta:
            reason = why_no_values(self.base_layer, self.weight_name)
            raise ValueError(f"cannot unmerge {self.merged_adapters}: {reason}")

    def release_projections(self) -> None:
        """Free this layer's hold on drawn projections; the next use draws them again."""
        for entry in self.entries.values():
            for view in entry.views:
                view.release()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        dtype = self.base_weight.dtype
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.base_weight.device
        if self.base_weight.dtype != dtype:
            self.release_projections()
        for entry in self.entries.values():
            for view in entry.views:
                view.keep_only(device)
        return result

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={entry.rank}" for name, entry in self.entries.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, adapters={{{adapters}}}"


class TransparentLayer(VeraLayer):
    """One whose base layer's own attributes are read by models: a convolution's stride, an embedding's padding."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if name.startswith("_") or "base_layer" not in modules:  # private, or being copied or unpickled
                raise
            return getattr(modules["base_layer"], name)


def only_computes(module: nn.Module) -> bool:
    """Return whether calling a module does what its class does, and nothing else: no hooks, no forward of its own."""
    return (
        "forward" not in module.__dict__
        and not module._forward_hooks
        and (not module._forward_pre_hooks or only_bias_checks(module))
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def plain_tensor(weight: Tensor) -> bool:
    """Return whether a weight is an ordinary tensor, rather than one of a class that computes in its own way."""
    return type(weight) in (Tensor, nn.Parameter)


def stand_in_for(module: nn.Module, weights: Mapping[str, Tensor | None]) -> nn.Module:
    """Return what shares all with a module but some parameters, in whose places other tensors are."""
    stand_in = object.__new__(type(module))
    stand_in.__dict__.update({name: value for name, value in module.__dict__.items() if name not in HOOK_ATTRIBUTES})
    stand_in.__dict__["_parameters"] = {**module._parameters, **weights}
    return stand_in


def call_with(
    module: nn.Module, weights: Callable[[], Mapping[str, Tensor]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module with other tensors, which `weights` makes, in the places of some of its parameters.

    Nothing is written to the module, so that several threads may do this at once: a stand-in, which shares all else
    with the module, is called. A forward that was bound to the module itself would not see that, and a compiler would
    not follow it; there the parameters are exchanged for the time of the call. Where accelerate has put hooks, they
    load the module's own parameters first.
    """
    if is_hooked(module):
        return through_hooks(module, lambda *a, **k: _call_stand_in(module, weights(), a, k), args, kwargs)
    if torch.compiler.is_compiling() or "forward" in module.__dict__:
        return torch.func.functional_call(module, dict(weights()), args, kwargs)
    return _call_stand_in(module, weights(), args, kwargs)


def _call_stand_in(
    module: nn.Module, weights: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    stand_in = stand_in_for(module, weights)
    result = stand_in(*args, **kwargs)
    for name, value in stand_in.__dict__.items():
        if name != "_parameters" and module.__dict__.get(name, stand_in) is not value:
            module.__dict__[name] = value  # what its forward has noted about itself
    return result
