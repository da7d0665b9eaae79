"""Data sets by name: local files, folders of data sets and names on the Hub, as rows by domain.

What the columns of a data set mean is in `formats`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from hf_moe.data.bad_rows import BadRows, DataError
from hf_moe.data.corpus import DOMAIN_NAME
from hf_moe.data.formats import FINE_TUNING, DataSet, Layout, read_rows, without_nulls
from hf_moe.data.text_files import DOCUMENTS, GZIPPED, RECORDS, kind_of, read_file, read_passages

FILES = (*RECORDS, *GZIPPED, ".parquet", *DOCUMENTS)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Attributes:
        path: A local file (see `FILES`), a local folder of a data set, or a name on the Hub.
        domain: What its metrics are reported under; the file's name if not given.
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
            stem = "".join(
                c if c.isalnum() and c.isascii() else "-" for c in Path(self.path.removesuffix(".gz")).stem
            ).strip("-")
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


def read_source(source: Source, layouts: Sequence[Layout] = FINE_TUNING, *, on_bad_row: str = "error") -> DataSet:
    """The rows of a source, in order.

    Args:
        layouts: The layouts of columns that are known.
        on_bad_row: Whether rows that cannot be used are an `error`, or left out (`skip`).

    Raises:
        DataError: If it is missing, empty, unreadable, or its columns are none of the known layouts.
    """
    records, bad = read_records(source, on_bad_row=on_bad_row)
    return read_rows(records, layouts, bad)


def read_records(source: Source, *, on_bad_row: str = "error") -> tuple[list[tuple[int, dict[str, Any]]], BadRows]:
    """The numbered records of a source, in order, whatever their columns, and what could not be read.

    Raises:
        DataError: If it is missing, empty or unreadable.
    """
    path = Path(source.path)
    is_lines = path.is_file() and kind_of(path) in (".jsonl", ".csv")
    bad = BadRows(source.path, on_bad_row, "line" if is_lines else "row")
    _check_path(path, source.path)
    if path.is_file() and path.suffix in DOCUMENTS:
        return list(enumerate(({"text": text} for text in read_passages(path)), start=1)), bad
    if path.is_file() and kind_of(path) in RECORDS:
        return list(read_file(path, bad)), bad
    records = [{name: without_nulls(value) for name, value in record.items()} for record in _load(source, path)]
    return list(enumerate(records, start=1)), bad


def _check_path(path: Path, name: str) -> None:
    if not path.exists() and (path.name.endswith(FILES) or name.startswith((".", "/", "~"))):
        raise DataError(f"the data file {name!r} does not exist. Check the path.")
    if path.is_file() and not path.name.endswith(FILES):
        raise DataError(f"the data file {name!r} must end in {', '.join(FILES)}, got {path.suffix!r}. Convert it.")
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"the data file {name!r} is empty. Give one with data, or leave it out.")


def _load(source: Source, path: Path) -> list[dict[str, Any]]:
    """Records of a .parquet file, a folder or the Hub, through Arrow."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        if path.is_file():
            return load_dataset("parquet", data_files=str(path), split="train").to_list()
        return load_dataset(source.path, source.config, split=source.split).to_list()
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"the data file {source.path!r} cannot be read: {cause}. Mend it, or leave it out.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"the data set {source.path!r} cannot be loaded: {error}") from error


def hold_out(records: Sequence[Item], *, share: float, most: int, where: str) -> tuple[list[Item], list[Item]]:
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
