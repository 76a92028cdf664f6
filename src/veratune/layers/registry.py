"""The kinds of weights that VeRA can adapt, and the one place that tells which is which."""

import math
import re
import sys

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veratune.layers.base import VeraLayer
from veratune.layers.convolution import CONVOLUTIONS, VeraConv
from veratune.layers.embedding import VeraEmbedding
from veratune.layers.geometry import Geometry
from veratune.layers.linear import VeraConv1D, VeraLinear
from veratune.layers.parameter import VeraParameter
from veratune.layers.quantized import is_quantized
from veratune.utils.sharding import shape_of

_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_UP, _DOWN = ("gate_up_proj", "up_proj", "gate_proj", "w1", "w3", "wi", "fc1"), ("down_proj", "w2", "wo", "fc2")
_HIDDEN = ("hidden_size", "hidden_dim", "d_model", "embed_dim")
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _conv1d_class() -> type[nn.Module] | None:
    # A model that holds a Conv1D has imported it; nobody else needs transformers for the question.
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the module is transformers' Conv1D."""
    conv1d = _conv1d_class()
    return conv1d is not None and isinstance(module, conv1d)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module that can be adapted is a linear layer, whatever holds its weight."""
    return not isinstance(module, (*CONVOLUTIONS, nn.Embedding)) and why_not_adaptable(module) is None


def why_not_adaptable(module: nn.Module) -> str | None:
    """Return None for a module that VeRA can adapt as a layer, otherwise the reason, to stand behind 'because'.

    Modules that read weights themselves have `adaptable_parameters` instead.
    """
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "it is lazy and has no shape before its first input"
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return _why_not_its_weight(module)
    if isinstance(module, CONVOLUTIONS):
        if module._parameters.get("weight") is None:  # normalised, as in wav2vec 2.0
            return "its weight is computed from other parameters"
        return _why_not_its_weight(module)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "its max_norm scales rows of the table itself when they are looked up"
        own = type(module).forward is not nn.Embedding.forward
        if own and not hasattr(module, "embed_scale"):
            return f"it is a {type(module).__name__}, which does more than look up rows"
        return _why_not_its_weight(module)
    if _is_linear_like(module):
        return None
    if adaptable_parameters(module):
        return f"{type(module).__name__} reads its weights itself: they are adapted as parameters"
    return (
        f"{type(module).__name__} is none of the kinds that VeRA adapts: linear layers, convolutions that are not"
        " transposed, embeddings"
    )


def _why_not_its_weight(module: nn.Module) -> str | None:
    size = geometry(module)
    if not (size.in_features and size.out_features):
        return f"it has {size.in_features} inputs and {size.out_features} outputs"
    weight = module._parameters.get("weight")
    if weight is not None and weight.is_complex():
        return "its weight is complex"
    return None


def _is_linear_like(module: nn.Module) -> bool:
    """Return whether a module says that it is a linear layer, in the way that quantized ones do: by its dimensions."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        return False
    has_tensors = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    return has_tensors and not any(True for child in module.children() for _ in child.parameters())


def geometry(module: nn.Module) -> Geometry:
    """Return the dimensions of an adaptable layer."""
    if isinstance(module, CONVOLUTIONS):
        assert isinstance(module.weight, nn.Parameter)
        count, *each = shape_of(module.weight)
        return Geometry(math.prod(each) if count else 0, count)
    if isinstance(module, nn.Embedding):
        return Geometry(module.num_embeddings, module.embedding_dim)
    if is_conv1d(module):
        assert isinstance(module.weight, nn.Parameter)
        return Geometry(*shape_of(module.weight))
    in_features, out_features = module.in_features, module.out_features
    assert isinstance(in_features, int) and isinstance(out_features, int)
    return Geometry(in_features, out_features)


def layer_class(module: nn.Module) -> type[VeraLayer]:
    """Return the class of the adapted layer around an adaptable module."""
    if isinstance(module, CONVOLUTIONS):
        return VeraConv
    if isinstance(module, nn.Embedding):
        return VeraEmbedding
    return VeraConv1D if is_conv1d(module) else VeraLinear


def adapt(module: nn.Module) -> VeraLayer:
    """Return an adapted layer, without adapters yet, around an adaptable module."""
    return layer_class(module)(module, geometry(module))


# Weights that a module reads itself


def adaptable_parameters(module: nn.Module) -> list[str]:
    """Return the parameters of a module that are linear maps which its own forward computes with."""
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
    """Return None for a parameter that VeRA can adapt where it is read, otherwise the reason."""
    parameter = module._parameters.get(name)
    if parameter is None:
        return f"{type(module).__name__} has no parameter {name!r}"
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return f"it stands in a {type(module).__name__}, whose owner reads it"
    if name == "weight" and why_not_adaptable(module) is None:
        return "its module is a layer of its own: name the module in target_modules"
    if type(module).__module__.startswith("torch.nn.modules.") and name not in adaptable_parameters(module):
        return f"{type(module).__name__} does not multiply by it as by a matrix"
    shape = shape_of(parameter)
    if len(shape) not in (2, 3) or not shape.numel():
        return f"its shape is {tuple(shape)}, neither a matrix nor a stack of matrices"
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"its type is {parameter.dtype}"
    return None


def parameter_layout(module: nn.Module, name: str) -> tuple[Geometry, bool]:
    """Return (geometry, whether matrices are stored as (in, out)) of a parameter that its module reads itself."""
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
    """Return whether a module's expert tensors are (experts, in, out): as it says itself, or as their sizes tell."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    hidden = next((size for name in _HIDDEN if isinstance(size := getattr(module, name, None), int)), None)
    shapes = {name: shape_of(p) for name, p in module._parameters.items() if p is not None}
    stacks = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    pairs = [(stacks[up], stacks[xa]) for up in _UP for xa in _DOWN if up in stacks and xa in stacks]
    if hidden is not None and pairs and all((up[1] == hidden) != (up[2] == hidden) for up, _ in pairs):
        return all(up[1] == hidden for up, _ in pairs)
    # What goes into the first goes out of the second; what comes out of the first, gate and up together or one of
    # them, goes into the second.
    straight = [up[2] == xa[1] and up[1] in (xa[2], 2 * xa[2]) for up, xa in pairs]
    turned = [up[1] == xa[2] and up[2] in (xa[1], 2 * xa[1]) for up, xa in pairs]
    return bool(pairs) and not any(straight) and all(turned)


def adapt_parameter(module: nn.Module, name: str) -> VeraParameter:
    """Return an adapted parameter, without adapters yet."""
    size, transposed = parameter_layout(module, name)
    return VeraParameter(module, name, size, transposed=transposed)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a linear layer or a convolution is of a class that computes more than one, with a plain weight."""
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_quantized(module):
        return False
    return not type(module).forward.__module__.startswith("torch.nn.")


def is_out_proj(module: nn.Module) -> bool:
    """Return whether a module is the output projection of `torch.nn.MultiheadAttention`."""
    return isinstance(module, NonDynamicallyQuantizableLinear)
