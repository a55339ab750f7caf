"""Writes docs/training_options.md: every option of every training program, as its dataclass declares it.

python -m training.engine.options_page
"""

import dataclasses
import importlib
import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any, Literal

from training.engine.arguments import default_values, options_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training_options.md"
PROGRAMS = ("pretrain", "finetune", "segment", "detect", "dino")
HEAD = """# Training options

Every option of the programs in `training/`, with its default and what it takes. An option is given as `--name value`,
or as `name: value` in the recipe that `--config` names; the command line wins. `--dry_run` prints what a run would be
like.

This page is written by `python -m training.engine.options_page` from the classes that hold the settings.
"""


def page() -> str:
    """The page: a table for each group of options that programs share, then one for each program."""
    modules = {program: importlib.import_module(f"training.{program}") for program in PROGRAMS}
    programs = {program: getattr(module, f"{program.title()}Arguments") for program, module in modules.items()}
    groups = dict.fromkeys(base for cls in programs.values() for base in cls.__mro__[1:-1] if _own(base))
    sections = [_section(_title(group), group) for group in groups]
    for program, cls in programs.items():
        titles = [_title(group) for group in groups if issubclass(cls, group)]
        shared = ", ".join(f"[{title}](#{title.lower().replace(' ', '-')})" for title in titles)
        sections.append(_section(f"training.{program}", cls, f"With the options of {shared}."))
    return "\n".join([HEAD, *sections])


def _title(cls: type) -> str:
    """`ResizedLabelArguments` as "Resized label options"."""
    words = re.findall("[A-Z][a-z]+", cls.__name__.removesuffix("Arguments").removesuffix("Settings"))
    return " ".join(words).capitalize() + ("" if words[-1] == "Augmentation" else " options")


def _own(cls: type) -> list[dataclasses.Field]:
    """The options that a class declares itself, also those of which it changes the default alone."""
    declared = inspect.get_annotations(cls)
    return [f for f in dataclasses.fields(cls) if f.name in declared] if dataclasses.is_dataclass(cls) else []


def _section(title: str, cls: type, also: str = "") -> str:
    text = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    rows = ["| option | default | takes | meaning |", "|---|---|---|---|"]
    noted, hints, defaults = options_of(cls), typing.get_type_hints(cls), default_values(cls)
    for f in _own(cls):
        cells = (
            f"`{f.name}`",
            f"`{_spell(defaults[f.name])}`",
            _takes(hints[f.name], noted[f.name]),
            noted[f.name]["help"],
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([f"## {title}\n", " ".join(filter(None, (text, also))) + "\n", *rows, ""])


def _spell(value: Any) -> str:
    """A value as a recipe writes it."""
    return json.dumps(value) if isinstance(value, list | dict | bool) or value is None else str(value)


def _takes(annotation: Any, noted: dict[str, Any]) -> str:
    """What an option takes: its type or its choices, and its range."""
    text, least, most = _name(annotation), noted.get("least"), noted.get("most")
    if least is not None:
        text += f", {least:g} to {most:g}" if most is not None else f", at least {least:g}"
    return text + (", two of them" if noted.get("interval") else "")


def _name(annotation: Any) -> str:
    """A type in words; integers stand for numbers too where numbers are taken, and None goes without saying."""
    simple = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", type(None): "nothing"}
    if annotation in simple:
        return simple[annotation]
    origin, parts = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{_spell(choice)}`" for choice in parts)
    if origin is list:
        return f"list of {_name(parts[0])}s"
    if origin is dict:
        return "mapping"
    return " or ".join(_name(part) for part in parts if part is not type(None) and not (part is int and float in parts))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
