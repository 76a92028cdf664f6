"""A wrapper that can replace its model anywhere: it has the model's attributes and the signature of its `forward`."""

import inspect
from types import CodeType
from typing import Any

from torch import nn

_POSITIONAL, _KEYWORD = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY


# The arguments with which PEFT and banks accept an adapter for each row. Models with **kwargs would ignore them.
_BY_ROW = ("adapter_names", "adapters")


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the adapted model.

    Raises:
        TypeError: `adapter_names` or `adapters` (an adapter for each row) is given, but the model does not accept it.
    """
    for name in _BY_ROW:
        if kwargs.get(name) is not None and name not in inspect.signature(self.base_model.forward).parameters:
            raise TypeError(
                f"{name} is not supported here: all rows use the active adapters (set_adapter). To use different"
                " adapters in one batch, use a veratune.AdapterBank"
            )
    return self.base_model(*args, **kwargs)


# Trainers read label names from the `forward` of the class, which is the same for all models. Most have `labels`.
_forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("self", _POSITIONAL),
        inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
        inspect.Parameter("labels", _KEYWORD, default=None),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


class _BoundForward:
    """The `forward` of one wrapper, with the signature of the model inside."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _forward(self._wrapper, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._wrapper.base_model.forward)

    @property
    def __code__(self) -> CodeType:
        # torch.export checks this for *args.
        return _forward.__code__


class ForwardOfBase:
    """Descriptor of a `forward` that calls `base_model` and has its signature."""

    def __get__(self, wrapper: Any, owner: type | None = None) -> Any:
        return _forward if wrapper is None else _BoundForward(wrapper)


class ModelWrapper(nn.Module):
    """A wrapper around a model. Attributes that it does not define are read from, and set on, the model.

    Attributes:
        base_model: the model.
    """

    base_model: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # accelerate's hooks belong to the wrapped model. A wrapper without a model is being copied or unpickled.
            inside = "base_model" in self.__dict__.get("_modules", {})
            if name.startswith("__") or name in ("_hf_hook", "_old_forward") or not inside:
                raise
            return getattr(self.base_model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # The model's methods, such as generate, see only the model's attributes.
        defined_here = name == "base_model" or name in self.__dict__ or hasattr(type(self), name)
        if defined_here or "base_model" not in self.__dict__.get("_modules", {}) or not hasattr(self.base_model, name):
            super().__setattr__(name, value)
        else:
            setattr(self.base_model, name, value)
