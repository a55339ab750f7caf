"""Lets the reference show the fields of configurations with their types and defaults.

transformers makes a dataclass of every configuration when Python runs it; griffe reads source alone, and sees none.
"""

import re
from typing import Any

import griffe

SHARED_LINE = re.compile(r"^    (\w+(?:, \w+)+):((?:.*\n?)(?: {8}.*\n?)*)", re.MULTILINE)
"""An entry of `Args:` that describes several fields at once, with its further lines."""


class ConfigDefaults(griffe.Extension):
    """Calls configurations dataclasses, whose `__init__` griffe then makes of their fields."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        decorators = [str(decorator.value) for decorator in cls.decorators]
        if "strict" not in decorators:
            return
        if not any(name.startswith("dataclass") for name in decorators):
            name = griffe.ExprName("dataclasses.dataclass")
            cls.decorators.append(griffe.Decorator(name, lineno=cls.lineno, endlineno=cls.lineno))
            for name in ("_out_features", "_out_indices"):  # set by the arguments of these names without the underscore
                field = cls.members[name]
                public = griffe.Attribute(name[1:], value=field.value, annotation=field.annotation)
                public.labels |= field.labels
                cls.set_member(public.name, public)
        if cls.docstring is not None:
            cls.docstring.value = SHARED_LINE.sub(
                lambda entry: "".join(f"    {name}:{entry[2].rstrip()}\n" for name in entry[1].split(", ")),
                cls.docstring.value,
            )
