"""Names of a model's modules, ignoring adapters and torch's wrappers."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from veratune.layers import SavedModule, VeraLayer, VeraModule
from veratune.utils.torch_private import in_state_dict, name_in_wrapper

_Module = TypeVar("_Module", bound=nn.Module)


class ModuleName(NamedTuple):
    """The names of one module.

    Attributes:
        public: its name without torch's wrappers, used in files, targets and messages. A wrapper has the same public
            name as the module inside.
        state: the prefix of its keys in a state dict, in which some wrappers appear and some do not.
        wrapper: whether it is a wrapper.
    """

    public: str
    state: str
    wrapper: bool


def joined(module_name: str, name: str) -> str:
    """Return the dotted name of a member of a module."""
    return f"{module_name}.{name}" if module_name else name


def ends_in(name: str, suffix: str) -> bool:
    """Return whether a dotted name equals a suffix, or ends with it after a dot."""
    return name == suffix or name.endswith(f".{suffix}")


def without_wrappers(module: nn.Module) -> nn.Module:
    """Return the module inside torch's wrappers: torch.compile, checkpoint_wrapper, DataParallel, FSDP1."""
    while (name := name_in_wrapper(module)) is not None:
        inside = module._modules[name]
        assert inside is not None
        module = inside
    return module


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the base module of an adapted or saved module, or else the module itself, without torch's wrappers."""
    module = without_wrappers(module)
    if isinstance(module, VeraLayer | VeraModule):
        return without_wrappers(module.base_layer)
    return without_wrappers(module.original_module) if isinstance(module, SavedModule) else module


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules by dotted name, ignoring adapters and torch's wrappers.

    A module that is used several times has several names. Adapted layers and saved modules have the names of the
    modules that they wrap; of the modules inside them, only the submodules of a saved module's original are listed.
    """
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> None:
        module = without_wrappers(module)
        found[name] = module
        if isinstance(module, VeraLayer):
            return
        for child_name, child in unwrapped(module)._modules.items():
            if child is not None:
                visit(child, joined(name, child_name))

    visit(model, "")
    return found


def adapted_layers(model: nn.Module) -> dict[str, VeraLayer]:
    """Return the adapted layers and parameters, each once, by their names in the model without adapters."""
    found: dict[int, tuple[str, VeraLayer]] = {}
    for name, module in base_modules(model).items():
        if isinstance(module, VeraLayer):
            found.setdefault(id(module), (name, module))
        elif isinstance(module, VeraModule):
            for parameter, layer in module.parameter_layers().items():
                found.setdefault(id(layer), (joined(name, parameter), layer))
    return dict(found.values())


def first_names(modules: dict[str, nn.Module], wanted: type[_Module]) -> dict[str, _Module]:
    """Return the modules of one class by name, each under its first name only."""
    found: dict[int, tuple[str, _Module]] = {}
    for name, module in modules.items():
        if isinstance(module, wanted):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a model's parameters by all of their names in the model without adapters."""
    for name, module in base_modules(model).items():
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                yield joined(name, parameter_name), parameter


def module_names(model: nn.Module) -> dict[str, ModuleName]:
    """Return the names of all modules, including adapters and wrappers, keyed by their names in `named_modules`.

    A module that is used several times has several names.
    """
    found: dict[str, ModuleName] = {}

    def visit(module: nn.Module, name: str, public: str, state: str) -> None:
        held = name_in_wrapper(module)
        found[name] = ModuleName(public, state, held is not None)
        for child_name, child in module._modules.items():
            if child is not None:
                hidden = child_name == held
                shown = not hidden or in_state_dict(child_name)
                visit(
                    child,
                    joined(name, child_name),
                    public if hidden else joined(public, child_name),
                    joined(state, child_name) if shown else state,
                )

    visit(model, "", "", "")
    return found


def public_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict without torch's wrappers in the keys; its tensors are the module's, not copies."""
    names = {name.state: name.public for name in module_names(module).values()}
    return {public_key(key, names): tensor for key, tensor in module.state_dict(keep_vars=True).items()}


def load_public_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a state dict with the keys of `public_state` into a module."""
    own = dict(zip(public_state(module), module.state_dict(keep_vars=True), strict=True))
    module.load_state_dict({own[key]: tensor for key, tensor in tensors.items()})


def public_key(key: str, names: Mapping[str, str]) -> str:
    """Return a key of a state dict without torch's wrappers.

    Args:
        key: the key.
        names: the modules' key prefixes, mapped to the modules' public names.
    """
    owner, rest = key, ""
    while owner and owner not in names:
        owner, _, last = owner.rpartition(".")
        rest = joined(last, rest) if rest else last
    public = names.get(owner, owner)
    return joined(public, rest) if rest else public
