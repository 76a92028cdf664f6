"""Adapted layers: wrappers that compute a layer or a parameter of a model with adapters."""

from veratune.layers.base import VeraLayer
from veratune.layers.convolution import VeraConv
from veratune.layers.embedding import VeraEmbedding
from veratune.layers.entries import AdapterEntry, ComputeSettings, InputGroup, VectorInit
from veratune.layers.geometry import Geometry
from veratune.layers.linear import VeraConv1D, VeraLinear
from veratune.layers.modules_to_save import SavedModule
from veratune.layers.parameter import VeraModule, VeraParameter

__all__ = [
    "AdapterEntry",
    "ComputeSettings",
    "Geometry",
    "InputGroup",
    "SavedModule",
    "VectorInit",
    "VeraConv",
    "VeraConv1D",
    "VeraEmbedding",
    "VeraLayer",
    "VeraLinear",
    "VeraModule",
    "VeraParameter",
]
