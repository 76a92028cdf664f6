"""The module kinds that VeRA can adapt, and the one place that tells which is which."""

import sys

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veratune.layers.base import ComputeSettings, InputGroup, Slot, VectorInit, VeraLayer
from veratune.layers.linear import VeraConv1D, VeraLinear
from veratune.layers.saved import SavedModule

__all__ = [
    "ComputeSettings",
    "InputGroup",
    "SavedModule",
    "Slot",
    "VectorInit",
    "VeraConv1D",
    "VeraLayer",
    "VeraLinear",
    "adapt",
    "features",
    "is_conv1d",
    "why_not_adaptable",
]


def _conv1d_class() -> type[nn.Module] | None:
    # A model that holds a Conv1D has imported it; nobody else needs transformers for the question.
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the module is transformers' Conv1D."""
    conv1d = _conv1d_class()
    return conv1d is not None and isinstance(module, conv1d)


def why_not_adaptable(module: nn.Module) -> str | None:
    """Return None for a module that VeRA can adapt, otherwise the reason, to stand behind 'because'."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "torch.nn.MultiheadAttention reads its weight without calling it"
    if isinstance(module, nn.Linear):
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            return "it is lazy and has no shape before its first input"
        return _why_not_its_weight(module)
    if is_conv1d(module):
        return _why_not_its_weight(module)
    return f"{type(module).__name__} is neither torch.nn.Linear nor transformers' Conv1D"


def _why_not_its_weight(module: nn.Module) -> str | None:
    in_features, out_features = features(module)
    if not (in_features and out_features):
        return f"it has {in_features} inputs and {out_features} outputs"
    weight = module._parameters.get("weight")
    if weight is not None and weight.is_complex():
        return "its weight is complex"
    return None


def features(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of an adaptable module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return int(weight.shape[0]), int(weight.shape[1])


def adapt(module: nn.Module) -> VeraLayer:
    """Return an adapted layer, without adapters yet, around an adaptable module."""
    in_features, out_features = features(module)
    kind = VeraConv1D if is_conv1d(module) else VeraLinear
    return kind(module, in_features, out_features)
