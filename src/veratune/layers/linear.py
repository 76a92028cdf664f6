"""VeRA on `torch.nn.Linear` and on `transformers`' `Conv1D`, which stores its weight as (in, out)."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veratune.functional import project_down, vera_add, vera_linear
from veratune.layers.base import Slot, VeraLayer
from veratune.profiles import device_profile
from veratune.routing import Plan, look_up, plan_table, representative_tokens


class VeraLinear(VeraLayer):
    """A linear layer with VeRA adapters.

    The base layer is computed together with the adapter where nothing but its weight and bias matters; a base layer
    with hooks, or of a class with a forward of its own, is called as it is and the adapter's part is added.
    """

    plain_forwards: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Linear.forward",)

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__(base_layer, in_features, out_features)
        forward = type(base_layer).forward
        self._plain_class = f"{forward.__module__}.{forward.__qualname__}" in self.plain_forwards

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = input  # called by name, as in torch.nn.Linear
        active = self.added_adapters
        if not active:
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        first = active[0]
        dtype = None
        if not args and not kwargs and x.shape[-1:] == (self.in_features,) and self.weight_at_hand(first):
            dtype = _compute_dtype(x, self.base_weight.dtype)
        if dtype is not None:
            output = self._fused(x, first, dtype)
            remaining = active[1:]
        else:
            output = self._checked_base_output(x, *args, **kwargs)
            remaining = active
        for name in remaining:
            output = self._add(output, x, name)
        return output

    def _checked_base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if output.shape != (*x.shape[:-1], self.out_features):
            raise RuntimeError(
                f"{type(self.base_layer).__name__} turned an input of shape {tuple(x.shape)} into {tuple(output.shape)}"
                f", which a linear layer of {self.in_features} inputs and {self.out_features} outputs does not do, so"
                " VeRA cannot be added to it: name it in exclude_modules"
            )
        return output

    def weight_at_hand(self, name: str) -> bool:
        return not self._drops(name) and self._is_plain()

    def _is_plain(self) -> bool:
        base = self.base_layer
        return (
            self._plain_class
            and "forward" not in base.__dict__
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and not base._backward_hooks
            and not base._backward_pre_hooks
        )

    def _drops(self, name: str) -> bool:
        return self.training and name in self.vera_dropout

    def _training(self, name: str) -> bool:
        return torch.is_grad_enabled() and any(vector.requires_grad for vector in self.vectors(name))

    def _plan(self, name: str, x: Tensor, dtype: torch.dtype, *, weight_at_hand: bool) -> Plan:
        table = _plan_table(self.slots[name], x.device, dtype, self._training(name), weight_at_hand)
        tokens = math.prod(x.shape[:-1])
        return look_up(table, representative_tokens(tokens) if torch.compiler.is_compiling() else tokens)

    def _fused(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        slot = self.slots[name]
        weight, bias = self.base_weight, self.bias
        b, d = self.vectors(name)
        plan = self._plan(name, x, dtype, weight_at_hand=True)
        flat = x.to(dtype).reshape(math.prod(x.shape[:-1]), self.in_features)
        a_projection = slot.a.tensor(x.device, dtype)
        down = None
        if plan.needs_down:
            down = slot.group.down.get(slot.name, x, a_projection, lambda: project_down(flat, a_projection))
        output = vera_linear(
            flat,
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            a_projection,
            slot.b.tensor(x.device, dtype),
            b,
            d,
            slot.gain,
            plan,
            transposed=self.out_axis == 1,
            down=down,
        )
        return output.view(*x.shape[:-1], self.out_features)

    def _add(self, output: Tensor, x: Tensor, name: str) -> Tensor:
        slot = self.slots[name]
        b, d = self.vectors(name)
        dtype = output.dtype
        plan = self._plan(name, x, dtype, weight_at_hand=False)
        flat = x.to(dtype).reshape(math.prod(x.shape[:-1]), self.in_features)
        a_projection = slot.a.tensor(x.device, dtype)
        down = None
        if self._drops(name):
            flat = self.vera_dropout[name](flat)
        else:
            down = slot.group.down.get(slot.name, x, a_projection, lambda: project_down(flat, a_projection))
        added = vera_add(
            output.reshape(math.prod(x.shape[:-1]), self.out_features),
            flat,
            a_projection,
            slot.b.tensor(x.device, dtype),
            b,
            d,
            slot.gain,
            plan,
            down=down,
        )
        return added.view(output.shape)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _plan_table(
    slot: Slot, device: torch.device, dtype: torch.dtype, training: bool, weight_at_hand: bool
) -> tuple[tuple[int, Plan], ...]:
    # A compiler need not trace the search for what depends on constants alone.
    profile = device_profile(device, dtype)
    return plan_table(slot.settings.route, slot.settings.memory, slot.shape, profile, training, weight_at_hand)


def _compute_dtype(x: Tensor, weight_dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which torch computes a linear layer here, or None where it refuses to."""
    device = x.device.type
    if (
        device != "meta"
        and torch.is_autocast_enabled(device)
        and all(dtype.is_floating_point and dtype != torch.float64 for dtype in (x.dtype, weight_dtype))
    ):
        return torch.get_autocast_dtype(device)
    return x.dtype if x.dtype == weight_dtype else None


class VeraConv1D(VeraLinear):
    """VeRA on `transformers.pytorch_utils.Conv1D` (GPT-2): a linear layer whose weight is (in, out)."""

    out_axis = 1
    plain_forwards = ("transformers.pytorch_utils.Conv1D.forward",)

    # The name that Conv1D gives its argument.
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, *args, **kwargs)
