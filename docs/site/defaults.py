"""A griffe extension: a field defined by `setting(default, ...)` is shown with its default alone."""

from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Replace a call of `setting` by its first argument, or by the empty value that a factory returns."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Change the value before griffe makes a dataclass's parameters of it."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and call.canonical_path.endswith("setting"):
            default = str(call.arguments[0])
            attr.value = {"dict": "{}", "list": "[]"}.get(default, default)
