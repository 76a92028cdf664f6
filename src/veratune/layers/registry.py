"""Find the layer kind that adapts a module, and the adaptable parameters that a module reads directly."""

import re

from torch import nn

from veratune.layers.base import VeraLayer
from veratune.layers.convolution import VeraConv
from veratune.layers.embedding import VeraEmbedding
from veratune.layers.geometry import Geometry
from veratune.layers.linear import VeraConv1D, VeraLinear
from veratune.layers.parameter import VeraParameter
from veratune.utils.sharding import shape_of

# The first kind that adapts a module is used. VeraLinear comes last because it accepts any module with the attributes
# of a linear layer.
LAYER_KINDS: list[type[VeraLayer]] = [
    VeraConv,
    VeraEmbedding,
    VeraConv1D,
    VeraLinear,
]

_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_UP, _DOWN = ("gate_up_proj", "up_proj", "gate_proj", "w1", "w3", "wi", "fc1"), ("down_proj", "w2", "wo", "fc2")
_HIDDEN = ("hidden_size", "hidden_dim", "d_model", "embed_dim")
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def find_layer_class(module: nn.Module) -> type[VeraLayer] | None:
    """Return the class of the adapted layer for a module, even if the module cannot be adapted in its current state."""
    return next((kind for kind in LAYER_KINDS if kind.adapts(module)), None)


def layer_class(module: nn.Module, parameter: str | None = None) -> type[VeraLayer]:
    """Return the class of the adapted layer for an adaptable module, or for a parameter of a module."""
    found = find_layer_class(module) if parameter is None else VeraParameter
    assert found is not None
    return found


def why_not_adaptable(module: nn.Module) -> str | None:
    """Return None if VeRA can adapt a module as a layer, otherwise the reason, phrased to follow "because".

    Modules that read weights directly have `adaptable_parameters` instead.
    """
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "it is a lazy module, which has no shape before its first call"
    kind = find_layer_class(module)
    if kind is not None:
        return kind.why_not_adaptable(module)
    if adaptable_parameters(module):
        return f"{type(module).__name__} reads its weights directly, so they are adapted as parameters"
    return (
        f"{type(module).__name__} is not of a kind that VeRA adapts (linear layers, non-transposed convolutions and"
        " embeddings)"
    )


def in_all_linear(module: nn.Module) -> bool:
    """Return whether target_modules="all-linear" includes an adaptable layer of this kind."""
    kind = find_layer_class(module)
    return kind is not None and kind.in_all_linear and why_not_adaptable(module) is None


def weight_name(module: nn.Module) -> str:
    """Return the name of a layer's weight."""
    kind = find_layer_class(module)
    return "weight" if kind is None else kind.weight_name


def geometry(module: nn.Module) -> Geometry:
    """Return the dimensions of an adaptable layer."""
    return layer_class(module).geometry_of(module)


def adapt(module: nn.Module) -> VeraLayer:
    """Return an adapted layer, without adapters yet, around an adaptable module."""
    return layer_class(module)(module, geometry(module))


# Weights that a module reads directly


def adaptable_parameters(module: nn.Module) -> list[str]:
    """Return the parameters of a module that its forward uses as linear maps."""
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in _ATTENTION_WEIGHTS if module._parameters.get(name) is not None]
    if _EXPERTS.search(type(module).__name__):
        return [name for name, parameter in module._parameters.items() if _is_stack(name, parameter)]
    return []


def _is_stack(name: str, parameter: nn.Parameter | None) -> bool:
    return (
        parameter is not None
        and len(shape_of(parameter)) == 3
        and parameter.is_floating_point()
        and shape_of(parameter).numel() > 0
        and not name.endswith(("bias", "scale", "scales"))
    )


def why_not_parameter(module: nn.Module, name: str) -> str | None:
    """Return None if VeRA can adapt a parameter that its module reads directly, otherwise the reason."""
    parameter = module._parameters.get(name)
    if parameter is None:
        return f"{type(module).__name__} has no parameter {name!r}"
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return f"it is in a {type(module).__name__}, whose owner reads it"
    if name == weight_name(module) and why_not_adaptable(module) is None:
        return "its module is a layer: name the module in target_modules"
    if type(module).__module__.startswith("torch.nn.modules.") and name not in adaptable_parameters(module):
        return f"{type(module).__name__} does not use it as a matrix"
    shape = shape_of(parameter)
    if len(shape) not in (2, 3) or not shape.numel():
        return f"its shape is {tuple(shape)}, so it is neither a matrix nor a stack of matrices"
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"its dtype is {parameter.dtype}"
    return None


def parameter_layout(module: nn.Module, name: str) -> tuple[Geometry, bool]:
    """Return (geometry, whether matrices are stored as (in, out)) of a parameter that its module reads directly."""
    parameter = module._parameters[name]
    assert parameter is not None
    shape = shape_of(parameter)
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return Geometry(shape[1], shape[0] // 3, count=3), False
    count = shape[0] if len(shape) == 3 else None
    transposed = len(shape) == 3 and _stored_transposed(module)
    rows, columns = shape[-2:]
    size = (rows, columns) if transposed else (columns, rows)
    return Geometry(*size, count=count), transposed


def _stored_transposed(module: nn.Module) -> bool:
    """Return whether a module's expert tensors are (experts, in, out), from `is_transposed` or from their sizes."""
    stated = getattr(module, "is_transposed", None)
    if isinstance(stated, bool):
        return stated
    hidden = next((size for name in _HIDDEN if isinstance(size := getattr(module, name, None), int)), None)
    shapes = {name: shape_of(p) for name, p in module._parameters.items() if p is not None}
    stacks = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    pairs = [(stacks[up], stacks[down]) for up in _UP for down in _DOWN if up in stacks and down in stacks]
    if hidden is not None and pairs and all((up[1] == hidden) != (up[2] == hidden) for up, _ in pairs):
        return all(up[1] == hidden for up, _ in pairs)
    # The up projection's inputs have the size of the down projection's outputs. The up projection's outputs have the
    # size of the down projection's inputs, or twice that size if gate and up are one tensor.
    straight = [up[2] == down[1] and up[1] in (down[2], 2 * down[2]) for up, down in pairs]
    turned = [up[1] == down[2] and up[2] in (down[1], 2 * down[1]) for up, down in pairs]
    return bool(pairs) and not any(straight) and all(turned)


def adapt_parameter(module: nn.Module, name: str) -> VeraParameter:
    """Return an adapted parameter, without adapters yet."""
    size, transposed = parameter_layout(module, name)
    return VeraParameter(module, name, size, transposed=transposed)
