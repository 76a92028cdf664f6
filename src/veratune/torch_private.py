"""The few things that torch has no public name for, each with what happens where a version lacks it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

# Whether a transformation of torch.func is at work. Without the name, every call counts as transformed.
transformations_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

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
