"""VeRA for `torch.nn.Linear`, and for `Conv1D` of transformers, which stores its weight as (in, out)."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veratune.layers.base import VeraLayer
from veratune.layers.base_call import (
    call_with,
    check_not_computed,
    computes,
    has_own_forward,
    only_computes,
    plain_tensor,
)
from veratune.layers.geometry import Geometry
from veratune.layers.kind import Export
from veratune.layers.plan import plan_linear
from veratune.layers.products import plus_adapter
from veratune.layers.quantized import (
    codes_of,
    dequantized,
    hand_back,
    is_quantized,
    keep_differentiable,
    loss_of_merging,
    quantized_codes,
    requantized,
    spoils_gradients,
    why_not_readable,
)
from veratune.layers.read_only_weight import read_only
from veratune.ops.linear import adapted_linear, project
from veratune.ops.planning import RouteChoice
from veratune.projections.structure import Matrix
from veratune.utils.sharding import describe_sharding, shape_of
from veratune.utils.tensors import cast, gradients_wanted
from veratune.utils.torch_private import parameter_of


def is_out_proj(module: nn.Module) -> bool:
    """Return whether a module is the output projection of `torch.nn.MultiheadAttention`, which reads its weight."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def _says_it_is_linear(module: nn.Module) -> bool:
    """Return whether a module has the dimensions of a linear layer as attributes, as quantized linear layers do."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        return False
    has_tensors = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    return has_tensors and not any(True for child in module.children() for _ in child.parameters())


def _has_ordinary_weight(module: nn.Module) -> bool:
    """Return whether a module is a torch or transformers linear layer, whose weight is a plain parameter by default."""
    # If a model contains a Conv1D, the module that defines the class has been imported.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
    return isinstance(module, nn.Linear | conv1d)


def _is_plain_forward(kind: "type[VeraLinear]", module: nn.Module) -> bool:
    forward = type(module).forward
    return f"{forward.__module__}.{forward.__qualname__}" in kind.plain_forwards


class VeraLinear(VeraLayer):
    """A linear layer with VeRA adapters.

    The base layer and an adapter are computed together if the output depends only on input, weight and bias. A base
    layer with a different `forward` is called with the adapted weight. With hooks, a quantized weight or dropout, the
    base layer is called unchanged and the adapter's output is added.
    """

    kind = "linear"
    in_all_linear = True
    chooses_route = True
    supports_parts = True
    supports_one_rank_schemes = True
    exports: ClassVar[frozenset[Export]] = frozenset(("peft", "lora", "vllm", "gguf"))
    plain_forwards: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Linear.forward",)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or _says_it_is_linear(module)

    @classmethod
    def geometry_of(cls, module: nn.Module) -> Geometry:
        in_features, out_features = module.in_features, module.out_features
        assert isinstance(in_features, int) and isinstance(out_features, int)
        return Geometry(in_features, out_features)

    @classmethod
    def why_not_adaptable(cls, module: nn.Module) -> str | None:
        own_forward = not _is_plain_forward(cls, module) and _has_ordinary_weight(module)
        if own_forward and module._parameters.get("weight") is None and computes(module, "weight"):
            return (
                f"{type(module).__name__} computes its weight from other parameters and has a custom forward, which"
                " cannot use an adapted weight: undo the parametrization first (with remove_parametrizations,"
                " remove_weight_norm or prune.remove in torch.nn.utils)"
            )
        return super().why_not_adaptable(module)

    @classmethod
    def supports_dropout(cls, module: nn.Module) -> bool:
        return not is_out_proj(module) and not (isinstance(module, nn.Linear) and has_own_forward(module))

    def __init__(self, base_layer: nn.Module, geometry: Geometry) -> None:
        super().__init__(base_layer, geometry)
        # The codes of the quantized weight, while a merged weight replaces it.
        self._codes: Any = None
        self._plain_class = _is_plain_forward(type(self), base_layer)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = input  # named `input` in torch.nn.Linear, and callers may pass it by keyword
        self.check_recomputation()
        output: Tensor
        names, base = self.added_adapters, self._modules["base_layer"]
        assert base is not None
        if not names:
            output = base(x, *args, **kwargs)
            return output
        several = len(names) > 1 or bool(self.entries[names[0]].parts)
        replaceable = (several or not self._plain_class) and self._weight_can_be_replaced()
        if replaceable and not self._plain_class:
            replacing = self.weight_over(self.base_weight)
            output = call_with(base, lambda: {"weight": replacing}, (x, *args), kwargs)
            return output
        weight = self._plain_weight(base)
        adapters = [(self.entries[name], self._pair(name)) for name in names]
        plan = plan_linear(
            adapters,
            x,
            weight_dtype=None if weight is None else weight.dtype,
            replaceable=replaceable,
            together=not (args or kwargs or self._drops(names[0])) and x.shape[-1:] == (self.in_features,),
        )
        if plan.how == "weight":
            output = call_with(base, lambda: {"weight": self.adapted_weight()}, (x, *args), kwargs)
            return output
        if plan.how == "together":
            assert weight is not None
            output = self._together(x, weight, names[0], adapters[0][1], plan.choices[0][0], plan.dtype)
            if len(names) == 1:
                return output
            names, choices = names[1:], plan.choices[1:]
        else:
            output, choices = self._checked_base_output(x, *args, **kwargs), plan.choices
        for name, own in zip(names, choices, strict=True):
            output = self._plus_adapter(output, x, name, own)
        return output

    def _weight_can_be_replaced(self) -> bool:
        """Return whether the base layer can be called with the adapted weight, which dropout rules out."""
        weight = self.base_layer._parameters.get("weight")
        if weight is None and not self._plain_class and _has_ordinary_weight(self.base_layer):
            check_not_computed(self.base_layer, ["weight"])
        if weight is None or is_quantized(self.base_layer) or weight.dtype.itemsize < 2:
            return False
        return "forward" not in self.base_layer.__dict__ and not any(map(self._drops, self.added_adapters))

    def _checked_base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        vectors = (vector for name in self.entries for vector in self.vectors(name).values())
        if spoils_gradients(self.base_layer) and gradients_wanted(x, *vectors):
            keep_differentiable(self.base_layer)
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if not isinstance(output, Tensor) or output.shape != (*x.shape[:-1], self.out_features):
            result = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise RuntimeError(
                f"{type(self.base_layer).__name__} mapped an input of shape {tuple(x.shape)} to {result}, unlike a"
                f" linear layer with {self.in_features} inputs and {self.out_features} outputs, so VeRA cannot adapt"
                " it: add it to exclude_modules"
            )
        return output

    def _together(
        self,
        x: Tensor,
        weight: Tensor,
        name: str,
        pair: tuple[Tensor, Tensor],
        choice: RouteChoice,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the output of the base layer with one adapter, computed by one route.

        Args:
            x: (..., in).
            weight: W0.
            name: the adapter.
            pair: its vectors b and d.
            choice: the route.
            dtype: the compute dtype.
        """
        bias = self.bias
        flat = cast(x, dtype)
        if x.ndim != 2:
            flat = flat.reshape(math.prod(x.shape[:-1]), self.in_features)
        factors = self.factors(name, flat.device, dtype, pair)
        output = adapted_linear(
            flat,
            cast(weight, dtype),
            None if bias is None else cast(bias, dtype),
            factors,
            choice,
            transposed=self.out_axis == 1,
            xa=self._shared_xa(name, x, flat, factors.A),
        )
        return output if x.ndim == 2 else output.view(*x.shape[:-1], self.out_features)

    def _plus_adapter(self, output: Tensor, x: Tensor, name: str, choices: Sequence[RouteChoice]) -> Tensor:
        """Return the output plus one adapter's output."""
        tokens = math.prod(x.shape[:-1])
        flat = x.to(output.dtype).reshape(tokens, self.in_features)
        parts = self.factors_by_part(name, flat.device, flat.dtype)
        xa = None
        if self._drops(name):
            flat = self.vera_dropout[name](flat)
        else:
            xa = self._shared_xa(name, x, flat, parts[0].factors.A)
        return plus_adapter(output.reshape(tokens, self.out_features), flat, parts, choices, xa=xa).view(output.shape)

    def _shared_xa(self, name: str, x: Tensor, flat: Tensor, A: Matrix) -> Callable[[bool], Tensor] | None:  # noqa: N803
        """Return a function that computes x A^T once for all layers with the same input; None if no layer shares it.

        The function's argument is whether the product must be exact.
        """
        entry = self.entries[name]
        if entry.group.size == 1:
            return None
        cache = entry.group.cache
        return lambda exactly: cache.get(
            entry.name, x, A.values, lambda: project(flat, A, exactly=exactly), exactly=exactly
        )

    def weight_readable(self, name: str) -> bool:
        return not self._drops(name) and self._is_plain()

    def _is_plain(self) -> bool:
        """Return whether the output depends only on the input, the weight and the bias."""
        return self._plain_weight(self.base_layer) is not None

    def _plain_weight(self, base: nn.Module) -> Tensor | None:
        """Return the base layer's weight if the output depends only on the input, the weight and the bias."""
        if not self._plain_class or not only_computes(base):
            return None
        weight = parameter_of(base, "weight")
        if not isinstance(weight, Tensor):
            weight = self.base_weight
        return weight if plain_tensor(weight) and weight.is_floating_point() else None

    def _drops(self, name: str) -> bool:
        if not self.training:
            return False
        dropouts = self._modules["vera_dropout"]
        assert dropouts is not None
        return name in dropouts._modules

    # Quantized weights: reading and merging

    def weight_over(self, base: Tensor, *, outside: bool = False) -> Tensor:
        if not self.added_adapters or not is_quantized(self.base_layer) or describe_sharding(base) is not None:
            return super().weight_over(base, outside=outside)
        self.check_recomputation()
        reason = why_not_readable(self.base_layer)
        if reason is not None:
            raise RuntimeError(f"the weight of {self._called()} cannot be read while adapters are active: {reason}")
        return read_only(self.adapted_weight(), self, outside=outside)

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

    def _merged_bits(self) -> Tensor:
        codes = quantized_codes(self.base_layer)
        return super()._merged_bits() if codes is None else codes

    def _as_parameter(self, merged: Tensor, original: nn.Parameter) -> nn.Parameter:
        if is_quantized(self.base_layer):
            return requantized(self.base_layer, merged)
        return super()._as_parameter(merged, original)


class VeraConv1D(VeraLinear):
    """VeRA for `transformers.pytorch_utils.Conv1D` (GPT-2), a linear layer whose weight is (in, out)."""

    out_axis = 1
    plain_forwards = ("transformers.pytorch_utils.Conv1D.forward",)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return _has_ordinary_weight(module) and not isinstance(module, nn.Linear)

    @classmethod
    def geometry_of(cls, module: nn.Module) -> Geometry:
        assert isinstance(module.weight, Tensor)
        return Geometry(*shape_of(module.weight))

    # Conv1D's argument is named `x`.
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, *args, **kwargs)
