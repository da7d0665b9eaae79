"""Take JSON values that somebody else wrote by path and type; None where one is not what it must be."""

import math
from pathlib import Path
from typing import Any, TypeVar

from hf_moe.io.json_files import read_object

T = TypeVar("T")


class CardError(ValueError):
    """Facts that a card cannot be made from; names the file and the way out."""


def read_facts(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CardError: If it is missing, too large, or no JSON object.
    """
    try:
        return read_object(path, allow_nan=True)
    except OSError as error:
        raise CardError(f"{str(path)!r} cannot be read: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise CardError(f"{str(path)!r} is not valid JSON: {error}.") from error


def take(record: Any, path: str, kind: type[T]) -> T | None:
    """The value at `a.b.c`, or None if it is not there or of another type; whole numbers count as float."""
    for part in path.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    if kind is float and isinstance(record, int | float) and not isinstance(record, bool):
        return float(record) if math.isfinite(record) else None  # type: ignore[return-value]
    return record if isinstance(record, kind) and not (isinstance(record, bool) and kind is not bool) else None


def numbers(record: Any, path: str) -> list[float | None]:
    """The list at `path`; entries that are no numbers are None."""
    return [take({"x": value}, "x", float) for value in take(record, path, list) or []]


def tables(record: Any, path: str) -> dict[str, dict[str, Any]]:
    """The objects of the object at `path`, by name."""
    return {name: value for name, value in (take(record, path, dict) or {}).items() if isinstance(value, dict)}


def finite(text: str | None) -> float | None:
    """The number that `text` says, or None if it says none that is finite."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
