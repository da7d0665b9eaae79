"""Real text without a download: what every Python installation carries, by domain, split into train and held-out.

Domains: `code` (standard-library source), `docs` (its documentation and docstrings), `legal` (licence texts),
`readme` (descriptions of the packages that the recipes use) and `arithmetic` (generated). What is found depends on the
Python build and the versions of these packages; what else is installed changes nothing.
"""

import ast
import hashlib
import importlib.metadata
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_moe.data.bad_rows import DataError

PACKAGES = ("accelerate", "datasets", "matplotlib", "peft", "tokenizers", "torch", "transformers")
"""Their descriptions and licences are `readme` and `legal`, with those of all that they require."""
DOCUMENT_BYTES = 24_000
"""Embedded documents are cut off here, so that no single file makes a domain."""
PASSAGE_BYTES = 6_000
"""`passages` cuts running text into pieces of about this size."""
MIN_DOMAIN_BYTES = 6_000
"""Less text than this gives neither a training row worth the name nor a held-out measurement worth reading."""
DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_LICENCE_FILE = re.compile(r"licen[cs]e|copying|notice|common-licenses", re.IGNORECASE)


@dataclass(frozen=True)
class Domain:
    """Texts of one kind. A document is in `train` or in `held_out`, never cut between them."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def train_bytes(self) -> int:
        return sum(map(byte_count, self.train))

    @property
    def held_out_bytes(self) -> int:
        return sum(map(byte_count, self.held_out))

    def sha256(self) -> str:
        """Identity of the text and of its split."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(f"{len(part)}\n".encode())
            for text in part:
                digest.update(f"{byte_count(text)}\n{text}".encode())
        return digest.hexdigest()


def byte_count(text: str) -> int:
    return len(text.encode())


def split_domain(name: str, documents: Iterable[str], *, train_bytes: int, held_out_bytes: int) -> Domain:
    """Split documents into train and held-out, each at most about the given number of UTF-8 bytes.

    The order is that of the documents' SHA-256: arbitrary, but the same on every run and for every seed. Held-out
    takes at most a fifth of the text and no document larger than a third of its share (if there are smaller ones), so
    that it never hangs on one or two files. Repeated documents are kept once.

    Raises:
        DataError: If the domain has fewer than two documents or less than `MIN_DOMAIN_BYTES` of text.
    """
    ordered = sorted(set(documents), key=lambda text: hashlib.sha256(text.encode()).digest())
    total = sum(map(byte_count, ordered))
    if len(ordered) < 2 or total < MIN_DOMAIN_BYTES:
        raise DataError(
            f"domain {name!r} has {total} bytes in {len(ordered)} different documents; at least "
            f"{MIN_DOMAIN_BYTES} bytes in 2 documents are needed to train on one part and test on another. Add text, "
            "or leave the domain out."
        )
    share = min(held_out_bytes, total // 5)
    small = [text for text in ordered if byte_count(text) <= share // 3]
    held_out = _take(small or ordered[:1], share)
    chosen = set(held_out)
    train = _take([text for text in ordered if text not in chosen], train_bytes)
    return Domain(name, tuple(train), tuple(held_out))


def passages(text: str) -> list[str]:
    """Cut running text between paragraphs (between lines where one is too long) into pieces of about PASSAGE_BYTES."""
    pieces, current, size = [], [], 0
    for block in _blocks(text):
        current.append(block)
        size += byte_count(block)
        if size >= PASSAGE_BYTES:
            pieces.append("".join(current))
            current, size = [], 0
    return [*pieces, "".join(current)] if size else pieces


def embedded_corpus(*, train_bytes: int, held_out_bytes: int, without: Iterable[str] = ()) -> dict[str, Domain]:
    """The embedded domains by name, each with at most about the given numbers of UTF-8 bytes.

    Raises:
        DataError: If this Python installation carries too little text for one of them (a zipped standard library).
    """
    skip = set(without)
    return {
        name: split_domain(name, documents(), train_bytes=train_bytes, held_out_bytes=held_out_bytes)
        for name, documents in EMBEDDED.items()
        if name not in skip
    }


def _take(documents: list[str], limit: int) -> list[str]:
    """The first documents up to `limit` bytes, at least one."""
    taken: list[str] = []
    size = 0
    for text in documents:
        if taken and size + byte_count(text) > limit:
            break
        taken.append(text)
        size += byte_count(text)
    return taken


def _blocks(text: str) -> Iterator[str]:
    for block in re.split(r"(?<=\n)(?=\s*\n)", text):
        if byte_count(block) > 2 * PASSAGE_BYTES:
            for line in block.splitlines(keepends=True):
                yield from (line[i : i + PASSAGE_BYTES] for i in range(0, len(line), PASSAGE_BYTES))
        else:
            yield block


# The embedded domains: each function returns documents, in any order.


def _code() -> list[str]:
    return [_read(path) for path in _standard_library() if not _documents_only(path)]


def _docs() -> list[str]:
    """The language reference's topics, and the docstrings of those modules that `code` leaves out."""
    from pydoc_data import topics

    docstrings = ["\n\n".join(_docstrings(_read(path))) for path in _standard_library() if _documents_only(path)]
    return _without_repeats([*topics.topics.values(), *docstrings])


def _legal() -> list[str]:
    files = [path for distribution in _distributions() for path in _licence_files(distribution)]
    files += sorted(Path("/usr/share/common-licenses").glob("*"))
    files.append(Path(sysconfig.get_paths()["stdlib"], "LICENSE.txt"))
    return _without_repeats([_read(path) for path in files if path.is_file()])


def _readme() -> list[str]:
    # read_text: the description is the body of the METADATA file, after its headers
    files = [distribution.read_text("METADATA") or "" for distribution in _distributions()]
    return _without_repeats([text.partition("\n\n")[2] for text in files])


def _arithmetic() -> list[str]:
    """Sums, differences, products and short word problems with their answers; 40 lines a document."""
    rng = random.Random(0)
    return ["\n".join(_problem(rng) for _ in range(40)) + "\n" for _ in range(900)]


EMBEDDED: Mapping[str, Callable[[], list[str]]] = {
    "code": _code,
    "docs": _docs,
    "legal": _legal,
    "readme": _readme,
    "arithmetic": _arithmetic,
}


def _problem(rng: random.Random) -> str:
    a, b, c = rng.randrange(10, 1000), rng.randrange(10, 1000), rng.randrange(2, 10)
    name, thing = rng.choice(("Ada", "Ben", "Cora", "Dev")), rng.choice(("apples", "books", "coins", "stamps"))
    forms = (
        f"{a} + {b} = {a + b}",
        f"{a + b} - {a} = {b}",
        f"{a} * {c} = {a * c}",
        f"{a * c} / {c} = {a}",
        f"{name} has {a} {thing} and buys {b} more. Now {name} has {a + b} {thing}.",
        f"{name} shares {a * c} {thing} among {c} friends. Each gets {a} {thing}.",
    )
    return rng.choice(forms)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    leave_out = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "pydoc_data",
        "__pycache__",
        "encodings",
    }
    found = (path for path in root.rglob("*.py") if not leave_out & set(path.relative_to(root).parts))
    return sorted(path for path in found if 500 < path.stat().st_size < DOCUMENT_BYTES)


def _documents_only(path: Path) -> bool:
    """Three modules in five give their docstrings to `docs` and nothing to `code`, so that the two share no text."""
    return hashlib.sha256(path.name.encode()).digest()[0] % 5 < 3


def _docstrings(source: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old standard-library files
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text and len(text) > 60]


def _distributions() -> list[importlib.metadata.Distribution]:
    """`PACKAGES` and all that they require, by name: what else is installed changes neither text nor metrics."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    wanted = [(name, "") for name in PACKAGES]
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another extra of hf_moe
        for requirement in map(Requirement, found[name].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted += [(canonicalize_name(requirement.name), also) for also in ("", *requirement.extras)]
    return [found[name] for name in sorted(found)]


def _licence_files(distribution: importlib.metadata.Distribution) -> list[Path]:
    files = distribution.files or []
    return sorted(Path(os.fspath(file.locate())) for file in files if _LICENCE_FILE.search(file.name))


def _without_repeats(texts: list[str]) -> list[str]:
    """Drop every paragraph seen before (case, digits and spacing aside): licences repeat each other at length."""
    seen: set[str] = set()
    kept = []
    for text in texts:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = re.sub(r"[\W\d_]+", " ", paragraph).lower()
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        kept.append(_cut_off("\n\n".join(paragraphs) + "\n"))
    return [text for text in kept if len(text) > 200]


def _cut_off(text: str) -> str:
    pieces, size = [], 0
    for piece in _blocks(text):
        size += byte_count(piece)
        if size > DOCUMENT_BYTES:
            break
        pieces.append(piece)
    return "".join(pieces)


def _read(path: Path) -> str:
    # replace: a few old files are not UTF-8, and a stray byte does no harm to training text
    return path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
