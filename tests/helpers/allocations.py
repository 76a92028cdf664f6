"""Memory that runs out at one allocation of a change, at each of them in turn."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import veratune
from undoing import seen

PACKAGES = (str(Path(veratune.__file__).parent), str(Path(peft.__file__).parent))
_MESSAGE = "no memory left"
_ALWAYS = ("aten::lift_fresh", "aten::detach_copy")  # a view by its schema, of a tensor that was just made


class Allocations(TorchDispatchMode):
    """Counts the operations that may ask for memory, and lets one of them find none.

    These are all of torch's but those that return a view, and numpy's zeros. Those written in place count as well, as
    many of them need memory meanwhile.

    Attributes:
        count: how many there were.
        points: for each place in the code, by the lines that led there, when it was reached first and last.
    """

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.count, self.points = 0, {}
        self._at = at
        self._patches = ExitStack()

    points: dict[tuple[Any, ...], tuple[int, int]]

    def _take(self, what: str) -> None:
        self.count += 1
        if self.count == self._at:
            raise MemoryError(_MESSAGE)
        if not self._at:
            point = (what, *_lines_here())
            self.points[point] = (self.points.get(point, (self.count,))[0], self.count)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _ALWAYS or not _is_view(func._schema):
            self._take(func._schema.name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        zeros = np.zeros

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._take("numpy.zeros")
            return zeros(*args, **kwargs)

        patched = self._patches.enter_context(pytest.MonkeyPatch.context())
        patched.setattr(np, "zeros", counted)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[arg-type]
        self._patches.close()


def _lines_here() -> Iterator[tuple[str, int]]:
    """Yield the lines of veratune and PEFT that are running, the innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGES):
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def _is_view(schema: Any) -> bool:
    aliases = [own.alias_info for own in schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def is_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out; torch's load_state_dict and readers of files make their own."""
    # The last is what safetensors, which PEFT reads with, says where torch cannot make it a tensor.
    said = (_MESSAGE, "does not fit into memory", "could not determine the shape of object type")
    return any(message in str(error) for message in said)


def identities(model: Any) -> dict[str, int]:
    """Return which parameter stands under which name: optimizers hold those that are trained."""
    if not isinstance(model, torch.nn.Module):
        return {}
    return {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}


def allocations_of(make: Callable[[], Any], change: Callable[[Any], Any]) -> list[int]:
    """Return which allocations of a change to let fail: the first and the last at each point; in `make fuzz`, all."""
    change(make())  # once without counting, for what is made on first use
    with Allocations() as counter:
        change(make())
    if "VERATUNE_FUZZ" in os.environ:
        return list(range(1, counter.count + 1))
    return sorted({at for times in counter.points.values() for at in times})


def check_each(
    make: Callable[[], Any],
    change: Callable[[Any], Any],
    points: Callable[[Callable[[], Any], Callable[[Any], Any]], list[int]],
    failing: Callable[[int], AbstractContextManager[Any]],
    expected: Callable[[BaseException], bool],
    seen_of: Callable[[Any], Any] = seen,
) -> int:
    """Make a change fail at many points, and compare what is left with the model before and after.

    A model that is as before is used on, so that each failure meets what the failures before have left.

    Args:
        make: returns the model, or what else is changed.
        change: the change.
        points: returns where it is to fail.
        failing: returns a context in which it fails at one of them.
        expected: whether an error is the failure.
        seen_of: returns what must be as before.

    Returns:
        the number of failures.
    """
    model = make()
    change(model)
    new = seen_of(model)
    model = make()
    old = seen_of(model)
    assert new != old
    failed = 0
    for at in points(make, change):
        parameters, raised = identities(model), False
        try:
            with failing(at):
                change(model)
        except BaseException as error:
            if not expected(error):
                raise
            # An interrupt inside torch's own no_grad leaves gradients off.
            torch.set_grad_enabled(True)
            failed, raised = failed + 1, True
        left = seen_of(model)
        if left == new:
            model = make()
            continue
        differing = [key for key in old.keys() | left.keys() if left.get(key) != old.get(key)]
        assert raised and not differing, (at, differing[:5])
        assert identities(model) == parameters, at
    assert failed
    change(model)
    assert seen_of(model) == new
    return failed


def check_every_allocation(
    make: Callable[[], Any], change: Callable[[Any], Any], seen_of: Callable[[Any], Any] = seen
) -> int:
    """Make a change fail wherever it allocates; see `check_each`."""
    return check_each(make, change, allocations_of, Allocations, _out_of_memory, seen_of)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | RuntimeError | ValueError) and is_of_memory(error)
