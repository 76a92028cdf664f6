"""Find layers whose weight the model reads instead of calling the layer, in the source code of its classes."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from torch import nn

from veratune.adapters.names import unwrapped

# Attributes of a weight that do not depend on its values, and functions that do not use its values.
_ABOUT = {"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "size", "dim", "numel", "layout", "is_cuda"}
_ASKING = {"isinstance", "hasattr", "getattr", "type", "id", "len"}

# The attribute path from a module to a parameter; "*" matches any item of a container.
Path = tuple[str, ...]


class Reader(NamedTuple):
    """A class whose `forward` computes with the weight of a submodule.

    Attributes:
        name: the class's name.
        always: whether it does so in every call, not only in one branch.
    """

    name: str
    always: bool


def reader_of(modules: Mapping[str, nn.Module], parameter: str) -> Reader | None:
    """Return the class that computes with a parameter of one of its submodules, or None if there is no such class.

    This finds expressions such as `self.attention.dense.weight` in `forward` and the methods that it calls, but not
    weights that are read through other variables or by functions that receive the module as an argument.

    Args:
        modules: the result of `base_modules` for the model.
        parameter: the parameter's dotted name in the model without adapters.
    """
    parts = parameter.split(".")
    for depth in range(len(parts) - 1):  # the module that owns the parameter does not count
        module = modules.get(".".join(parts[:depth]))
        if module is not None:
            kind: type = type(unwrapped(module))
            found = [always for read, always in _reads(kind).items() if _is(tuple(parts[depth:]), read)]
            if found:
                return Reader(kind.__name__, any(found))
    return None


def _is(path: Path, read: Path) -> bool:
    """Return whether `read` is the path of this parameter, or of an attribute that depends on its values."""
    here, after = read[: len(path)], read[len(path) :]
    same = len(here) == len(path) and all(other in ("*", own) for own, other in zip(path, here, strict=True))
    return same and not _ABOUT.intersection(after[:1])


@cache
def _reads(kind: type) -> dict[Path, bool]:
    """Return the attribute paths that a class reads in `forward`, mapped to whether every call reads them."""
    found: dict[Path, bool] = {}
    seen: dict[tuple[type, str], int] = {}  # the method, and whether it runs in every call
    waiting: list[tuple[type, str, bool]] = [(kind, "forward", True)]
    while waiting:
        start, name, always = waiting.pop()
        owner = next((cls for cls in start.__mro__ if name in vars(cls)), None)
        if owner is None or owner is nn.Module or seen.get((owner, name), -1) >= always:
            continue
        seen[owner, name] = always
        function = _tree(owner, name)
        if function is None or not function.args.args:
            continue
        for statement in function.body:
            for path, every_time in _uses(statement, function.args.args[0].arg, always):
                if path[0] == "super()":
                    following = kind.__mro__[kind.__mro__.index(owner) + 1 :]
                    after = next((cls for cls in following if path[1] in vars(cls)), None)
                    if after is not None:
                        waiting.append((after, path[1], every_time))
                    continue
                waiting.append((kind, path[0], every_time))
                found[path] = found.get(path, False) or every_time
    return found


def _tree(owner: type, name: str) -> ast.FunctionDef | None:
    """Return the syntax tree of a method, or None for anything else."""
    value = vars(owner)[name]
    function = inspect.unwrap(value) if inspect.isfunction(value) else None
    if function is None:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def _uses(node: ast.AST, own: str, always: bool) -> Iterator[tuple[Path, bool]]:
    """Yield the attribute paths from `own` that are used in a syntax tree, and whether each is always used."""
    if isinstance(node, ast.Attribute):
        path = _path(node, own)
        if path is not None:
            if path and isinstance(node.ctx, ast.Load):
                yield path, always
            return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
        return
    if isinstance(node, ast.Compare) and all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops):
        return
    test = node.test if isinstance(node, ast.If | ast.IfExp) else None
    for child in ast.iter_child_nodes(node):
        yield from _uses(child, own, always and (test is None or child is test))


def _path(node: ast.expr, own: str) -> Path | None:
    if isinstance(node, ast.Name):
        return () if node.id == own else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
        return ("super()",)
    if isinstance(node, ast.Attribute | ast.Subscript):
        before = _path(node.value, own)
        return None if before is None else (*before, node.attr if isinstance(node, ast.Attribute) else "*")
    return None
