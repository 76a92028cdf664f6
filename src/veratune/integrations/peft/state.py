"""The tensors of veratune's layers that PEFT saves and loads, by their keys in a model's state dict and in files.

Files use public names, without torch's wrappers. Adapter names are data: keys are never searched for them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from veratune.adapters.names import (
    ModuleName,
    adapted_layers,
    base_modules,
    joined,
    module_names,
    public_key,
    unwrapped,
)
from veratune.checkpoint.files import CheckpointError, gathered
from veratune.checkpoint.peft_rules import PREFIX
from veratune.integrations.peft.layers import TunedLayer
from veratune.layers.biases import bias_first_names
from veratune.layers.entries import VECTOR_PREFIX, VECTORS
from veratune.layers.offloading import check_at_hand, is_hooked

_VECTORS = tuple(VECTOR_PREFIX + which for which in VECTORS)
_NAMED = (*_VECTORS, "base_model.vera_A", "base_model.vera_B")


def adapter_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[ModuleName, Any]]:
    """Yield each tuned layer that has an adapter once, with its name in a model that PEFT has modified."""
    names = module_names(model)
    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(module, TunedLayer) and adapter_name in layer.entries:
            yield names[name], layer


class SavedTensors(dict[str, Tensor]):
    """Tensors by public key; `update` translates the keys that it is given."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self._names = names

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add tensors under their public keys, gathered if they are sharded."""
        for key, tensor in dict(*args, **kwargs).items():
            self[public_key(key, self._names)] = gathered(tensor)


def tensors_to_save(
    model: nn.Module, bias: str, adapter_name: str, state: dict[str, Tensor], others: list[str]
) -> SavedTensors:
    """Return an adapter's vectors and biases under public keys that still end in the adapter's name.

    PEFT has removed every key that contains another adapter's name from `state`, even if it is the name of a layer.
    Missing tensors are taken from the model; those of saved modules are added to `state` under the names that
    `named_modules` returns, where PEFT looks for them.

    Args:
        model: the model that PEFT saves.
        bias: the configuration's `bias`.
        adapter_name: the adapter's name.
        state: the model's state dict, as passed by PEFT.
        others: the names of all other adapters.

    Raises:
        ValueError: there is nothing to save.
    """
    names = module_names(model)
    public = {own: name.public for raw, name in names.items() for own in (raw, name.state)}
    for raw, inside in _inside_saved(model, adapter_name):
        public |= {joined(raw, own): joined(names[raw].public, name) for own, name in inside.items()}
    tensors = SavedTensors(public)
    for name, layer in adapter_layers(model, adapter_name):
        for which, vector in layer.vectors(adapter_name).items():
            key = joined(name.state, f"{VECTOR_PREFIX}{which}.{adapter_name}")
            tensors.update({key: state.get(key, vector)})
    if not tensors:
        raise ValueError(
            f"adapter {adapter_name!r} is not on any layer of this {type(model).__name__}: there is nothing to save"
        )
    wrappers = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    foreign = tuple(f"{wrapper}.modules_to_save.{other}." for wrapper in wrappers for other in others)
    tuned = {joined(raw, "base_layer") for raw, module in model.named_modules() if isinstance(module, TunedLayer)}
    for raw, module in model.named_modules():
        own = module._parameters.get("bias")
        if own is None or f"{raw}.".startswith(foreign):
            continue
        if bias == "all" or (bias.endswith("_only") and raw in tuned):
            key = joined(names[raw].state, "bias")
            tensors.update({key: state.get(key, own)})
    for raw in wrappers:
        wrapper = model.get_submodule(raw)
        for key, tensor in wrapper.state_dict().items():
            if key.startswith(f"modules_to_save.{adapter_name}."):
                own = state.setdefault(f"{raw}.{key}", state.get(joined(names[raw].state, key), tensor))
                check_at_hand({joined(names[raw].public, key): own}, f"save adapter {adapter_name!r}")
    return tensors


def without_adapter_name(key: str, adapter_name: str) -> str:
    """Return a tensor's key in a file, given its key in a model, which may end in the adapter's name."""
    parent, _, last = key.rpartition(".")
    return parent if last == adapter_name and parent.endswith(_NAMED) else key


def tensors_to_load(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors, as read from a file, keyed as in a model's state dict.

    Raises:
        CheckpointError: all vectors of the adapter are missing. PEFT itself reports missing or unexpected tensors.
        ValueError: a module trained in full is offloaded, so torch would load nothing into it.
    """
    names = module_names(model)
    for raw, module in model.named_modules():
        copies: Any = getattr(module, "modules_to_save", {}) if isinstance(module, AuxiliaryTrainingWrapper) else {}
        if adapter_name in copies:
            inside = {f"{names[raw].public}.{key}": part for key, part in copies[adapter_name].named_parameters()}
            hooked = any(is_hooked(part) for part in copies[adapter_name].modules())
            check_at_hand(inside if hooked else {}, f"load adapter {adapter_name!r}")
    prefixed = any(name.startswith(PREFIX) for name in names)
    states = {name.public: name.state for name in names.values() if not name.wrapper}
    states |= {raw: name.state for raw, name in names.items() if raw not in states}
    expected = {
        joined(name.public, which): joined(name.state, f"{which}.{adapter_name}")
        for name, _ in adapter_layers(model, adapter_name)
        for which in _VECTORS
    }
    expected |= {
        joined(raw, which): expected[joined(names[raw].public, which)]
        for raw in names
        for which in _VECTORS
        if joined(names[raw].public, which) in expected
    }
    found: dict[str, Tensor] = {}
    for own, tensor in tensors.items():
        key = own if prefixed else own.removeprefix(PREFIX)
        found[expected.get(key) or public_key(key, states)] = tensor
    if tensors and not found.keys() & set(expected.values()):
        raise CheckpointError(
            f"adapter {adapter_name!r}: none of its vectors are among these tensors, such as {next(iter(tensors))}"
        )
    return found


def with_module_names(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors, with saved modules under their names in `named_modules`, as PEFT expects."""
    names = module_names(model)
    found = dict(tensors)
    inside = dict(_inside_saved(model, adapter_name))
    for raw, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            aux: Any = module
            for key in aux.adapter_state_dict_load_map(adapter_name):
                public = public_key(key, inside.get(raw, {}))
                for own in (joined(names[raw].public, public), joined(raw, public)):
                    if own in found:
                        found[joined(raw, key)] = found.pop(own)
    return found


def file_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Map the keys of an adapter's tensors in PEFT's state dict to their keys in veratune's files.

    PEFT's keys omit the adapter's name, as `get_peft_model_state_dict` returns them.

    Args:
        model: the model that PEFT has modified, with or without PEFT's prefix.
        adapter_name: the adapter's name.
    """
    names = module_names(model)
    raw_names = {id(module): raw for raw, module in model.named_modules() if not names[raw].wrapper}
    base = base_model_of(model)
    modules = base_modules(base)
    keys: dict[str, str] = {}
    for name, layer in adapted_layers(base).items():
        if adapter_name in layer.entries:
            public_name = names[raw_names[id(layer)]].public
            keys |= {joined(public_name, which): f"{which}.{name}" for which in _VECTORS}
    inside = dict(_inside_saved(model, adapter_name))
    for name, wrapper in saved_wrappers(modules, adapter_name).items():
        raw = raw_names[id(wrapper)]
        for own in wrapper.adapter_state_dict_load_map(adapter_name):
            key = public_key(own, inside.get(raw, {}))
            keys[joined(names[raw].public, key)] = f"modules_to_save.{joined(name, key)}"
    owners = {name: unwrapped(module) for name, module in _untouched(modules, adapter_name).items()}
    for name, first in bias_first_names(owners.items()).items():
        owner = owners[name.rpartition(".")[0]]
        keys[joined(names[raw_names[id(owner)]].public, "bias")] = f"bias.{first}"
    return keys


def base_model_of(model: Any) -> nn.Module:
    """Return the model that PEFT has modified, without PEFT's prefix."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def saved_wrappers(modules: Mapping[str, nn.Module], adapter_name: str) -> dict[str, Any]:
    """Return PEFT's wrappers of the modules that an adapter trains in full, by the modules' names.

    Args:
        modules: the result of `base_modules` for the model.
        adapter_name: the adapter's name.
    """
    found: dict[int, tuple[str, Any]] = {}
    for name, module in modules.items():
        wrapper: Any = module
        if isinstance(module, AuxiliaryTrainingWrapper) and wrapper.adapter_state_dict_load_map(adapter_name):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def _untouched(modules: Mapping[str, nn.Module], adapter_name: str) -> dict[str, nn.Module]:
    """Return the modules that an adapter does not train in full, without PEFT's wrappers for other adapters."""
    wrappers = {name: module for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper)}
    own = saved_wrappers(modules, adapter_name).values()
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        top = next((top for top in wrappers if f"{name}.".startswith(f"{top}.")), None)
        if top is None:
            found[name] = module
        elif not any(wrappers[top] is wrapper for wrapper in own):
            original = joined(top, "original_module")
            if f"{name}.".startswith(f"{original}."):
                found[top + name.removeprefix(original)] = module
    return found


def _inside_saved(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name of each of PEFT's wrappers of modules trained in full, with the public names in an adapter's copy.

    The keys of that mapping are names in the copy's `named_modules`, and prefixes of keys in its state dict.
    """
    for raw, module in model.named_modules():
        copies: Any = getattr(module, "modules_to_save", {}) if isinstance(module, AuxiliaryTrainingWrapper) else {}
        if adapter_name in copies:
            names = module_names(copies[adapter_name])
            yield raw, {own: name.public for inner, name in names.items() for own in (inner, name.state) if own}
