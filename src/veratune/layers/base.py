"""`VeraLayer`, the base class of all adapted layers: merging, and computing with the adapted weight."""

import math
from typing import Any

import torch
from torch import Tensor

from veratune.layers.base_call import plain_tensor
from veratune.layers.lazy_weight import View
from veratune.layers.merging import MergeableLayer
from veratune.layers.offloading import is_offloaded, loaded
from veratune.layers.plan import choose, compute_dtype, exact_rows
from veratune.layers.products import plus_adapter
from veratune.layers.read_only_weight import read_only
from veratune.ops.delta import add_delta
from veratune.ops.linear import adapted_linear
from veratune.ops.rows import stack_residual
from veratune.utils.torch_private import parameter_of


class VeraLayer(MergeableLayer):
    """An adapted layer whose weight can also be read without calling the layer.

    Attributes:
        weight_was_read: whether the adapted weight was used in a computation without calling the layer.
    """

    weight_was_read: bool = False

    @property
    def bias(self) -> Tensor | None:
        bias = parameter_of(self.base_layer, "bias")
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def weight(self) -> Tensor:
        """The adapted weight, for code that reads it without calling the layer: W0 plus the deltas of active adapters.

        Some models read weights directly (Mamba's dt_proj, WavLM's attention). The adapted weight is differentiable
        with respect to the vectors, and computed only when an operation needs its values: reading its dtype or shape
        costs nothing.
        """
        return self.weight_over(self.base_weight, outside=True)

    def weight_over(self, base: Tensor, *, outside: bool = False) -> Tensor:
        """Return the adapted weight for a given W0, such as a replica's.

        Args:
            base: W0.
            outside: whether the caller may use the result without calling the layer. Computing with it then sets
                `weight_was_read`.
        """
        self.check_recomputation()
        if base.is_meta and is_offloaded(self.base_layer, self.weight_name):
            base = loaded(self.base_layer, self.weight_name)
        if not self.added_adapters:
            return base
        matrix = self.matrix(base)
        if torch.compiler.is_compiling() or not plain_tensor(base):
            return self.added_up(base)
        if matrix.shape != base.shape or not self.multiplies_lazily:
            return read_only(self.added_up(base), self, outside=outside)
        return View(self, base, outside=outside).stand_in()

    def adapted_weight(self) -> Tensor:
        """Return W0 with the deltas that `forward` adds, in W0's layout and dtype, differentiably."""
        return self.added_up(self.full_weight())

    def added_up(self, base: Tensor) -> Tensor:
        """Return a given W0 with the deltas that `forward` adds, in the layout of W0."""
        return self.like_weight(self.adapted_part(self.matrix(base), None))

    def adapted_part(self, base: Tensor, index: Any) -> Tensor:
        """Return W0 with the deltas that `forward` adds.

        Args:
            base: W0 as `matrix` returns it, or selected matrices of the stack.
            index: which matrices of the stack `base` contains; None for all, or if there is no stack.
        """
        weight = self._outputs_first(base)
        for name in self.added_adapters:
            dtype = torch.promote_types(self.vectors(name)["b"].dtype, torch.float32)
            parts = self.factors_by_part(name, weight.device, dtype)
            if len(parts) == 1:
                weight = add_delta(weight, parts[0].factors.at(index))
            else:
                weight = torch.cat([add_delta(weight[part.outputs], part.factors) for part in parts])
        return self._outputs_first(weight)

    def product(self, x: Tensor, base: Tensor, index: Any, bias: Tensor | None = None) -> Any:
        """Return x W^T + bias, (..., out), with the adapted weight W, or NotImplemented.

        NotImplemented is returned for combinations of dtypes that torch rejects, and for fused layers.

        Args:
            x: (..., in).
            base: W0 as `matrix` returns it, or selected matrices of the stack.
            index: which matrices of the stack `base` contains; None for all, or if there is no stack.
            bias: (out,) or None; must be None if `base` is a stack.
        """
        dtype = compute_dtype(x, base.dtype)
        if dtype is None or self.entries[self.added_adapters[0]].parts:
            return NotImplemented
        x = x.to(dtype)
        if base.ndim == 2:
            return self._matrix_product(x, base.to(dtype), index, None if bias is None else bias.to(dtype))
        output = torch.matmul(x, self._outputs_first(base).to(dtype).mT)
        if x.ndim < 3 or len(x) != len(base):
            x = x.expand(*output.shape[:-1], self.in_features)
        chosen = torch.arange(len(base), device=x.device) if index is None else index.to(torch.int64)
        # The third-to-last dimension of the output indexes the matrices; all rows at one index use the same matrix.
        groups = chosen.repeat_interleave(output.shape[-2]).repeat(math.prod(output.shape[:-3]))
        rows = output.reshape(-1, self.out_features)
        return self.add_rows(rows, x.reshape(-1, self.in_features), groups).view(output.shape)

    def _matrix_product(self, x: Tensor, weight: Tensor, index: Any, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias for one matrix of the stack, or the only matrix. All tensors are in the compute dtype."""
        flat = x.reshape(math.prod(x.shape[:-1]), self.in_features)
        output = None
        for name in self.added_adapters:
            parts = self.factors_by_part(name, x.device, x.dtype)
            choices = choose(self.entries[name], self._pair(name), x, x.dtype, weight_readable=output is None)
            if output is None:
                factors = parts[0].factors.at(index)
                output = adapted_linear(flat, weight, bias, factors, choices[0], transposed=self.out_axis == 1)
            else:
                output = plus_adapter(output, flat, parts, choices, index=index)
        assert output is not None
        return output.view(*x.shape[:-1], self.out_features)

    def add_rows(self, start: Tensor, x: Tensor, groups: Tensor) -> Tensor:
        """Return start + x delta W^T, where each row of x belongs to one matrix of the stack.

        Args:
            start: (T, out).
            x: (T, in).
            groups: int64 (T,), the index of each row's matrix in the stack.
        """
        for name in self.added_adapters:
            (part,) = self.factors_by_part(name, x.device, x.dtype)
            exactly = exact_rows(self.entries[name], part.factors, x)
            start = stack_residual(start, x, part.factors, groups, exactly=exactly)
        return start

    def weight_readable(self, name: str) -> bool:
        """Return whether an adapter may be computed by a route that reads W0 if it is the only active adapter."""
        return False

    # Export as a LoRA

    def _drawn_a(self, name: str) -> Tensor:
        return self.entries[name].a.drawn()

    def _drawn_factors(self, name: str) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """Return A (r, in), B (out, r) with its scale for each part, b and d of an adapter; all but A in float64."""
        vectors = {which: vector.detach().double().cpu() for which, vector in self.vectors(name).items()}
        entry = self.entries[name]
        b_parts = [view.drawn().double().t() * entry.scale for view in entry.b]
        return self._drawn_a(name), b_parts, vectors["b"], vectors["d"]

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        a, b_parts, b, d = self._drawn_factors(name)
        if not self.entries[name].parts:
            return (d[:, None] * a).float(), (b[:, None] * b_parts[0]).float()
        # All parts share A, so the d of each part is multiplied into its B.
        scaled = [b_part * part_d for b_part, part_d in zip(b_parts, d, strict=True)]
        return a.clone(), (b[:, None] * torch.cat(scaled)).float()


class TransparentLayer(VeraLayer):
    """A layer that exposes its base layer's attributes, which models read (for example a convolution's stride)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if name.startswith("_") or "base_layer" not in modules:  # private, or being copied or unpickled
                raise
            return getattr(modules["base_layer"], name)
