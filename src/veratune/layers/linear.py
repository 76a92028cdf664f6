"""VeRA on `torch.nn.Linear` and on `transformers`' `Conv1D`, which stores its weight as (in, out)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veratune.layers.base import VeraLayer, call_with, only_computes, plain_tensor
from veratune.layers.geometry import Geometry
from veratune.layers.products import add, choose, compute_dtype, multiply
from veratune.layers.quantized import (
    codes_of,
    dequantized,
    hand_back,
    is_quantized,
    keep_differentiable,
    loss_of_merging,
    requantized,
    spoils_gradients,
    why_not_readable,
)
from veratune.ops.linear import project
from veratune.utils.tensors import gradients_wanted


class VeraLinear(VeraLayer):
    """A linear layer with VeRA adapters.

    The base layer is computed together with the adapter where nothing but its weight and bias matters. A base layer of
    a class with a forward of its own is called, and reads the adapted weight. One with hooks, with a quantized weight
    or beside dropout is called as it is, and the adapter's part is added.
    """

    plain_forwards: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Linear.forward",)

    def __init__(self, base_layer: nn.Module, geometry: Geometry) -> None:
        super().__init__(base_layer, geometry)
        forward = type(base_layer).forward
        # What a quantized layer computes with while its weight waits for `unmerge`.
        self._codes: Any = None
        self._plain_class = f"{forward.__module__}.{forward.__qualname__}" in self.plain_forwards

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = input  # called by name, as in torch.nn.Linear
        self.check_recomputation()
        active = self.added_adapters
        if not active:
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        first = active[0]
        special = not self._plain_class or bool(self.entries[first].parts) or len(active) > 1
        if special and self._reads_weight(active, x):
            weight = self.adapted_weight() if self._plain_class else self.weight_over(self.base_weight)
            read: Tensor = call_with(self.base_layer, lambda: {"weight": weight}, (x, *args), kwargs)
            return read
        dtype = None
        alone = not self.entries[first].parts and not args and not kwargs and x.shape[-1:] == (self.in_features,)
        if alone and self.weight_readable(first):
            dtype = compute_dtype(x, self.base_weight.dtype)
        if dtype is not None:
            output = self._fused(x, first, dtype)
            remaining = active[1:]
        else:
            output = self._checked_base_output(x, *args, **kwargs)
            remaining = active
        for name in remaining:
            output = self._add(output, x, name)
        return output

    def _reads_weight(self, names: Sequence[str], x: Tensor) -> bool:
        """Return whether the base layer is to be called with the adapted weight, rather than something added to it."""
        weight = self.base_layer._parameters.get("weight")
        if weight is None or is_quantized(self.base_layer) or weight.dtype.itemsize < 2:
            return False
        if "forward" in self.base_layer.__dict__ or any(self._drops(name) for name in names):
            return False
        # Several adapters, or parts, are the cheapest in one added-up weight where each of them is.
        return not self._plain_class or all(self._is_dense(name, x) for name in names)

    def _is_dense(self, name: str, x: Tensor) -> bool:
        entry = self.entries[name]
        part = entry.parts.index(max(entry.parts)) if entry.parts else 0
        training = gradients_wanted(*self.vectors(name))
        return choose(entry, part, x, training=training, weight_readable=self._is_plain()).reads_weight

    def _checked_base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if spoils_gradients(self.base_layer) and gradients_wanted(
            x, *self.vera_lambda_b.values(), *self.vera_lambda_d.values()
        ):
            keep_differentiable(self.base_layer)
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if not isinstance(output, Tensor) or output.shape != (*x.shape[:-1], self.out_features):
            result = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise RuntimeError(
                f"{type(self.base_layer).__name__} turned an input of shape {tuple(x.shape)} into {result}, which a"
                f" linear layer of {self.in_features} inputs and {self.out_features} outputs does not do, so VeRA"
                " cannot be added to it: name it in exclude_modules"
            )
        return output

    def weight_readable(self, name: str) -> bool:
        return not self._drops(name) and self._is_plain()

    def full_weight(self) -> Tensor:
        return dequantized(self.base_layer) if is_quantized(self.base_layer) else super().full_weight()

    def why_not_mergeable(self) -> str | None:
        return why_not_readable(self.base_layer) if is_quantized(self.base_layer) else super().why_not_mergeable()

    def loss_of_merging(self) -> str | None:
        return loss_of_merging(self.base_layer) if is_quantized(self.base_layer) else None

    def merge(self, names: Sequence[str]) -> None:
        codes = codes_of(self.base_layer)
        super().merge(names)
        self._codes = codes

    def unmerge(self) -> None:
        merged = bool(self.merged_adapters)
        super().unmerge()
        if merged:
            hand_back(self.base_layer, self._codes)
            self._codes = None

    def _as_parameter(self, merged: Tensor, original: nn.Parameter) -> nn.Parameter:
        if is_quantized(self.base_layer):
            return requantized(self.base_layer, merged)
        return super()._as_parameter(merged, original)

    def _is_plain(self) -> bool:
        base = self.base_layer
        return (
            self._plain_class
            and only_computes(base)
            and plain_tensor(self.base_weight)
            and self.base_weight.is_floating_point()
        )

    def _drops(self, name: str) -> bool:
        return self.training and name in self.vera_dropout

    def _down(self, name: str, x: Tensor, flat: Tensor) -> Callable[[], Tensor]:
        """Return what gives x A^T: this layer's own product, or that of a layer which has had the same input."""
        entry = self.entries[name]
        A = entry.a.matrix(flat.device, flat.dtype)  # noqa: N806
        return lambda: entry.group.cache.get(entry.name, x, A.values, lambda: project(flat, A))

    def _fused(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        weight, bias = self.base_weight, self.bias
        flat = x.to(dtype).reshape(math.prod(x.shape[:-1]), self.in_features)
        output = multiply(
            self,
            name,
            flat,
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            xa=self._down(name, x, flat),
        )
        return output.view(*x.shape[:-1], self.out_features)

    def _add(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        tokens = math.prod(x.shape[:-1])
        flat = x.to(output.dtype).reshape(tokens, self.in_features)
        xa = None
        if self._drops(name):
            flat = self.vera_dropout[name](flat)
        else:
            xa = self._down(name, x, flat)
        return add(self, name, output.reshape(tokens, self.out_features), flat, xa=xa).view(output.shape)


class VeraConv1D(VeraLinear):
    """VeRA on `transformers.pytorch_utils.Conv1D` (GPT-2): a linear layer whose weight is (in, out)."""

    out_axis = 1
    plain_forwards = ("transformers.pytorch_utils.Conv1D.forward",)

    # The name that Conv1D gives its argument.
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, *args, **kwargs)
