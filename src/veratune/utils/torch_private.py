"""The few things that torch has no public name for, each with what happens where a version lacks it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.utils._pytree
from torch import nn

# Whether a transformation of torch.func is at work. Without the name, every call counts as transformed.
transformations_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

# The tensors, and whatever else there is, inside of dicts, lists and the like.
tree_leaves: Callable[[Any], list[Any]] = torch.utils._pytree.tree_leaves

_length_of_mode_stack: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_while_compiling(function: _Function) -> _Function:
    """Let a compiler call this function once, while tracing, and take its result for a constant.

    It is what `torch.compiler.assume_constant_result` does, which imports the compiler: a second for everybody who
    imports this library.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def modes_active() -> bool:
    """Return whether something watches or replaces tensor operations (fake tensors, tracing). If unknown, yes."""
    return _length_of_mode_stack() > 0


def outside_transformations() -> AbstractContextManager[Any]:
    """Return a context in which new tensors belong to no transformation of torch.func, and so outlive it."""
    if not transformations_active():
        return nullcontext()
    try:
        from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    except ImportError:
        return nullcontext()
    context: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return context


_current_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_current_node: Callable[[], Any] = getattr(torch._C, "_current_autograd_node", lambda: None)
_next_number: Callable[[], int] = getattr(torch.autograd, "_get_sequence_nr", lambda: 0)


def in_backward() -> bool:
    """Return whether this thread is computing a backward pass."""
    return _current_graph_task() != -1


def next_node_number() -> int:
    """Return the number that the next node of this thread's autograd graphs will have."""
    return _next_number()


def node_number_of_backward() -> int | None:
    """Return the number of the node whose backward is being computed in this thread, or None if there is none."""
    number: Callable[[], int] | None = getattr(_current_node(), "_sequence_nr", None)
    return None if number is None else number()


# What torch's wrappers call the module inside: torch.compile, checkpoint_wrapper (and offload_wrapper), FSDP 1.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# Those of them that leave the name out of a state dict.
_NOT_IN_STATE = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def name_in_wrapper(module: nn.Module) -> str | None:
    """Return the name under which one of torch's wrappers holds a module; None for every other module."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return next((name for name in _WRAPPED if module._modules.get(name) is not None), None)


def in_state_dict(name: str) -> bool:
    """Return whether state dicts show what a wrapper calls the module inside."""
    return name not in _NOT_IN_STATE


def follow_replacement(parent: nn.Module) -> None:
    """Make a compiled module call the module that it holds now, rather than the one that it was made around."""
    initialize: Callable[[nn.Module], None] | None = getattr(type(parent), "_initialize", None)
    if initialize is not None and "_orig_mod" in parent._modules:
        initialize(parent)
