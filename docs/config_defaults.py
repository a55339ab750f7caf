"""Lets the reference show the fields of configurations and settings with their types, defaults and help.

transformers makes a dataclass of every configuration when Python runs it; griffe reads source alone, and sees none.
"""

import ast
import re
from typing import Any

import griffe

SHARED_LINE = re.compile(r"^    (\w+(?:, \w+)+):((?:.*\n?)(?: {8}.*\n?)*)", re.MULTILINE)
"""An entry of `Args:` that describes several fields at once, with its further lines."""


class ConfigDefaults(griffe.Extension):
    """Calls configurations dataclasses, so that griffe sees their fields, and quotes the help of fields of settings."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        decorators = [str(decorator.value) for decorator in cls.decorators]
        if "strict" not in decorators or cls.docstring is None:
            return
        if any(name.startswith("dataclass") for name in decorators):
            helps = {name: _read_field(field) for name, field in cls.members.items() if field.is_attribute}
            entries = [f"    {name}: {text}" for name, text in helps.items() if text]
            cls.docstring.value += "\n\nArgs:\n" + "\n".join(entries) if entries else ""
            return
        name = griffe.ExprName("dataclasses.dataclass")
        cls.decorators.append(griffe.Decorator(name, lineno=cls.lineno, endlineno=cls.lineno))
        for name in ("_out_features", "_out_indices"):  # set by the arguments of these names without the underscore
            field = cls.members[name]
            public = griffe.Attribute(name[1:], value=field.value, annotation=field.annotation)
            public.labels |= field.labels
            cls.set_member(public.name, public)
        cls.docstring.value = SHARED_LINE.sub(
            lambda entry: "".join(f"    {name}:{entry[2].rstrip()}\n" for name in entry[1].split(", ")),
            cls.docstring.value,
        )


def _read_field(field: griffe.Attribute) -> str | None:
    """The help of a field; a default that a function makes is replaced by what that function returns."""
    call = ast.parse(str(field.value)).body[0].value
    keywords = {entry.arg: entry.value for entry in getattr(call, "keywords", ())}
    if isinstance(keywords.get("default_factory"), ast.Lambda):
        field.value = ast.unparse(keywords["default_factory"].body)
    return ast.literal_eval(keywords["metadata"])["help"] if "metadata" in keywords else None
