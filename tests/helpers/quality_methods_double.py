"""A method of the quality study that misbehaves, in a module that worker processes can import."""

import os
from dataclasses import dataclass

from torch import nn

from quality_methods import Head


@dataclass(frozen=True)
class Misbehaves(Head):
    """Ends its process without a word on a task of three classes, and raises an error on others."""

    def adapt(self, model: nn.Module, seed: int, key: int) -> nn.Module:
        if model.config.num_labels == 3:
            os._exit(7)
        raise ValueError("this cannot be adapted")
