"""A stand-in for an adapted weight that computes only as much of it as an operation needs.

Some modules do not call a linear layer but read a weight and compute with it: Mamba's projections, experts in one 3-D
tensor, `torch.nn.MultiheadAttention`. They read a tensor that looks like the weight. Products with it use the low-rank
factors or W0 + delta W, whichever is cheaper; selecting matrices of a stack computes nothing; any other operation uses
W0 + delta W. Therefore, every operation is correct, and common operations are cheap.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from veratune.layers.read_only_weight import ABOUT, ReadableLayer, check_not_written, protected
from veratune.utils.torch_private import modes_active, transformations_active


@dataclass(frozen=True)
class View:
    """The part of a layer's weight that a stand-in represents.

    Attributes:
        layer: the layer.
        base: this part of W0, in the layer's layout.
        index: the index into the stack of matrices, or None for the entire stack.
        flipped: whether the last two dimensions are swapped relative to `base`.
        outside: whether the weight was read by code that may not call the layer.
    """

    layer: ReadableLayer
    base: Tensor
    index: Any = None
    flipped: bool = False
    outside: bool = False

    @property
    def outputs_first(self) -> bool:
        """Whether the stand-in's shape is (..., out, in), rather than (..., in, out)."""
        return (self.layer.out_axis == 0) != self.flipped

    def shown(self) -> Tensor:
        return self.base.mT if self.flipped else self.base

    def note_use(self) -> None:
        """Record on the layer that its weight was used in a computation without calling the layer."""
        if self.outside:
            self.layer.weight_was_read = True

    def added_up(self) -> Tensor:
        self.note_use()
        added = self.layer.adapted_part(self.base, self.index)
        return added.mT if self.flipped else added

    def stand_in(self) -> "AdaptedWeight":
        tensor = self.shown().detach()
        if torch.is_grad_enabled() and not transformations_active() and not modes_active():
            sources = self.sources()
            if any(source.requires_grad for source in sources):
                tensor = _Linked.apply(tensor, self, *sources)  # type: ignore[no-untyped-call]
        weight = tensor.as_subclass(AdaptedWeight)
        weight._view = self
        return weight

    def sources(self) -> list[Tensor]:
        """Return the tensors that W0 + delta W is computed from: W0 and the vectors of the added adapters."""
        names = self.layer.added_adapters
        # Layers of a bank have no vectors; they raise an error when the weight is read.
        known = [name for name in names if name in self.layer.entries]
        return [self.base, *(vector for name in known for vector in self.layer.vectors(name).values())]


class _Linked(torch.autograd.Function):
    """Connect a stand-in to the graph, for autograd functions that take it as input and return its gradient."""

    @staticmethod
    def forward(ctx: Any, shown: Tensor, view: View, *sources: Tensor) -> Tensor:
        ctx.view, ctx.sources = view, sources
        return shown.view_as(shown)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        view, sources = ctx.view, ctx.sources
        now = view.sources()
        if len(now) != len(sources) or any(one is not other for one, other in zip(now, sources, strict=True)):
            raise RuntimeError(
                "an adapted weight that was read in the forward pass has different adapters or vectors in the backward"
                " pass: call backward() before activating, merging, disabling or removing adapters"
            )
        wanted = [source for source in sources if source.requires_grad]
        with torch.enable_grad():
            weight = view.added_up()
            grads = iter(torch.autograd.grad(weight, wanted, gradient.to(weight.dtype), allow_unused=True))
        return None, None, *(next(grads) if source.requires_grad else None for source in sources)


class AdaptedWeight(Tensor):
    """A weight, or some matrices of a stack of weights, whose deltas are not yet computed."""

    _view: View
    _computed: Tensor | None = None

    def _in_memory(self) -> Tensor:
        """Return W0 + delta W, kept alive by this tensor, for kernels that receive its address."""
        if self._computed is None:
            with torch.no_grad():
                self._computed = self._view.added_up()
        return self._computed

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _MEMORY:
            return func(args[0]._in_memory(), *args[1:], **kwargs)
        scales = getattr(func, "__name__", "") in ("mul_", "div_") and isinstance(args[0], AdaptedWeight)
        if scales and len(args) > 1 and isinstance(args[1], int | float) and args[1] == 1:
            return args[0]  # RWKV rescales its first layers by a factor of one
        check_not_written(func, args, kwargs)
        cheap = _CHEAP.get(func)
        if cheap is not None:
            result = cheap(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        weights: list[tuple[View, Tensor]] = []
        computed = {name: _added_up(value, weights) for name, value in kwargs.items()}
        result = func(*(_added_up(value, weights) for value in args), **computed)
        for view, weight in weights:
            result = protected(result, weight, view.layer, outside=view.outside)
        return result


# Methods that expose how a tensor's values are stored in memory.
_MEMORY = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.storage_offset, Tensor.stride}


def _added_up(value: Any, weights: list[tuple[View, Tensor]]) -> Any:
    """Return an argument with stand-ins replaced by W0 + delta W, each of which is appended to `weights`."""
    if isinstance(value, AdaptedWeight):
        weight = value._view.added_up()
        weights.append((value._view, weight))
        return weight
    if isinstance(value, list | tuple) and any(isinstance(part, AdaptedWeight) for part in value):
        return type(value)(_added_up(part, weights) for part in value)
    return value


# Operations with a cheap implementation. Each returns NotImplemented for arguments that it does not support.


def _choose(func: Any, weight: Any, index: Any) -> Any:
    """Return weight[index], one or more matrices of a stack, for an integer or a vector of integers."""
    if not isinstance(weight, AdaptedWeight) or isinstance(index, AdaptedWeight):
        return NotImplemented
    view = weight._view
    single = isinstance(index, int) and not isinstance(index, bool)
    several = isinstance(index, Tensor) and index.ndim <= 1 and index.dtype in (torch.int64, torch.int32)
    if view.index is not None or view.layer.geometry.count is None or weight.ndim != 3 or not (single or several):
        return NotImplemented
    return replace(view, base=view.base[index], index=index).stand_in()


def _transpose(func: Any, weight: Any, first: Any = -2, second: Any = -1) -> Any:
    """Return the weight with its last two dimensions swapped."""
    if not isinstance(weight, AdaptedWeight) or not isinstance(first, int) or not isinstance(second, int):
        return NotImplemented
    if {first % weight.ndim, second % weight.ndim} != {weight.ndim - 2, weight.ndim - 1}:
        return NotImplemented
    return replace(weight._view, flipped=not weight._view.flipped).stand_in()


def _transpose_matrix(func: Any, weight: Any) -> Any:
    return _transpose(func, weight) if weight.ndim == 2 else NotImplemented


def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, AdaptedWeight) or isinstance(input, AdaptedWeight) or isinstance(bias, AdaptedWeight):
        return NotImplemented
    if weight.ndim != 2 or not weight._view.outputs_first:
        return NotImplemented
    # The bias is part of the product, as in torch: adding it afterwards would round the outputs once more.
    return _product(input, weight._view, bias)


def _matmul(func: Any, left: Any, right: Any) -> Any:
    if isinstance(left, AdaptedWeight) == isinstance(right, AdaptedWeight):
        return NotImplemented
    if isinstance(right, AdaptedWeight):
        usable = not right._view.outputs_first and isinstance(left, Tensor) and left.ndim >= max(2, right.ndim)
        return _product(left, right._view) if usable else NotImplemented
    usable = left._view.outputs_first and isinstance(right, Tensor) and right.ndim >= max(2, left.ndim)
    product = _product(right.mT, left._view) if usable else NotImplemented
    return product if product is NotImplemented else product.mT


def _right_matmul(func: Any, right: Any, left: Any) -> Any:
    return _matmul(func, left, right)


def _grouped_mm(func: Any, left: Any, right: Any, *, offs: Any = None, bias: Any = None, **settings: Any) -> Any:
    """Multiply each group of consecutive rows by its matrix of a stack."""
    if not isinstance(right, AdaptedWeight) or isinstance(left, AdaptedWeight) or offs is None or bias is not None:
        return NotImplemented
    view = right._view
    if left.ndim != 2 or right.ndim != 3 or view.index is not None or view.outputs_first:
        return NotImplemented
    view.note_use()
    start = func(left, view.shown(), offs=offs, **settings)
    rows = torch.arange(len(left), device=left.device)
    groups = torch.searchsorted(offs.long(), rows, right=True).clamp_(max=len(offs) - 1)
    # Rows after the last group have no defined result, so nothing is added to them.
    beyond = rows >= offs[-1]
    added = view.layer.add_rows(torch.zeros_like(start), left, groups)
    return start + added.masked_fill(beyond[:, None], 0.0)


def _product(x: Tensor, view: View, bias: Tensor | None = None) -> Any:
    """Return x W^T + bias, (..., out), with the adapted weight W, or x W^T with a stack of adapted weights."""
    if type(x) is not Tensor or x.shape[-1] != view.layer.in_features:
        return NotImplemented
    view.note_use()
    return view.layer.product(x, view.base, view.index, bias)


_CHEAP: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _choose,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.t: _transpose_matrix,
    torch.t: _transpose_matrix,
    vars(torch._C.TensorBase)["T"].__get__: _transpose_matrix,
    vars(torch._C.TensorBase)["mT"].__get__: _transpose,
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _right_matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _matmul,
    Tensor.bmm: _matmul,
}
for _name, _module in (("grouped_mm", F), ("_grouped_mm", torch)):
    if hasattr(_module, _name):
        _CHEAP[getattr(_module, _name)] = _grouped_mm
