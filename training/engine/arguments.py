"""Settings of a program: a dataclass, filled from its defaults, then a YAML recipe, then the command line.

Recipe and command line are one mechanism. `--learning_rate 1e-3` is the YAML entry `learning_rate: 1e-3`; a dotted key
(`--model.use_gaussian false`) is an entry of a mapping; a key without a value means `true`. What comes later wins; an
unknown key or a value of the wrong type ends the program with one sentence.

What an option takes decides how a word is read: an option of text gets the word as typed (`--output_dir 010`), and only
an option of numbers makes a number of it.
"""

import copy
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar

import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from rich.table import Table
from rich.text import Text

from locatvit_hf.utils.console import PublicConsole, hide_credentials
from locatvit_hf.utils.io import OUT_OF_MEMORY, is_out_of_memory, load_yaml, one_line, read_text
from training.engine import trainer_names

Arguments = TypeVar("Arguments")
console, error_console = PublicConsole(), PublicConsole(stderr=True)


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    interval: bool = False,
    runtime: bool = False,
) -> Any:
    """A field of a dataclass of settings; a class that gives it another default alone keeps the rest.

    Args:
        default: Copied for each instance where it is a list or a dict.
        help: One sentence for `--help` and the documentation.
        least: The smallest number that makes sense, also of each in a list.
        most: The largest one.
        interval: It is two numbers, the smaller one first.
        runtime: May change between an interrupted run and its continuation: it leaves the weights alone.
    """
    given = {"help": help, "least": least, "most": most, "interval": interval, "runtime": runtime}
    metadata = {name: value for name, value in given.items() if value is not None and value is not False}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(cls: type) -> dict[str, dict[str, Any]]:
    """What `option` notes of every option of a dataclass of settings, from its own class or the nearest above it."""
    found: dict[str, dict[str, Any]] = {f.name: {} for f in dataclasses.fields(cls)}
    for base in reversed(cls.__mro__):
        for f in dataclasses.fields(base) if dataclasses.is_dataclass(base) else ():
            found[f.name] = {**found[f.name], **f.metadata}
    return found


def default_values(cls: type) -> dict[str, Any]:
    """The default of every option of a dataclass of settings."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(cls)
    }


def runtime_options(cls: type) -> set[str]:
    """The options that may change between an interrupted run and its continuation."""
    return {name for name, noted in options_of(cls).items() if noted.get("runtime")}


NULLS = ("", "~", "null", "Null", "NULL")
"""How YAML writes that there is nothing."""


class RecipeLoader(yaml.SafeLoader):
    """YAML that takes a scalar for something else than text only where nothing of the text is lost.

    `true` and `false` are booleans; `no`, `off`, `on` and `yes` are words. `8` and `0.5` are numbers; `010`, `1_000`,
    `1.10`, `12:30` and dates, which YAML 1.1 reads as numbers and dates, are words too. An option that takes numbers
    makes numbers of those that are such, see `_number`.
    """

    yaml_implicit_resolvers = {
        first: [entry for entry in resolvers if entry[0].rpartition(":")[2] in ("null", "merge", "value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _construct_float(loader: RecipeLoader, node: yaml.ScalarNode) -> float | str:
    value = float(node.value)
    return value if repr(value) == node.value else node.value


for kind, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"0|-?[1-9]\d*", "-0123456789"),
    ("recipe-float", r"-?\d+\.\d+", "-0123456789"),
):
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), list(first))
RecipeLoader.add_constructor("tag:yaml.org,2002:recipe-float", _construct_float)


def parse_arguments(cls: type[Arguments], argv: list[str]) -> Arguments:
    """Fill a dataclass of settings from the recipe named by `--config` and the other options in `argv`.

    Raises:
        ValueError: unknown option, unreadable recipe, value of the wrong type; the message is one sentence.
    """
    given = _parse_command_line(argv, cls)
    recipe = given.pop("config", None)
    values = load_recipe(recipe) if recipe is not None else {}
    # Where an option has other names, the command line overrules it under any of them.
    names = getattr(cls, "other_names", {})
    overruled = {names.get(name, name) for name in given}
    values = {name: v for name, v in values.items() if name in given or names.get(name, name) not in overruled}
    return build_arguments(cls, _merge(values, given))


def load_recipe(path: str | Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read one YAML recipe as a mapping of option to value.

    The recipe that `extends` names, a file beside it, is read first; its entries stay where this one is silent.

    Args:
        path: The file.
        extended_by: Recipes that name this one in `extends`, and which it may not name itself.

    Raises:
        ValueError: It cannot be read, is not a mapping, or extends itself; one sentence.
    """
    if Path(path).resolve() in extended_by:
        raise ValueError(f"The recipe {path} extends itself: {' is extended by '.join(map(str, extended_by[::-1]))}.")
    try:
        recipe = load_yaml(read_text(path), RecipeLoader)
    except OSError as error:
        raise ValueError(f"Cannot read the recipe {path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe {path} is not valid YAML: {one_line(error)}.") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} must be a mapping of option to value.")
    parent = recipe.pop("extends", None)
    if parent is None:
        return recipe
    if not isinstance(parent, str):
        raise ValueError(f"The recipe {path} extends {parent!r}: give the name of one file beside it.")
    return _merge(load_recipe(Path(path).parent / parent, (*extended_by, Path(path).resolve())), recipe)


def build_arguments(cls: type[Arguments], values: dict[str, Any]) -> Arguments:
    """Make a dataclass of settings from a mapping, with names, types and ranges checked.

    A class may know options by other names: its `other_names` says which option each means, and its
    `translate(values)` replaces them.
    """
    values = getattr(cls, "translate", dict)(values)
    fields = options_of(cls)
    for name in values:
        if name not in fields:
            raise ValueError(_unknown_option(str(name), fields))
    hints = typing.get_type_hints(cls)
    values = {name: _coerce(value, hints[name], name) for name, value in values.items()}
    try:
        arguments = cls(**values)
    except StrictDataclassError as error:
        raise ValueError(describe(error)) from None
    _check_ranges(arguments)
    return arguments


def _unknown_option(name: str, known: Collection[str]) -> str:
    """One sentence about an option that there is not, with the one that is meant where that can be told."""
    if name in trainer_names.REMARKS:
        return f"There is no option {name!r}: {trainer_names.REMARKS[name]}."
    ours = {**trainer_names.OPTIONS, **trainer_names.OTHER_TOOLS}.get(name)
    if ours is not None and ours.split(".")[0] in known:
        return f"Unknown option {name!r}; here it is {ours!r}."
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"Unknown option {name!r}{f'; did you mean {close[0]!r}' if close else ''}."


def _check_ranges(arguments: Any) -> None:
    """Raises ValueError for a number that makes no sense, and for a list that is not an interval where one is meant."""
    for name, noted in options_of(type(arguments)).items():
        value = getattr(arguments, name)
        if noted.get("interval") and (len(value) != 2 or value[0] > value[1]):
            raise ValueError(f"{name} must be two numbers, the smaller one first, got {value}.")
        low, high = noted.get("least", -math.inf), noted.get("most", math.inf)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not low <= number <= high:
                bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name} must be {bounds}, got {number}.")


def public_settings(arguments: Any) -> dict[str, Any]:
    """All settings by name, as they are written down: addresses without what may give access to them."""
    return hide_credentials(dataclasses.asdict(arguments))


def describe(error: StrictDataclassError) -> str:
    """The last line of a type or range error, which names the field and what was expected, as one sentence."""
    return str(error.__cause__ or error).strip().splitlines()[-1].strip().rstrip(".") + "."


def run_program(main: Callable[[Arguments], Any], cls: type[Arguments]) -> None:
    """Parse `sys.argv`, call `main`, and turn what a user can cause into one red sentence and exit status 1."""
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    transformers.logging.set_verbosity_error()  # a fresh head is no news here, nor is the progress of a small file
    transformers.logging.disable_progress_bar()
    try:
        arguments = parse_arguments(cls, words)
        if len(words) < len(sys.argv[1:]):
            console.print(_help(main, arguments))
        else:
            main(arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        # An error from a data-loading process carries that process's traceback; the sentence is its last line.
        sentence = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        error_console.print(sentence, style="red", markup=False)
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        error_console.print(OUT_OF_MEMORY, style="red", markup=False)
        raise SystemExit(1) from None


def _parse_command_line(argv: list[str], cls: type) -> dict[str, Any]:
    """`--a 1 --b.c=x --flag` as `{"a": 1, "b": {"c": "x"}, "flag": True}`; see `_read_word`.

    Args:
        cls: Whose fields say what the options take.
    """
    fields, hints = {f.name for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    others = {name: getattr(cls, "other_names", {})[name] for name in getattr(cls, "other_names_as_typed", ())}
    given: dict[str, Any] = {}
    words = list(argv)
    while words:
        key, has_value, text = words.pop(0).partition("=")
        if not key.startswith("--") or key == "--":
            raise ValueError(f"Expected an option that starts with '--', got {key!r}.")
        word = text if has_value else words.pop(0) if words and not words[0].startswith("--") else None
        *parents, name = key[2:].replace("-", "_").split(".")
        target = given
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"{key} is an entry of {parent}, which was given as {target!r} before.")
        meant = others.get(name, name)
        annotation = hints[meant] if not parents and meant in fields else str if name == "config" else Any
        target[name] = True if word is None else _read_word(word, annotation)
    return given


def _read_word(word: str, annotation: Any) -> Any:
    """The value of one word of the command line, for an option of this type.

    Where the type takes text and no number, it is the word itself: `010`, `12:30`, `a: b`, `runs #2` and `true` are the
    text that was typed. `null` is None where the type takes None, and `[a, b]` a list where it takes one.
    """
    kinds = _kinds(annotation)
    texts = {kind for kind in kinds if kind is str or _texts_of(kind)}
    lists = {kind for kind in kinds if kind == list[str]}
    try:
        if not (texts or lists) or kinds - texts - lists - {type(None)}:
            return yaml.load(word, RecipeLoader)
        if type(None) in kinds and word in NULLS:
            return None
        if lists and word.lstrip().startswith("["):
            return yaml.load(word, yaml.BaseLoader)  # every scalar is text
    except yaml.YAMLError:
        pass
    return word


def _kinds(annotation: Any) -> set[Any]:
    """The types that a union is made of, or the only one."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return set(typing.get_args(annotation)) if union else {annotation}


def _texts_of(annotation: Any) -> tuple[str, ...]:
    """The words of a Literal of nothing but words."""
    words = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
    return words if all(isinstance(word, str) for word in words) else ()


def _merge(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`other` over `base`, mappings entry by entry."""
    merged = dict(base)
    for name, value in other.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _coerce(value: Any, annotation: Any, name: str) -> Any:
    """A value of a recipe as the type of its option means it.

    A word becomes a number where the type takes numbers, and a number becomes text where it takes text alone. A single
    value where a list is meant is a list of one. name: of the option.

    Raises:
        ValueError: For a boolean where text is meant: what stood there is not known any more.
    """
    kinds = _kinds(annotation)
    if isinstance(value, dict):
        return {key: _coerce(entry, str | float | int | dict | bool, name) for key, entry in value.items()}
    of_lists = [kind for kind in kinds if typing.get_origin(kind) is list]
    if of_lists and value is not None and (isinstance(value, list) or not kinds & {str, int, float}):
        entries = value if isinstance(value, list) else [value]
        return [_coerce(entry, typing.get_args(of_lists[0])[0], name) for entry in entries]
    if isinstance(value, list):
        return [_coerce(entry, annotation, name) for entry in value]
    if isinstance(value, str) and kinds & {int, float}:
        number = _number(value, float in kinds)
        # A recipe writes a number that is spelled like this only in quotes where it means text.
        return value if str in kinds and str(number) == value else number
    if isinstance(value, bool) and str in kinds and bool not in kinds:
        raise ValueError(
            f"{name} takes text: give it a value, and write {str(value).lower()} in quotes where it is meant."
        )
    if isinstance(value, int | float) and not isinstance(value, bool) and str in kinds and type(value) not in kinds:
        return str(value)
    return value


def _number(word: str, fractions: bool) -> float | int | str:
    """`1_000` as 1000 and, where fractions are taken, `1e-3`, `1.10` and `.inf` as such; any other word as it is.

    `010` stays a word, because it is 8 to YAML and 10 to most people.
    """
    if re.fullmatch(r"[+-]?(0|[1-9]\d*(_\d+)*)", word):
        return int(word)
    if fractions and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+|[+-]?(\d+\.\d*|\.\d+|\.inf)", word):
        return float(word.replace(".inf", "inf"))
    return word


def _help(main: Callable, arguments: Any) -> Table:
    """All options with the values that they have, by default or by what was given beside `--help`."""
    table = Table(title=(sys.modules[main.__module__].__doc__ or "").strip(), title_justify="left", box=None)
    for column in ("option", "value", "meaning"):
        table.add_column(column, overflow="fold")
    table.add_row("--config", "", "A YAML recipe with any of the options below.")
    for name, noted in options_of(type(arguments)).items():
        value = getattr(arguments, name)
        table.add_row(f"--{name}", "" if value is None else Text(str(value)), noted.get("help", ""))
    return table
