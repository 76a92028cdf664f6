"""VeRA on `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, seen as linear layers on patches (im2col)."""

from typing import Any

import torch
from torch import Tensor, nn

from veratune.layers.base import TransparentLayer, call_with, stand_in_for
from veratune.ops.delta import add_delta


class VeraConv(TransparentLayer):
    """A convolution with VeRA adapters.

    Its weight (out, in / groups, *kernel) is one matrix with in = in / groups * kernel inputs. The adapted weight is
    added up, which costs a small product, and the convolution is made once with it: the number of patches is almost
    always far above the rank.
    """

    kind = "convolution"

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
        # What is dropped out of an adapter's input is not dropped out of the base layer's.
        output: Tensor = self.base_layer(input, *args, **kwargs)
        for name in added:
            x = self.vera_dropout[name](input) if name in dropped else input
            output = output + self._alone(name, x)
        return output

    def _alone(self, name: str, x: Tensor) -> Tensor:
        """Return what an adapter adds for an input of its own."""
        weight, device = self.matrix(self.base_weight), self.device
        (piece,) = self.pieces(name, device, weight.dtype)
        delta = add_delta(torch.zeros(weight.shape, dtype=weight.dtype, device=device), piece.factors)
        stand_in = stand_in_for(self.base_layer, {"weight": self.like_weight(delta), "bias": None})
        alone: Tensor = stand_in.forward(x)  # without hooks, which have been called with the base layer's output
        return alone


CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
