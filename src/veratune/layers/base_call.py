"""Call a base layer with other tensors as its parameters, and inspect which code a call runs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veratune.layers.biases import only_bias_checks
from veratune.layers.offloading import HOOK_ATTRIBUTES, is_hooked, through_hooks
from veratune.layers.quantized import is_quantized


def only_computes(module: nn.Module) -> bool:
    """Return whether calling a module runs its class's `forward` and nothing else, such as hooks."""
    return (
        "forward" not in module.__dict__
        and not module._forward_hooks
        and (not module._forward_pre_hooks or only_bias_checks(module))
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a layer that is not quantized has a `forward` that torch.nn does not define."""
    return not is_quantized(module) and not type(module).forward.__module__.startswith("torch.nn.")


def plain_tensor(weight: Tensor) -> bool:
    """Return whether a weight is an ordinary tensor, not an instance of a subclass that overrides operations."""
    return type(weight) in (Tensor, nn.Parameter)


def computes(module: nn.Module, name: str) -> bool:
    """Return whether a module computes one of its weights from other parameters (as weight_norm and pruning do)."""
    return name in module.__dict__ or isinstance(getattr(type(module), name, None), property)


def check_not_computed(module: nn.Module, names: Iterable[str]) -> None:
    """Raise RuntimeError if a module computes one of these weights from others, so that it cannot be replaced."""
    for name in names:
        if computes(module, name):
            raise RuntimeError(
                f"the {name} of an adapted {type(module).__name__} is computed from other parameters (after a call of"
                " weight_norm, spectral_norm or a pruning method), so the adapters cannot be added to it: undo the"
                " reparametrization (with remove_parametrizations, remove_weight_norm or prune.remove in"
                " torch.nn.utils), or add the layer to exclude_modules"
            )


def stand_in_for(module: nn.Module, weights: Mapping[str, Tensor | None]) -> nn.Module:
    """Return a shallow copy of a module, without accelerate's hooks, with some of its parameters replaced.

    Raises:
        RuntimeError: the module computes one of these parameters from others, which would overwrite the new value.
    """
    check_not_computed(module, weights)
    stand_in = object.__new__(type(module))
    stand_in.__dict__.update({name: value for name, value in module.__dict__.items() if name not in HOOK_ATTRIBUTES})
    stand_in.__dict__["_parameters"] = {**module._parameters, **weights}
    return stand_in


def call_with(
    module: nn.Module, weights: Callable[[], Mapping[str, Tensor]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a module with other tensors as some of its parameters.

    The call runs on a shallow copy and leaves the module's parameters in place, so it is thread-safe. If `forward` is
    bound to the module, it would not see the copy, and torch.compile cannot trace the copy: in these cases, the
    parameters are swapped during the call. With accelerate's hooks, `weights` is called after the hooks have loaded
    the module's parameters.

    Args:
        module: the module.
        weights: returns the tensors by parameter name.
        args, kwargs: the arguments of the call.
    """
    if is_hooked(module):
        return through_hooks(module, lambda *a, **k: _call_stand_in(module, weights(), a, k), args, kwargs)
    if torch.compiler.is_compiling() or "forward" in module.__dict__:
        return torch.func.functional_call(module, dict(weights()), args, kwargs)
    return _call_stand_in(module, weights(), args, kwargs)


def _call_stand_in(
    module: nn.Module, weights: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    stand_in = stand_in_for(module, weights)
    result = stand_in(*args, **kwargs)
    for name, value in stand_in.__dict__.items():
        if name != "_parameters" and module.__dict__.get(name, stand_in) is not value:
            module.__dict__[name] = value  # an attribute set by `forward`
    return result
