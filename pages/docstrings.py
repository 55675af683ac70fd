"""An extension of griffe: the section "Example:" of our docstrings is the one that griffe calls "Examples:"."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Lets griffe see the examples in docstrings as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", obj.docstring.value)
