"""What kind of value a setting of a checkpoint must be, so that a wrong one is named where it is read."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from .errors import ConversionError


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_list_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(is_item, value))


_is_whole_list = _is_list_of(_is_whole)

# In words, as it stands in the message -> whether a value is of this kind.
TYPES: dict[str, Callable[[Any], bool]] = {
    "a whole number": _is_whole,
    "a number": _is_number,
    "a number or null": lambda value: value is None or _is_number(value),
    "true or false": lambda value: isinstance(value, bool),
    "text": lambda value: isinstance(value, str),
    "a whole number or two of them": lambda value: _is_whole(value) or (_is_whole_list(value) and len(value) == 2),
    "a whole number or a list of them": lambda value: _is_whole(value) or _is_whole_list(value),
    "three whole numbers": lambda value: _is_whole_list(value) and len(value) == 3,
    "a list of whole numbers": _is_whole_list,
    "a list of numbers": _is_list_of(_is_number),
    "a list": lambda value: isinstance(value, list),
    "a list or a mapping": lambda value: isinstance(value, list | dict),
    "a mapping": lambda value: isinstance(value, dict),
}


def check_type(where: str, name: str, value: Any, kind: str) -> None:
    """Refuse a value of another type than expected.

    Args:
        where: The subject of the sentence.
        name: Of the setting.
        value: What was given.
        kind: A key of `TYPES`.

    Raises:
        ConversionError: `value` is not `kind`.
    """
    if not TYPES[kind](value):
        raise ConversionError(f"{where} {name}={value!r}, which is not {kind}.")


__all__ = ["check_type"]
