"""Parameters that accelerate's hooks offload between calls of their module.

Between calls, such a parameter is on the meta device, and its values are in the hook's `weights_map`. torch computes
wrong results if only one operand is on the meta device, so no such parameter may reach an operation.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The attributes that accelerate sets on a module.
HOOK_ATTRIBUTES = ("_hf_hook", "_old_forward", "forward")
_REMEDY = "call accelerate.hooks.remove_hook_from_submodules(model) first"


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield accelerate's hooks on a module, each hook of a chain separately."""
    hook: Any = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device on which accelerate's hooks run a module, or None if it has no such hook."""
    devices = (getattr(hook, "execution_device", None) for hook in _hooks(module))
    device = next((device for device in devices if device is not None), None)
    return None if device is None else torch.device(device)


def is_offloaded(module: nn.Module, name: str) -> bool:
    """Return whether a hook has offloaded a parameter of this module."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.is_meta and is_hooked(module)


def why_no_values(module: nn.Module, name: str) -> str:
    """Return the reason why a parameter on the meta device has no values, with the remedy if there is one."""
    if is_offloaded(module, name):
        return f"its {name} is offloaded by accelerate: {_REMEDY}"
    return f"its {name} is on the meta device and has no values"


def loaded(module: nn.Module, name: str) -> Tensor:
    """Return the values that a hook keeps for an offloaded parameter, on the device where the module computes.

    Raises:
        RuntimeError: no hook has the values.
    """
    parameter = module._parameters[name]
    assert parameter is not None
    for hook in _hooks(module):
        values: Mapping[str, Tensor] | None = getattr(hook, "weights_map", None)
        try:
            value = None if values is None else values[name]
        except KeyError:
            continue
        if value is not None:
            return value.to(execution_device(module) or "cpu", parameter.dtype)
    raise RuntimeError(
        f"{name} of a {type(module).__name__} is offloaded, and its hook has no values for it: {_REMEDY}"
    )


def check_at_hand(named: Mapping[str, Tensor], operation: str) -> None:
    """Raise ValueError if any of these tensors is offloaded or on the meta device, and so has no values.

    Args:
        named: tensors by name.
        operation: the operation that needs their values, for the message.
    """
    missing = next((name for name, tensor in named.items() if tensor.is_meta), None)
    if missing is not None:
        raise ValueError(
            f"cannot {operation}: {missing} is on the meta device, without values. If accelerate has offloaded it,"
            f" {_REMEDY}"
        )


def resident_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module without accelerate's hooks, with all of its values on the execution device."""
    # The hooks hold the values of the complete model, which must not be copied as well.
    hooks = [part.__dict__["_hf_hook"] for part in module.modules() if is_hooked(part)]
    copied = copy.deepcopy(module, {id(hook): hook for hook in hooks})
    for part in copied.modules():
        if not is_hooked(part):
            continue
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and is_offloaded(part, name):
                part._parameters[name] = nn.Parameter(loaded(part, name).detach().clone(), parameter.requires_grad)
        for attribute in HOOK_ATTRIBUTES:
            part.__dict__.pop(attribute, None)
    return copied


def is_hooked(module: nn.Module) -> bool:
    """Return whether accelerate's hooks wrap the module's `forward`."""
    return "_hf_hook" in module.__dict__


def through_hooks(module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module's accelerate hooks, which load its parameters, around a function other than its `forward`.

    Raises:
        RuntimeError: the instance's `forward` is not that of its class.
    """
    if getattr(module.__dict__.get("_old_forward"), "__func__", None) is not type(module).forward:
        raise RuntimeError(
            f"the forward of a {type(module).__name__} with accelerate's hooks was replaced on the instance, so VeRA"
            " cannot call it with the adapted weight: add the module to exclude_modules"
        )
    hook: Any = module.__dict__["_hf_hook"]
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not hook.no_grad):
        output = call(*args, **kwargs)
    return hook.post_forward(module, output)


class ResidentParameters(nn.ParameterDict):
    """Small parameters that accelerate must not offload.

    Hooks load a module's parameters when it is called, but this module is never called. A hook attached to it is
    therefore dropped, and the parameters that the hook offloaded are restored, as the same objects, on the hook's
    execution device.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_old_forward":  # set before a hook offloads the module
            self.__dict__["_before_hook"] = dict(self._parameters)
        elif name == "_hf_hook":
            self._parameters.update(self.__dict__.pop("_before_hook", {}))
            device = next((d for h in getattr(value, "hooks", (value,)) if (d := h.execution_device) is not None), None)
            for parameter in self._parameters.values():
                if parameter is not None and device is not None and not parameter.is_meta:
                    parameter.data = parameter.data.to(device)
        elif name != "forward":
            super().__setattr__(name, value)
