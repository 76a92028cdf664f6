"""Which layers' weights a model computes with itself, found in the source of its classes, without running it."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

from veratune.targets import unwrapped

# Attributes of a weight that are no use of its values, and functions that ask what it is.
_ABOUT = {"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "size", "dim", "numel", "layout", "is_cuda"}
_ASKING = {"isinstance", "hasattr", "getattr", "type", "id", "len"}

# The path of attributes from a module to a parameter; "*" for any item of a container.
Path = tuple[str, ...]


def reader_of(modules: dict[str, nn.Module], parameter: str) -> str | None:
    """Return the class whose forward computes with a parameter of a module inside it, or None if no source shows that.

    Seen are reads such as `self.attention.dense.weight` in `forward` and in the methods it uses. Not seen are weights
    that are read through other variables or by functions that are given the module.

    Args:
        modules: what `base_modules` returns for the model.
        parameter: the parameter's dotted name in the model without adapters.
    """
    parts = parameter.split(".")
    for depth in range(len(parts) - 1):  # the module that has the parameter is no reader from outside
        module = modules.get(".".join(parts[:depth]))
        if module is not None and any(_is(tuple(parts[depth:]), read) for read in _reads(type(unwrapped(module)))):
            return type(unwrapped(module)).__name__
    return None


def _is(path: Path, read: Path) -> bool:
    """Return whether what is read is the parameter at this path, or something computed from it."""
    here, after = read[: len(path)], read[len(path) :]
    same = len(here) == len(path) and all(other in ("*", own) for own, other in zip(path, here, strict=True))
    return same and not _ABOUT.intersection(after[:1])


@cache
def _reads(kind: type[nn.Module]) -> frozenset[Path]:
    """Return the parameters of inner modules that a class computes with in `forward`."""
    found: set[Path] = set()
    seen: set[tuple[type, str]] = set()
    waiting = [(kind, "forward")]
    while waiting:
        start, name = waiting.pop()
        owner = next((cls for cls in start.__mro__ if name in vars(cls)), None)
        if owner is None or owner is nn.Module or (owner, name) in seen:
            continue
        seen.add((owner, name))
        function = _source(owner, name)
        if function is None or not function.args.args:
            continue
        own = function.args.args[0].arg
        found.update(_paths_read(function, own))
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own:
                waiting.append((kind, node.attr))
            elif isinstance(node, ast.Attribute) and _is_super(node.value):
                following = kind.__mro__[kind.__mro__.index(owner) + 1 :]
                after = next((cls for cls in following if node.attr in vars(cls)), None)
                if after is not None:
                    waiting.append((after, node.attr))
    return frozenset(found)


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _source(owner: type, name: str) -> ast.FunctionDef | None:
    """Return a method as it is written, or None for anything else."""
    value = vars(owner)[name]
    function = inspect.unwrap(value) if inspect.isfunction(value) else None
    if function is None:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def _paths_read(node: ast.AST, own: str) -> Iterator[Path]:
    """Yield the paths from `own` to what is computed with somewhere in a piece of source."""
    if isinstance(node, ast.Attribute):
        path = _path(node, own)
        if path is not None:
            if isinstance(node.ctx, ast.Load):
                yield path
            return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING:
        return
    if isinstance(node, ast.Compare) and all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops):
        return
    for child in ast.iter_child_nodes(node):
        yield from _paths_read(child, own)


def _path(node: ast.expr, own: str) -> Path | None:
    if isinstance(node, ast.Name):
        return () if node.id == own else None
    if isinstance(node, ast.Attribute | ast.Subscript):
        before = _path(node.value, own)
        return None if before is None else (*before, node.attr if isinstance(node, ast.Attribute) else "*")
    return None
