"""VeRA for `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, treated as linear layers on patches (im2col)."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veratune.layers.base import TransparentLayer
from veratune.layers.base_call import call_with, has_own_forward, stand_in_for
from veratune.layers.geometry import Geometry
from veratune.layers.kind import Export
from veratune.ops.delta import add_delta
from veratune.utils.sharding import shape_of


class VeraConv(TransparentLayer):
    """A convolution with VeRA adapters.

    The weight (out, in / groups, *kernel) is treated as one matrix with in / groups * prod(kernel) inputs. W0 + delta W
    is computed with a small product and the convolution runs once, because the number of patches is almost always far
    larger than the rank.
    """

    kind = "convolution"
    supports_one_rank_schemes = True
    exports: ClassVar[frozenset[Export]] = frozenset(("lora",))

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)

    @classmethod
    def why_not_adaptable(cls, module: nn.Module) -> str | None:
        if module._parameters.get("weight") is None:  # weight-normalized, as in wav2vec 2.0
            return "its weight is computed from other parameters"
        return super().why_not_adaptable(module)

    @classmethod
    def geometry_of(cls, module: nn.Module) -> Geometry:
        assert isinstance(module.weight, nn.Parameter)
        count, *each = shape_of(module.weight)
        return Geometry(math.prod(each) if count else 0, count)

    @classmethod
    def supports_dropout(cls, module: nn.Module) -> bool:
        return not has_own_forward(module)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def like_weight(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.base_weight.shape)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.check_recomputation()
        dropped = [name for name in self.added_adapters if self.training and name in self.vera_dropout]
        added = self.added_adapters
        if added and not dropped:
            adapted: Tensor = call_with(
                self.base_layer, lambda: {"weight": self.adapted_weight()}, (input, *args), kwargs
            )
            return adapted
        # Dropout must not act on the base layer's input.
        output: Tensor = self.base_layer(input, *args, **kwargs)
        for name in added:
            x = self.vera_dropout[name](input) if name in dropped else input
            output = output + self._alone(name, x)
        return output

    def _alone(self, name: str, x: Tensor) -> Tensor:
        """Return an adapter's output without the base layer's."""
        weight, device = self.matrix(self.base_weight), self.device
        (part,) = self.factors_by_part(name, device, weight.dtype)
        delta = add_delta(torch.zeros(weight.shape, dtype=weight.dtype, device=device), part.factors)
        stand_in = stand_in_for(self.base_layer, {"weight": self.like_weight(delta), "bias": None})
        alone: Tensor = stand_in.forward(x)  # without hooks, which ran when the base layer was called
        return alone

    # Export as a LoRA: lora_A (r, in / groups, *kernel), lora_B (out, r, 1, ...)

    def why_not_lora(self) -> str | None:
        if getattr(self.base_layer, "groups", 1) != 1:
            return "it also groups the factors for a grouped convolution, but an adapter's A is shared by all groups"
        if any(step != 1 for step in getattr(self.base_layer, "dilation", ())):
            return f"it does not support dilation, and the convolution has dilation {self.base_layer.dilation}"
        if getattr(self.base_layer, "padding_mode", "zeros") != "zeros":
            return f"it pads with zeros, but the convolution has padding_mode={self.base_layer.padding_mode!r}"
        return super().why_not_lora()

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = super().lora_factors(name)
        weight = self.base_weight
        return lora_a.view(-1, *weight.shape[1:]), lora_b.view(*lora_b.shape, *(1,) * (weight.ndim - 2))
