"""The few things that torch has no public name for, each with what happens where a version lacks it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.utils._pytree

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
