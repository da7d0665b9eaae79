"""The data sets that people have, as records by domain.

Local files (.jsonl, .json, .parquet, .txt, .md), folders of data sets and names on the Hub; the columns of a data set
decide what it is: `text`; `prompt` with `completion`, as strings or as lists of messages; `messages`, a conversation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hf_moe.training.corpus import DOMAIN_NAME
from hf_moe.training.text_files import read_passages

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
DOCUMENTS = (".txt", ".md")


class DataError(ValueError):
    """A data set that cannot be used; says which, why, and what to do."""


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Attributes:
        path: A local .jsonl, .json, .parquet, .txt or .md file, a local folder of a data set, or a name on the Hub.
        domain: What its figures are reported under; the file's name if not given.
        weight: Its share of the training rows, relative to the other sources; 0 measures it and does not train on it.
        config: Of a data set with several configurations.
        split: Of a data set with several splits.
    """

    path: str
    domain: str = ""
    weight: float = 1.0
    config: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        if not self.domain:
            stem = "".join(c if c.isalnum() and c.isascii() else "-" for c in Path(self.path).stem).strip("-")
            object.__setattr__(self, "domain", stem[:32])
        if not DOMAIN_NAME.fullmatch(self.domain):
            raise DataError(
                f"the domain of {self.path!r} must be 1 to 32 of the characters A-Z a-z 0-9 _ -, got {self.domain!r}."
            )
        if not 0 <= self.weight < float("inf"):
            raise DataError(f"the weight of {self.path!r} must be 0 or more and finite, got {self.weight}.")

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any] | Source") -> "Source":
        """From a path, or from the fields as a mapping (a YAML entry).

        Raises:
            DataError: For an unknown field, a wrong type or a bad value.
        """
        if isinstance(value, Source):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
            raise DataError(f"a data set must be a path or a mapping with the key 'path', got {value!r}.")
        known = {field.name: field.type for field in fields(cls)}
        for key, given in value.items():
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."
                raise DataError(f"the data set {value['path']!r} has an unknown key {key!r}.{hint}")
            wanted = (int, float) if key == "weight" else (str, type(None)) if key == "config" else (str,)
            if isinstance(given, bool) or not isinstance(given, wanted):
                raise DataError(f"{key!r} of the data set {value['path']!r} must be {known[key]}, got {given!r}.")
        return cls(**value)


def read_source(source: Source) -> list[dict[str, Any]]:
    """The records of a source, in order.

    Raises:
        DataError: If it is missing, empty, unreadable, or its columns are none of the known formats.
    """
    records = read_records(source)
    format_of(records[0], source.path)
    return records


def read_records(source: Source) -> list[dict[str, Any]]:
    """The records of a source, in order, whatever their columns.

    Raises:
        DataError: If it is missing, empty or unreadable.
    """
    path = Path(source.path)
    if path.suffix in DOCUMENTS and path.exists():
        records = [{"text": text} for text in read_passages(path)]
    else:
        records = _load(source, path)
    if not records:
        raise DataError(f"the data set {source.path!r} has no records. Give one with data, or leave it out.")
    return records


def _load(source: Source, path: Path) -> list[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.exists() and (path.suffix in (*BUILDERS, *DOCUMENTS) or source.path.startswith((".", "/", "~"))):
        raise DataError(f"the data file {source.path!r} does not exist. Check the path.")
    if path.is_file() and path.suffix not in BUILDERS:
        raise DataError(
            f"the data file {source.path!r} must end in {', '.join((*BUILDERS, *DOCUMENTS))}, got {path.suffix!r}."
        )
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"the data file {source.path!r} is empty. Give one with data, or leave it out.")
    try:
        if path.is_file():
            return load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train").to_list()
        return load_dataset(source.path, source.config, split=source.split).to_list()
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"the data file {source.path!r} cannot be read: {cause}. Mend it, or leave it out.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"the data set {source.path!r} cannot be loaded: {error}") from error


def format_of(record: Mapping[str, Any], where: str) -> str:
    """`messages`, `prompt` (with completion) or `text`.

    Raises:
        DataError: Naming the columns that are there.
    """
    if "messages" in record:
        return "messages"
    if "prompt" in record and "completion" in record:
        return "prompt"
    if "text" in record:
        return "text"
    raise DataError(
        f"the data set {where!r} has the columns {', '.join(map(repr, record))}; it needs 'text', 'messages', or "
        "'prompt' and 'completion'. Rename its columns."
    )


def hold_out(records: Sequence[dict[str, Any]], *, share: float, most: int, where: str) -> tuple[list, list]:
    """Split records into train and held out: every n-th record, at most `most` and at least one.

    Raises:
        DataError: If there are fewer than two records.
    """
    if len(records) < 2:
        raise DataError(f"the data set {where!r} has {len(records)} record; to train and to test it needs two.")
    count = min(most, max(1, round(share * len(records))))
    step = len(records) / count
    chosen = {int(i * step) for i in range(count)}
    train = [record for i, record in enumerate(records) if i not in chosen]
    return train, [records[i] for i in sorted(chosen)]
