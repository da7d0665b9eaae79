"""Local files as records: .jsonl, .json and .csv, gzipped or not, each record with its line; .txt and .md as passages.

Read here and not through Arrow, which would give every record the keys of all others, as nulls, and no line numbers.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_moe.data.bad_rows import BadRows, DataError, RowError
from hf_moe.data.corpus import DOMAIN_NAME, Domain, passages, split_domain

RECORDS = (".jsonl", ".json", ".csv")
GZIPPED = tuple(f"{suffix}.gz" for suffix in RECORDS)
DOCUMENTS = (".txt", ".md")
CONVERSATIONS = {"messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools"}
"""Columns that hold lists of objects: a JSON object with one of these is a record."""
DOMAIN_FILES = (*DOCUMENTS, ".jsonl")
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
    text = read_text(path)
    kind = kind_of(path)
    if kind == ".csv":
        return _csv(text, path, bad)
    if kind == ".json" and (records := _json_records(text, path)) is not None:
        return _checked(records, bad)
    return _json_lines(text, bad)


def read_passages(path: Path) -> list[str]:
    """A .txt or .md file, cut into passages that count as documents.

    Raises:
        DataError: If the file is empty, binary or not UTF-8 text.
    """
    text = read_text(path)
    if "\0" in text:
        raise DataError(
            f"the data file {str(path)!r} holds NUL bytes: it is binary, not text. Extract its text first."
        )
    return [piece for piece in passages(text.replace("\r\n", "\n")) if piece.strip()]


def read_text(path: Path) -> str:
    """A file's text, without byte order mark and unzipped.

    Raises:
        DataError: If it is empty, no UTF-8 text, or no whole gzip file.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"the data file {str(path)!r} is no whole gzip file: {error}. Write it again.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"the data file {str(path)!r} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}). "
            "Convert it, for example with `iconv -f LATIN1 -t UTF-8`."
        ) from error
    if not text.strip():
        raise DataError(f"the data file {str(path)!r} is empty. Give one with data, or leave it out.")
    return text


def _json_lines(text: str, bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _numbered(text):
        with bad.at(number):
            yield number, _record(line)


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    # no splitlines: U+2028 may stand in a string
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RowError(f"not valid JSON ({error}). A .jsonl file holds one JSON object a line.") from error
    _require_object(record)
    if _SURROGATE.search(line):
        _refuse_surrogates(record)
    return record


def _require_object(record: Any) -> None:
    if not isinstance(record, dict):
        raise RowError(f"must be a JSON object, got {type(record).__name__}.")


def _refuse_surrogates(record: dict[str, Any]) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError("the text holds a lone surrogate, which no UTF-8 file can. Remove that escape.") from error


def _json_records(text: str, path: Path) -> list[Any] | None:
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
            _require_object(record)
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


def read_domains(paths: Iterable[Path], *, train_bytes: int, held_out_bytes: int) -> dict[str, Domain]:
    """Read files (or all such files in folders) and split every domain into train and held-out documents.

    A .txt or .md file is one domain named after the file, cut into passages that count as documents. A line of a
    .jsonl file is one document; its domain is the field `domain`, or else the file's name.

    Raises:
        DataError: If a file is missing, empty, not UTF-8 text, of another kind, or has a bad line (its number is
            named); if a domain has too little text.
    """
    documents: dict[str, list[str]] = {}
    for path in paths:
        for file in _files(path):
            for name, text in _domain_records(file):
                documents.setdefault(name, []).append(text)
    return {
        name: split_domain(name, texts, train_bytes=train_bytes, held_out_bytes=held_out_bytes)
        for name, texts in documents.items()
    }


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in DOMAIN_FILES and file.is_file())
        if not found:
            raise DataError(
                f"the folder {str(path)!r} holds no {', '.join(DOMAIN_FILES)} file. Name a folder or file that does."
            )
        return found
    if not path.exists():
        raise DataError(f"the data file {str(path)!r} does not exist. Check the path.")
    if path.suffix not in DOMAIN_FILES:
        raise DataError(
            f"the data file {str(path)!r} must end in {', '.join(DOMAIN_FILES)}, got {path.suffix!r}. Convert it."
        )
    return [path]


def _domain_records(path: Path) -> Iterator[tuple[str, str]]:
    """Domain and text of every document of a file."""
    if path.suffix != ".jsonl":
        name = _domain_of(path)
        yield from ((name, piece) for piece in read_passages(path))
        return
    for number, line in _numbered(read_text(path)):
        try:
            yield _domain_and_text(_record(line), path)
        except RowError as error:
            raise DataError(f"{path}, line {number}: {error}") from error


def _domain_and_text(record: dict[str, Any], path: Path) -> tuple[str, str]:
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        fields = ", ".join(map(repr, record)) or "none"
        raise RowError(f"the field 'text' must be a non-empty string; fields here: {fields}. Rename or fill it.")
    name = record["domain"] if "domain" in record else _domain_of(path)
    if not isinstance(name, str) or not DOMAIN_NAME.fullmatch(name):
        raise RowError(f"domain must be 1 to 32 of the characters A-Z a-z 0-9 _ -, got {name!r}. Rename it.")
    return name, text


def _domain_of(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_")[:32]
    if not name:
        raise DataError(
            f"the data file {str(path)!r}: its name has no letter or digit to call a domain by. Rename the file."
        )
    return name
