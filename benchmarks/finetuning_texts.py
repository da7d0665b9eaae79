"""The texts of `finetuning.py` as data sets of the recipes: new domains from public files, old ones from this Python.

What the folder of public texts holds (books are files of Project Gutenberg, those in `books_xx` in ISO-8859-1):

    stories   books_en/     Pride and Prejudice, Sherlock Holmes, Frankenstein, Moby Dick, Alice
    spanish   books_xx/     Don Quijote
    french    books_xx/     Les trois mousquetaires, Candide
    german    books_xx/     Die Verwandlung, which is short: a run sees it several times
    law       law/          the Federalist Papers, and the 47 licence texts of choosealicense.com
    python    mbpp/         MBPP, short tasks with their programs
    maths     gsm8k/        GSM8K's training problems with their solutions
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf_moe.data.corpus import Domain, byte_count, embedded_corpus

NEW = ("stories", "spanish", "french", "german", "law", "python", "maths")
OLD = ("code", "docs", "readme", "arithmetic")
FILES = {
    "stories": "books_en/*.txt",
    "spanish": "books_xx/es_*.latin1.txt",
    "french": "books_xx/fr_*.latin1.txt",
    "german": "books_xx/de_*.latin1.txt",
    "law": "law/**/*.txt",
}
PIECE_BYTES = 1_200
HELD_OUT_PIECES = 24
NEW_BYTES, OLD_BYTES = 700_000, 200_000  # at most, to train on


def documents(folder: Path, name: str) -> list[str]:
    """The texts of a new domain.

    Raises:
        FileNotFoundError: If a file is not there.
    """
    if name == "python":
        tasks = _lines(folder / "mbpp" / "mbpp.jsonl")
        return ["\n\n".join(f"# {task['text']}\n{task['code']}".replace("\r\n", "\n") for task in tasks)]
    if name == "maths":
        tasks = _lines(folder / "gsm8k" / "train.jsonl")
        return ["\n\n".join(f"{task['question']}\n{task['answer']}" for task in tasks)]
    files = sorted(folder.glob(FILES[name]))
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} holds no text of the domain {name!r}; see finetuning_texts.py.")
    return [_book(path.read_text(encoding="latin-1" if "latin1" in path.name else "utf-8")) for path in files]


def _lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _book(text: str) -> str:
    """A Project Gutenberg file without its licence, or any other text as it is."""
    if "*** START" not in text:
        return text
    begin = text.index("\n", text.index("*** START")) + 1
    lines = text[begin : text.index("*** END")].splitlines()
    return "\n".join(line for line in lines if "Project Gutenberg" not in line).strip()


def pieces(texts: Iterable[str]) -> list[str]:
    """Texts cut between paragraphs into pieces of at least `PIECE_BYTES` (the last of each text may be shorter)."""
    result = []
    for text in texts:
        current = ""
        for paragraph in text.split("\n\n"):
            current += paragraph + "\n\n"
            if byte_count(current) >= PIECE_BYTES:
                result.append(current)
                current = ""
        if current.strip():
            result.append(current)
    return result


def evenly(items: list[str], count: int) -> list[int]:
    """Places of `count` items, evenly spread; all if there are fewer. The recipes hold out records the same way."""
    count = min(count, len(items))
    return [int(i * len(items) / count) for i in range(count)]


def split_new(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """Pieces to train on and held out, of the whole domain."""
    found = pieces(documents(folder, name))
    chosen = set(evenly(found, HELD_OUT_PIECES))
    train = [piece for i, piece in enumerate(found) if i not in chosen]
    return _at_most(train, NEW_BYTES), [found[i] for i in sorted(chosen)]


def split_old(domain: Domain) -> tuple[list[str], list[str]]:
    """Pieces to replay and held out; the base has trained on none of the latter."""
    held_out = pieces(domain.held_out)
    return _at_most(pieces(domain.train), OLD_BYTES), [held_out[i] for i in evenly(held_out, HELD_OUT_PIECES)]


def _at_most(train: list[str], limit: int) -> list[str]:
    share = limit / sum(map(byte_count, train))
    return [train[i] for i in evenly(train, int(share * len(train)))] if share < 1 else train


def old_domains() -> dict[str, tuple[list[str], list[str]]]:
    """Split as the quickstart splits them, whose base this is for."""
    corpus = embedded_corpus(train_bytes=1_200_000, held_out_bytes=50_000, without=("legal",))
    return {name: split_old(corpus[name]) for name in OLD}


def write_data_set(path: Path, train: list[str], held_out: list[str]) -> None:
    """As records, with those held out where a recipe takes its held-out records (`held_out: 0.5`).

    Raises:
        ValueError: If there is less to train on than held out.
    """
    if len(train) < len(held_out):
        raise ValueError(f"{path.stem}: {len(train)} pieces to train on, {len(held_out)} held out; give more text.")
    places = set(evenly([*train, *held_out], len(held_out)))
    rest, kept = iter(train), iter(held_out)
    records = [next(kept) if i in places else next(rest) for i in range(len(train) + len(held_out))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in records), encoding="utf-8")
