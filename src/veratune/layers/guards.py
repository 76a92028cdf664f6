"""Refuse operations that would bypass adapters: loading into merged weights, and replacing adapted layers."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from veratune.layers.base import VeraLayer
from veratune.layers.entries import VECTOR_PREFIX, VECTORS
from veratune.layers.modules_to_save import SavedModule
from veratune.layers.parameter import VeraModule
from veratune.utils.torch_private import in_state_dict, name_in_wrapper


class _Written(NamedTuple):
    """A tensor that must not be written while adapters are merged.

    Attributes:
        name: its name in the state dict of the guarded module.
        layer: the layer that it belongs to.
        adapter: the adapter that the vector belongs to; None for the weight.
    """

    name: str
    layer: VeraLayer
    adapter: str | None

    def in_use(self) -> bool:
        merged = self.layer.merged_adapters
        return bool(merged) if self.adapter is None else self.adapter in merged


class LoadGuard:
    """A `load_state_dict` pre-hook that refuses to overwrite merged weights and the vectors of merged adapters."""

    def __init__(self, written: list[_Written]) -> None:
        self._written = written

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for written in self._written:
            if prefix + written.name in state_dict and written.in_use():
                raise ValueError(
                    f"load_state_dict cannot write {prefix}{written.name} while the adapters"
                    f" {written.layer.merged_adapters} are merged, because the merged weights would no longer match"
                    " W0 and the vectors: call unmerge_adapter first"
                )


def guard_loading(model: nn.Module) -> None:
    """Make `load_state_dict` of a model, and of every module in it, refuse to write to merged layers.

    Call this after each merge and unmerge. `load_state_dict` runs the hooks of the module that it was called on before
    it writes anything, so a refused call changes nothing.
    """
    for module in model.modules():
        hooks: dict[int, Any] = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "hook", hook), LoadGuard)]:
            del hooks[key]
    _guard(model, list(_merged_tensors(model)))


def _guard(module: nn.Module, written: list[_Written]) -> None:
    """Guard a module and its submodules.

    Args:
        module: the module.
        written: the tensors that must not be written, by their names in the module.
    """
    if not written:
        return
    states = [entry._replace(name=_state_name(module, entry.name)) for entry in written]
    hidden = [state for state, entry in zip(states, written, strict=True) if state.name != entry.name]
    register: Any = module.register_load_state_dict_pre_hook
    register(LoadGuard([*written, *hidden]))
    inside: dict[str, list[_Written]] = {}
    for entry in written:
        child, _, rest = entry.name.partition(".")
        if rest:
            inside.setdefault(child, []).append(entry._replace(name=rest))
    for name, entries in inside.items():
        child_module = module._modules.get(name)
        if child_module is not None:
            _guard(child_module, entries)


def _state_name(module: nn.Module, name: str) -> str:
    """Return the state dict key of a name in a module, without wrappers that do not appear in state dicts."""
    parts: list[str] = []
    current: nn.Module | None = module
    for part in name.split("."):
        held = None if current is None else name_in_wrapper(current)
        if part != held or in_state_dict(part):
            parts.append(part)
        current = None if current is None else current._modules.get(part)
    return ".".join(parts)


def _merged_tensors(model: nn.Module) -> Iterator[_Written]:
    for path, module in model.named_modules(remove_duplicate=False):
        start = f"{path}." if path else ""
        if isinstance(module, VeraModule):
            for name, layer in module.parameter_layers().items():
                if layer.merged_adapters:
                    yield _Written(f"{start}base_layer.{name}", layer, None)
        elif isinstance(module, VeraLayer) and module.merged_adapters:
            if "base_layer" in module._modules:
                yield _Written(f"{start}base_layer.{module.weight_name}", module, None)
            for name in module.merged_adapters:
                for vector in VECTORS:
                    yield _Written(f"{start}{VECTOR_PREFIX}{vector}.{name}", module, name)


# Methods of transformers models that replace layers or write to them


class GuardedMethod:
    """A model's method that replaces layers, called only after a check that no adapters would be lost."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self._model, self._name = model, name
        self.__name__, self.__doc__ = name, getattr(type(model), name).__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self._model), self._name).__get__(self._model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _GUARDS[self._name](self._model, getattr(type(self._model), self._name), *args, **kwargs)


def guard_surgeries(model: nn.Module) -> None:
    """Guard the layer-replacing methods of an adapted model and of all models inside it; unguard other models."""
    adapted = any(_is_wrapper(module) for module in model.modules())
    for module in model.modules():
        for name in _GUARDS:
            if isinstance(module.__dict__.get(name), GuardedMethod):
                del module.__dict__[name]
            defined = name not in module.__dict__ and callable(getattr(type(module), name, None))
            if adapted and defined and hasattr(type(module), "get_input_embeddings"):
                module.__dict__[name] = GuardedMethod(module, name)


def _is_wrapper(module: Any) -> bool:
    """Return whether a module wraps one of the model's modules: an adapted layer, or a module of modules_to_save."""
    return isinstance(module, VeraLayer | VeraModule | SavedModule) or "original_module" in module._modules


def _embeddings(model: Any) -> Iterator[tuple[str, Any]]:
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            yield name, module


def _names_of(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, other in model.named_modules() if other is module), type(module).__name__)


def _inner(module: Any) -> Any:
    """Return the base model's module inside a wrapper, or the module itself."""
    if isinstance(module, VeraLayer | VeraModule):
        return module.base_layer
    return module._modules.get("original_module", module)


def _tied_wrapper(model: nn.Module, embeddings: nn.Module) -> nn.Module | None:
    """Return the embeddings if they are a wrapper; otherwise the wrapper that shares their weight, or None."""
    if _is_wrapper(embeddings):
        return embeddings
    weight = embeddings._parameters.get("weight")
    for module in model.modules():
        if weight is not None and _is_wrapper(module):
            inner = _inner(module)
            waiting = module._unmerged.get("weight") if isinstance(module, VeraLayer) else None
            if weight is waiting or inner._parameters.get("weight") is weight:
                return module
    return None


def _resize(model: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    number = args[0] if args else kwargs.get("new_num_tokens")
    multiple = args[1] if len(args) > 1 else kwargs.get("pad_to_multiple_of")
    if number is None and multiple is None:
        return method(model, *args, **kwargs)
    found = [(module, _tied_wrapper(model, module)) for _, module in _embeddings(model)]
    wrapper = next((wrapper for _, wrapper in found if wrapper is not None), None)
    if wrapper is None:
        return method(model, *args, **kwargs)
    current = _inner(found[0][0])
    if multiple is None and number == getattr(current, "num_embeddings", None):
        return found[0][0]
    raise _refusal("resize_token_embeddings", model, wrapper)


def _set_embeddings(name: str) -> Callable[..., Any]:
    def guarded(model: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        new = [*args, *kwargs.values()]
        getter = f"get_{name.removeprefix('set_')}"
        for found, module in _embeddings(model):
            if found == getter and _is_wrapper(module) and not any(value is module for value in new):
                raise _refusal(name, model, module)
        return method(model, *args, **kwargs)

    return guarded


def _prune(model: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    wrapper = next(module for module in model.modules() if _is_wrapper(module))
    raise _refusal("prune_heads", model, wrapper)


def _tie(model: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _without_adapters(model):
        return method(model, *args, **kwargs)


def _refusal(method: str, model: nn.Module, wrapper: nn.Module) -> ValueError:
    state = "has adapters" if isinstance(wrapper, VeraLayer | VeraModule) else "is trained in full by an adapter"
    return ValueError(
        f"{method} cannot replace layers of this model while {_names_of(model, wrapper)} {state}: the trained values"
        " fit its current size and would be lost. Call it before adapting the model, or remove the adapters first"
        " (unload or merge_and_unload)"
    )


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Restore the base model's weights within this context, as if there were no adapters."""
    layers = [module for module in model.modules() if isinstance(module, VeraLayer)]
    saved = [(module, module.active_adapters) for module in model.modules() if isinstance(module, SavedModule)]
    before = [(layer, list(layer.merged_adapters), list(layer.added_adapters)) for layer in layers]
    try:
        for layer in layers:
            if layer.merged_adapters:
                layer.unmerge()
            layer.added_adapters = []
        for head, _ in saved:
            head.active_adapters = []
        yield
    finally:
        for head, active in saved:
            head.active_adapters = active
        for layer, merged, added in before:
            if merged and not layer.merged_adapters:
                layer.merge_again(merged)
            layer.added_adapters = added


_GUARDS: dict[str, Callable[..., Any]] = {
    "resize_token_embeddings": _resize,
    "set_input_embeddings": _set_embeddings("set_input_embeddings"),
    "set_output_embeddings": _set_embeddings("set_output_embeddings"),
    "prune_heads": _prune,
    "tie_weights": _tie,
}
