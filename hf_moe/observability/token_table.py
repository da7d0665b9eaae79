"""The table of tokens of a routing trace: for every token and layer the chosen experts and their weights.

Two Parquet files. `tokens.parquet` has one record a token, in the order in which the model saw them: `row`,
`position`, `token_id` (absent in an audit), `domain`, `text` (only where it was given), and for layer L (in order)
`experts_L` (K ids, uint8 or uint16; `num_experts` and above mark a slot without an expert) and `weights_L` (K,
float16). `rows.parquet` has one record a token sequence: `row`, `domain`, `length`, `sha256` (of its token ids as
int64, little-endian) and `first`, `span`: the records of `tokens.parquet` among which its tokens lie.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hf_moe.io.installation import install_command

TOKENS = "tokens.parquet"
ROWS = "rows.parquet"
_BATCH = 8192


@dataclass(frozen=True)
class LayerSpec:
    """Name and geometry of a layer, as the table needs them."""

    name: str
    num_experts: int
    top_k: int

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The smallest dtype that also holds `num_experts`, the mark of an empty slot."""
        return np.dtype(np.uint8 if self.num_experts < 2**8 else np.uint16)


@dataclass(frozen=True)
class LayerTokens:
    """N tokens in one layer, a text's tokens together and in order.

    Attributes:
        row: `[N]` int64, number of the token sequence.
        position: `[N]` int32, place in it, padding not counted.
        token_id: `[N]` int32, None in an audit.
        domain: `[N]` of text or None.
        text: `[N]` of the tokens' own text, None where none was stored.
        experts: `[N, K]` uint8 or uint16; `num_experts` marks a slot without an expert.
        weights: `[N, K]` float16.
    """

    row: np.ndarray
    position: np.ndarray
    token_id: np.ndarray | None
    domain: np.ndarray
    text: np.ndarray | None
    experts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class TokenRow:
    """One token sequence in all layers: `token_ids [S]`, and by layer `experts [S, K]`, `weights [S, K]` as above."""

    row: int
    domain: str | None
    sha256: str
    token_ids: np.ndarray | None
    text: list[str] | None
    experts: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


class TokenTable:
    """Reads the two files piece by piece, and checks every value that it hands out.

    Attributes:
        num_tokens, num_rows: Records in the files.
        is_audit: Whether the ids and the text of the tokens were left out.
        has_text: Whether the tokens' text was stored.
    """

    def __init__(
        self,
        folder: Path,
        layers: list[LayerSpec],
        *,
        num_tokens: int,
        num_rows: int,
        is_audit: bool,
        has_text: bool,
        owner: Any = None,
    ):
        """`owner`: kept alive as long as the table, such as the temporary folder."""
        self._folder = folder
        self._layers = {layer.name: (index, layer) for index, layer in enumerate(layers)}
        self._owner = owner
        self.num_tokens, self.num_rows = num_tokens, num_rows
        self.is_audit, self.has_text = is_audit, has_text

    def __len__(self) -> int:
        return self.num_tokens

    @staticmethod
    def open(folder: Path, entry: Any, layers: list[LayerSpec]) -> "TokenTable":
        """Open the table that a manifest describes by `entry`; values are checked when they are read.

        Raises:
            ValueError: If files and manifest do not fit together.
            ImportError: Without pyarrow.
        """
        names = {"num_tokens": int, "num_rows": int, "is_audit": bool, "has_text": bool}
        if not isinstance(entry, dict) or {name: type(value) for name, value in entry.items()} != names:
            raise _damaged(folder, f"the manifest must say {', '.join(names)} of the tokens")
        table = TokenTable(folder, layers, **entry)
        if table.is_audit and table.has_text:
            raise _damaged(folder, "an audit holds no text")
        for name, schema, count in (
            (TOKENS, tokens_schema(layers, is_audit=table.is_audit, has_text=table.has_text), table.num_tokens),
            (ROWS, rows_schema(), table.num_rows),
        ):
            with table._file(name) as file:
                if not file.schema_arrow.equals(schema):
                    raise _damaged(folder, f"{name} has other columns than a trace of these layers")
                if file.metadata.num_rows != count:
                    raise _damaged(folder, f"{name} has {file.metadata.num_rows} records, the manifest says {count}")
        return table

    def layer(self, name: str, limit: int | None = None) -> LayerTokens:
        """The decisions of one layer for the first `limit` tokens that were recorded (all by default).

        Raises:
            ValueError: If the trace has no such layer, or the file holds values that cannot be.
        """
        if name not in self._layers:
            raise ValueError(f"the trace has no layer {name!r}. Its layers: {', '.join(self._layers)}.")
        index, spec = self._layers[name]
        left = self.num_tokens if limit is None else min(limit, self.num_tokens)
        parts = []
        for part in self._batches([(index, spec)]):
            parts.append({column: values[:left] for column, values in part.items()})
            left -= len(parts[-1]["row"])
            if left <= 0:
                break
        whole = _join(parts) if parts else _no_tokens(index, spec, self)
        order = np.lexsort((whole["position"], whole["row"]))
        found = {column: values[order] for column, values in whole.items()}
        names = {f"experts_{index}": "experts", f"weights_{index}": "weights"}
        values = {names.get(column, column): value for column, value in found.items()}
        return LayerTokens(**{field.name: values.get(field.name) for field in fields(LayerTokens)})  # type: ignore[arg-type]

    def rows(self) -> Iterator[TokenRow]:
        """Every token sequence with the decisions of all layers, in the order of recording. Holds one batch of the
        recorded model at a time.

        Raises:
            ValueError: If a file holds values that cannot be.
        """
        records = _Cursor(self._batches(list(self._layers.values())))
        group: dict[str, np.ndarray] = {}
        begin = end = 0
        for entry in self._row_entries():
            if (entry["first"], entry["first"] + entry["span"]) != (begin, end):
                if entry["first"] != end or entry["span"] > self.num_tokens - end:
                    raise _damaged(self._folder, f"{ROWS}: row {entry['row']} does not follow the rows before it")
                begin, end = entry["first"], entry["first"] + entry["span"]
                group = records.take(entry["span"])
            yield self._row(entry, group)

    def copy_to(self, folder: Path) -> dict[str, Any]:
        """Copy the files; returns the manifest's entry about them."""
        for name in (TOKENS, ROWS):
            shutil.copyfile(self._folder / name, folder / name)
        return {name: getattr(self, name) for name in ("num_tokens", "num_rows", "is_audit", "has_text")}

    def _row(self, entry: dict[str, Any], group: dict[str, np.ndarray]) -> TokenRow:
        mine = np.flatnonzero(group["row"] == entry["row"])
        mine = mine[np.argsort(group["position"][mine], kind="stable")]
        if not np.array_equal(group["position"][mine], np.arange(entry["length"])):
            raise _damaged(self._folder, f"row {entry['row']} must have the positions 0 to {entry['length'] - 1}")
        row = {column: values[mine] for column, values in group.items()}
        return TokenRow(
            row=entry["row"],
            domain=entry["domain"],
            sha256=entry["sha256"],
            token_ids=row.get("token_id"),
            text=row["text"].tolist() if "text" in row else None,
            experts={name: row[f"experts_{index}"] for name, (index, _) in self._layers.items()},
            weights={name: row[f"weights_{index}"] for name, (index, _) in self._layers.items()},
        )

    def _row_entries(self) -> Iterator[dict[str, Any]]:
        count = 0
        with self._file(ROWS) as file:
            for batch in _guarded(file.iter_batches(_BATCH), self._folder):
                for entry in batch.to_pylist():
                    numbers = [entry[name] for name in ("row", "length", "first", "span")]
                    if None in numbers or min(numbers) < 0 or entry["row"] != count or entry["length"] > entry["span"]:
                        raise _damaged(self._folder, f"{ROWS}: record {count} is {str(entry)[:300]}")
                    count += 1
                    yield entry

    def _batches(self, layers: list[tuple[int, LayerSpec]]) -> Iterator[dict[str, np.ndarray]]:
        columns = ["row", "position", "domain"]
        columns += [] if self.is_audit else ["token_id"]
        columns += ["text"] if self.has_text else []
        slots = [f"{kind}_{index}" for index, _ in layers for kind in ("experts", "weights")]
        with self._file(TOKENS) as file:
            for batch in _guarded(file.iter_batches(_BATCH, columns=[*columns, *slots]), self._folder):
                found = {name: self._plain(batch, name) for name in columns}
                if (found["row"] < 0).any() or (found["row"] >= self.num_rows).any() or (found["position"] < 0).any():
                    raise _damaged(self._folder, f"{TOKENS}: rows must lie in [0, {self.num_rows})")
                for index, spec in layers:
                    found |= self._decisions(batch, index, spec)
                yield found

    def _plain(self, batch: Any, name: str) -> np.ndarray:
        column = batch.column(name)
        is_text = name in ("domain", "text")
        if column.null_count and name != "domain":
            raise _damaged(self._folder, f"{TOKENS}: {name} has empty values")
        return column.to_numpy(zero_copy_only=False) if not is_text else np.array(column.to_pylist(), dtype=object)

    def _decisions(self, batch: Any, index: int, spec: LayerSpec) -> dict[str, np.ndarray]:
        found = {}
        for name in (f"experts_{index}", f"weights_{index}"):
            column = batch.column(name)
            values = column.flatten()
            if column.null_count or values.null_count or len(values) != len(column) * spec.top_k:
                raise _damaged(self._folder, f"{TOKENS}: {name} must have {spec.top_k} values for every token")
            found[name] = values.to_numpy(zero_copy_only=False).reshape(len(column), spec.top_k)
        if (found[f"experts_{index}"] > spec.num_experts).any():
            raise _damaged(self._folder, f"{TOKENS}: ids of {spec.name!r} must be at most {spec.num_experts}")
        if not np.isfinite(found[f"weights_{index}"]).all():
            raise _damaged(self._folder, f"{TOKENS}: weights of {spec.name!r} are not finite")
        return found

    def _file(self, name: str) -> Any:
        path = self._folder / name
        if not path.is_file():
            raise _damaged(self._folder, f"{name} is missing")
        arrow = pyarrow()
        try:
            return arrow.parquet.ParquetFile(path)
        except (arrow.ArrowInvalid, OSError) as error:
            raise _damaged(self._folder, f"{name} is no Parquet file ({error})") from error


class _Cursor:
    """Takes any number of records from a stream of batches."""

    def __init__(self, batches: Iterator[dict[str, np.ndarray]]):
        self._batches = batches
        self._held: dict[str, np.ndarray] = {}

    def take(self, count: int) -> dict[str, np.ndarray]:
        parts, held = [self._held] if self._held else [], len(self._held.get("row", ()))
        while held < count:
            parts.append(next(self._batches))
            held += len(parts[-1]["row"])
        whole = _join(parts)
        self._held = {name: values[count:] for name, values in whole.items()}
        return {name: values[:count] for name, values in whole.items()}


def tokens_schema(layers: list[LayerSpec], *, is_audit: bool, has_text: bool) -> Any:
    arrow = pyarrow()
    columns = [("row", arrow.int64()), ("position", arrow.int32())]
    columns += [] if is_audit else [("token_id", arrow.int32())]
    columns += [("domain", arrow.string())]
    columns += [("text", arrow.string())] if has_text else []
    for index, layer in enumerate(layers):
        ids = arrow.from_numpy_dtype(layer.id_dtype)
        columns += [(f"experts_{index}", arrow.list_(ids, layer.top_k))]
        columns += [(f"weights_{index}", arrow.list_(arrow.float16(), layer.top_k))]
    return arrow.schema(columns)


def rows_schema() -> Any:
    arrow = pyarrow()
    whole = arrow.int64()
    return arrow.schema(
        [
            ("row", whole),
            ("domain", arrow.string()),
            ("length", whole),
            ("sha256", arrow.string()),
            ("first", whole),
            ("span", whole),
        ]
    )


def pyarrow() -> ModuleType:
    """pyarrow with its Parquet reader.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"token tables need pyarrow. Install it with: {install_command('recipes')}") from error
    return arrow


def _guarded(batches: Iterator[Any], folder: Path) -> Iterator[Any]:
    arrow = pyarrow()
    try:
        yield from batches
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(folder, f"its tokens cannot be read ({error})") from error


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _no_tokens(index: int, spec: LayerSpec, table: TokenTable) -> dict[str, np.ndarray]:
    none: dict[str, np.ndarray] = {
        "row": np.zeros(0, np.int64),
        "position": np.zeros(0, np.int32),
        "domain": np.zeros(0, object),
    }
    if not table.is_audit:
        none["token_id"] = np.zeros(0, np.int32)
    if table.has_text:
        none["text"] = np.zeros(0, object)
    none[f"experts_{index}"] = np.zeros((0, spec.top_k), spec.id_dtype)
    none[f"weights_{index}"] = np.zeros((0, spec.top_k), np.float16)
    return none


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"{folder} is no valid routing trace: {what}. Record or copy the trace again.")
