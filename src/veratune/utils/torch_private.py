"""The private torch APIs that veratune uses, each with a fallback for versions without it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.utils._pytree
from torch import nn
from torch.autograd import forward_ad

# Whether a torch.func transformation is active. Without this API, every call is treated as transformed.
_functions_transformed: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

# The leaves (tensors and other values) of nested dicts, lists and other containers.
tree_leaves: Callable[[Any], list[Any]] = torch.utils._pytree.tree_leaves

# Whether products of half-precision operands on a GPU can return their float32 sums unrounded (`out_dtype=`).
returns_sums: bool = torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype")

_length_of_mode_stack: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_while_compiling(function: _Function) -> _Function:
    """Mark a function to be called once while tracing, with its result treated as a constant.

    Its arguments must be constants for the compiler: strings, booleans, devices and dtypes. Older versions of torch
    reject other objects, and any version may make a number that differs between layers symbolic.

    This does the same as `torch.compiler.assume_constant_result`, which imports the compiler and would therefore add a
    second to the import of this library.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Call a `Function` as `apply` does outside torch.func transformations, without checking for a transformation."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def parameter_of(module: nn.Module, name: str) -> Any:
    """Return getattr(module, name, None), but save the microsecond that torch takes to look up a parameter."""
    parameters = module._parameters
    if name in parameters and name not in module.__dict__:
        return parameters[name]
    return getattr(module, name, None)


def modes_active() -> bool:
    """Return whether a dispatch mode is active (fake tensors, tracing). True if unknown."""
    return _length_of_mode_stack() > 0


def transformations_active() -> bool:
    """Return whether a torch.func transformation, or forward-mode differentiation, is active in this call."""
    return _functions_transformed() or getattr(forward_ad, "_current_level", -1) >= 0


def outside_transformations() -> AbstractContextManager[Any]:
    """Return a context in which torch.func transformations do not wrap new tensors, so that these outlive them."""
    if not _functions_transformed():
        return nullcontext()
    try:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    except ImportError:
        return nullcontext()
    context: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return context


# The hooks that change the tensors that autograd saves (checkpointing, offloading), or None; not None if unknown.
_hooks_on_saved_tensors: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: True
)


def saved_tensors_are_hooked() -> bool:
    """Return whether hooks currently change the tensors that autograd saves. True if unknown."""
    return _hooks_on_saved_tensors(False) is not None


_current_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_current_node: Callable[[], Any] = getattr(torch._C, "_current_autograd_node", lambda: None)
_next_number: Callable[[], int] = getattr(torch.autograd, "_get_sequence_nr", lambda: 0)


def in_backward() -> bool:
    """Return whether this thread is computing a backward pass."""
    return _current_graph_task() != -1


# Versions of torch without this API may save anything.
_saving_hooks: Callable[[bool], Any] = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def may_be_recomputed(*, training: bool) -> bool:
    """Return whether gradient checkpointing may recompute the current computation, as far as this can be detected.

    Checkpointing runs a block with saved-tensor hooks or, like an evaluation, without gradients. Models use it in
    training mode.

    Args:
        training: whether the module is in training mode.
    """
    if torch.is_grad_enabled():
        return _saving_hooks(False) is not None
    return training and not torch.is_inference_mode_enabled()


def next_node_number() -> int:
    """Return the sequence number of the next autograd node created in this thread."""
    return _next_number()


def node_number_of_backward() -> int | None:
    """Return the sequence number of the node whose backward is running in this thread, or None."""
    number: Callable[[], int] | None = getattr(_current_node(), "_sequence_nr", None)
    return None if number is None else number()


def may_be_checkpoint(kind: type) -> bool:
    """Return whether gradient checkpointing may keep objects of this type from the forward to the backward pass."""
    frame = kind.__name__ == "_CheckpointFrame" and kind.__module__ == "torch.utils.checkpoint"
    return frame or issubclass(kind, torch.autograd.function.BackwardCFunction)


def pending_checkpoint(kept: Any) -> Any:
    """Return the function that gradient checkpointing will call in the backward pass, or None after that pass.

    Args:
        kept: an object of a type for which `may_be_checkpoint` is true.
    """
    if not isinstance(kept, torch.autograd.function.BackwardCFunction):
        waits = any(holder() is not None for holder in getattr(kept, "weak_holders", ()))
        return getattr(kept, "recompute_fn", None) if waits else None
    try:
        kept.saved_tensors  # noqa: B018  # fails after the backward pass
    except RuntimeError:
        return None
    # The name of the attribute in torch and DeepSpeed, and in other implementations.
    return getattr(kept, "run_function", None) or getattr(kept, "forward_function", None)


# The attribute in which a wrapper holds its module, by the wrapper's class: torch.compile, checkpoint_wrapper (also
# offload_wrapper), FSDP1. A model may also have a submodule with such a name.
_WRAPPED = {
    "OptimizedModule": "_orig_mod",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}
# Attributes that do not appear in state dict keys.
_NOT_IN_STATE = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def name_in_wrapper(module: nn.Module) -> str | None:
    """Return the attribute under which a torch wrapper holds its module; None for other modules."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    for kind in type(module).__mro__:  # by name, because importing these classes takes a second
        name = _WRAPPED.get(kind.__name__) if kind.__module__.startswith("torch.") else None
        if name is not None and module._modules.get(name) is not None:
            return name
    return None


def in_state_dict(name: str) -> bool:
    """Return whether a wrapper's attribute name appears in state dict keys."""
    return name not in _NOT_IN_STATE


def follow_replacement(parent: nn.Module) -> None:
    """Make a compiled module call the module that it holds now, not the one that it was created with."""
    initialize: Callable[[nn.Module], None] | None = getattr(type(parent), "_initialize", None)
    if initialize is not None and name_in_wrapper(parent) == "_orig_mod":
        initialize(parent)
