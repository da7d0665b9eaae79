"""Values of a recipe's options: of the right type, or the rule in words."""

import math
from argparse import Action, ArgumentTypeError
from collections.abc import Callable, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_WORDS = {
    bool: "true or false",
    dict: "a mapping",
    float: "a finite number",
    int: "a whole number",
    list: "a list",
    str: "text",
    NoneType: "null",
}
_LARGEST = 2**63


def rule(hint: Any) -> str:
    """What a value of this type must be: "a whole number or null"."""
    if choices := _choices(hint):
        return "one of " + ", ".join(map(str, choices))
    return " or ".join(_WORDS.get(kind, getattr(kind, "__name__", str(kind))) for kind in _kinds(hint))


def fits(value: Any, hint: Any) -> bool:
    """Whether what YAML made of a value may be given to argparse, which reads text alone."""
    wanted = set(_kinds(hint))
    if value is None or isinstance(value, bool | list | dict):
        return type(value) in wanted
    if isinstance(value, float):
        return math.isfinite(value) and bool(wanted & {float, str})
    if isinstance(value, int):
        return bool(wanted & {int, float, str}) and abs(value) < _LARGEST
    return wanted - {NoneType} != {list}  # text is read by argparse, which makes no list of it


def make_strict(action: Action, hint: Any) -> None:
    """Let argparse read no value that YAML would be refused for, and say the rule."""
    if action.nargs == 0:
        return
    read: Callable[[str], Any] = action.type  # type: ignore[assignment]
    choices, action.choices = action.choices, None

    def strict(text: str) -> Any:
        try:
            value = read(text)
        except (ArgumentTypeError, TypeError, ValueError):
            value = math.nan
        out_of_range = isinstance(value, float) and not math.isfinite(value)
        too_large = type(value) is int and abs(value) >= _LARGEST
        if out_of_range or too_large or (choices is not None and value not in choices):
            raise ArgumentTypeError(f"must be {rule(hint)}, got {text!r:.80}.")
        return value

    action.type = strict


def _choices(hint: Any) -> list[Any]:
    for part in _parts(hint):
        if get_origin(part) is Literal:
            return list(get_args(part))
        if isinstance(part, type) and issubclass(part, Enum):
            return [each.value for each in part]
    return []


def _kinds(hint: Any) -> list[Any]:
    return [get_origin(part) or part for part in _parts(hint)]


def _parts(hint: Any) -> Sequence[Any]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
