"""Untrusted JSON files, read within bounds of size and depth: a small file costs neither memory nor time.

Python's reader takes any size, ends a deep file in a RecursionError, and reads NaN, which is no JSON.
"""

import json
from pathlib import Path
from typing import Any

LARGEST = 50_000_000  # bytes; in memory it takes up to twenty times as much
DEEPEST = 64


def read_json(path: Path, *, largest: int = LARGEST, allow_nan: bool = False) -> Any:
    """The value that a file holds.

    Args:
        largest: Bytes of the file that are read at most.
        allow_nan: Take NaN and Infinity, which configs of transformers may hold.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is too large or too deep, or no JSON; one sentence without the file's name.
    """
    with open(path, "rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it has more than the {largest:,} bytes that are read")
    return parse_json(data, allow_nan=allow_nan)


def parse_json(data: bytes | str, *, allow_nan: bool = False) -> Any:
    """The value in `data`, UTF-8 if bytes. Raises ValueError as `read_json`."""
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        value = json.loads(text) if allow_nan else json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    _refuse_depth(value)
    return value


def read_object(path: Path, *, largest: int = LARGEST, allow_nan: bool = False) -> dict[str, Any]:
    """`read_json` of a file that must hold an object."""
    value = read_json(path, largest=largest, allow_nan=allow_nan)
    if not isinstance(value, dict):
        raise ValueError(f"it must hold a JSON object, got {type(value).__name__}")
    return value


def _refuse_depth(value: Any) -> None:
    """Refuse depth: copies, comparisons and printing recurse."""
    level = [value]
    for _ in range(DEEPEST):
        level = [part for each in level for part in _parts(each) if isinstance(part, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _parts(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
