"""Records of a local .jsonl, .json or .csv file, gzipped or not, each with its line.

Read here and not through Arrow, which would give every record the keys of all others, as nulls, and no line numbers.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_moe.data.bad_rows import BadRows, DataError, RowError

SUFFIXES = (".jsonl", ".json", ".csv")
GZIPPED = tuple(f"{suffix}.gz" for suffix in SUFFIXES)
CONVERSATIONS = {"messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools"}
"""Columns that hold lists of objects: a JSON object with one of these is a record."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_FIELD = 2**31 - 1  # Python's is 128 KiB, less than a long text


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read: of `a.jsonl.gz` it is `.jsonl`; empty if there is none."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def read_file(path: Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records with their numbers: the line of a .jsonl or .csv file, the place in the list of a .json file.

    Raises:
        DataError: If it is empty, not UTF-8 text, damaged, or holds something else than records.
    """
    text = _text(path)
    kind = kind_of(path)
    if kind == ".csv":
        return _csv(text, path, bad)
    if kind == ".json" and (records := _whole(text, path)) is not None:
        return _checked(records, bad)
    return _lines(text, bad)


def _text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"the data file {str(path)!r} is no whole gzip file: {error}. Write it again.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"the data file {str(path)!r} cannot be read: it is not UTF-8 text (byte {error.start}). Convert it, for "
            "example with `iconv -f LATIN1 -t UTF-8`."
        ) from error
    if not text.strip():
        raise DataError(f"the data file {str(path)!r} is empty. Give one with data, or leave it out.")
    return text


def _lines(text: str, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    # no splitlines: U+2028 may stand in a string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with bad.at(number):
                yield number, _record(line)


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError(f"not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise RowError(f"a record must be a JSON object, got {type(record).__name__}.")
    if _SURROGATE.search(line):
        _refuse_surrogates(record)
    return record


def _refuse_surrogates(record: dict[str, Any]) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError("the text holds a lone surrogate, which no UTF-8 file can. Remove that escape.") from error


def _whole(text: str, path: Path) -> list[Any] | None:
    """The records of a JSON file; None if it holds one record a line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            return None
        raise DataError(f"the data file {str(path)!r} cannot be read: not valid JSON ({error}).") from error
    if isinstance(value, dict):
        lists = [key for key, part in value.items() if isinstance(part, list) and part and isinstance(part[0], dict)]
        if not lists or CONVERSATIONS & set(value):
            return [value]
        if len(value) == 1:
            return value[lists[0]]
        raise DataError(
            f"the data file {str(path)!r} is a JSON object with the keys {', '.join(map(repr, value))}, not a list of "
            f"records. Write the list {lists[0]!r} alone: json.dump(data[{lists[0]!r}], file)."
        )
    if not isinstance(value, list):
        raise DataError(
            f"the data file {str(path)!r} must hold a list of records, got {type(value).__name__}. Write one."
        )
    return value


def _checked(records: list[Any], bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, record in enumerate(records, start=1):
        with bad.at(number):
            if not isinstance(record, dict):
                raise RowError(f"a record must be a JSON object, got {type(record).__name__}.")
            _refuse_surrogates(record)
            yield number, record


def _csv(text: str, path: Path, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    (_, columns), *rows = _csv_lines(text, path)
    for line, cells in rows:
        with bad.at(line):
            if cells and len(cells) != len(columns):
                raise RowError(f"it has {len(cells)} fields, the header {len(columns)}. Quote fields with commas.")
            if cells:
                yield line, dict(zip(columns, cells, strict=True))


def _csv_lines(text: str, path: Path) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    # the limit is one of the whole program, in which others rely on theirs
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        return [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise DataError(f"the data file {str(path)!r} cannot be read: line {reader.line_num}: {error}.") from error
    finally:
        csv.field_size_limit(before)
