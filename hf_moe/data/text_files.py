"""The user's own text as domains: .txt and .md files, and .jsonl files with a `text` field."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf_moe.data.corpus import DOMAIN_NAME, Domain, TextError, passages, split_domain

SUFFIXES = (".txt", ".md", ".jsonl")


def read_domains(paths: Iterable[Path], *, train_bytes: int, held_out_bytes: int) -> dict[str, Domain]:
    """Read files (or all such files in folders) and split every domain into train and held-out documents.

    A .txt or .md file is one domain named after the file, cut into passages that count as documents. A line of a
    .jsonl file is one document; its domain is the field `domain`, or else the file's name.

    Raises:
        TextError: If a file is missing, empty, not UTF-8 text, of another kind, or has a bad line (its number is
            named); if a domain has too little text.
    """
    documents: dict[str, list[str]] = {}
    for path in paths:
        for file in _files(path):
            for name, text in _read_jsonl(file) if file.suffix == ".jsonl" else _read_text(file):
                documents.setdefault(name, []).append(text)
    return {
        name: split_domain(name, texts, train_bytes=train_bytes, held_out_bytes=held_out_bytes)
        for name, texts in documents.items()
    }


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not found:
            raise TextError(
                f"folder {str(path)!r} holds no {', '.join(SUFFIXES)} file. Name a folder or file that does."
            )
        return found
    if not path.exists():
        raise TextError(f"data file {str(path)!r} does not exist. Check the path.")
    if path.suffix not in SUFFIXES:
        raise TextError(
            f"data file {str(path)!r} must end in {', '.join(SUFFIXES)}, got {path.suffix!r}. Convert it to one."
        )
    return [path]


def _read(path: Path) -> str:
    data = path.read_bytes()
    if not data.strip():
        raise TextError(f"data file {str(path)!r} is empty. Give a file with text, or leave it out.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"data file {str(path)!r} is not UTF-8 text (byte {error.start} is {data[error.start]:#04x}). Convert it, "
            "for example with `iconv -f LATIN1 -t UTF-8`."
        ) from error
    if "\0" in text:
        raise TextError(f"data file {str(path)!r} holds NUL bytes: it is binary, not text. Extract its text first.")
    return text.replace("\r\n", "\n")


def read_passages(path: Path) -> list[str]:
    """A .txt or .md file, cut into passages that count as documents.

    Raises:
        TextError: If the file is empty or not UTF-8 text.
    """
    return [piece for piece in passages(_read(path)) if piece.strip()]


def _read_text(path: Path) -> list[tuple[str, str]]:
    name = _domain_of(path)
    return [(name, piece) for piece in read_passages(path)]


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            yield _record(line, f"{path}, line {number}", path)


def _record(line: str, where: str, path: Path) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where}: not valid JSON ({error}). A .jsonl file holds one JSON object a line.") from error
    if not isinstance(record, dict):
        raise TextError(f'{where}: must be a JSON object, got {type(record).__name__}. Write {{"text": ...}}.')
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        fields = ", ".join(map(repr, record)) or "none"
        raise TextError(
            f"{where}: the field 'text' must be a non-empty string; fields here: {fields}. Rename or fill it."
        )
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise TextError(f"{where}: the text holds a lone surrogate, which no UTF-8 file can. Remove that escape.")
    name = record["domain"] if "domain" in record else _domain_of(path)
    if not isinstance(name, str) or not DOMAIN_NAME.fullmatch(name):
        raise TextError(f"{where}: domain must be 1 to 32 of the characters A-Z a-z 0-9 _ -, got {name!r}. Rename it.")
    return name, text


def _domain_of(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_")[:32]
    if not name:
        raise TextError(
            f"data file {str(path)!r}: its name has no letter or digit to call a domain by. Rename the file."
        )
    return name
