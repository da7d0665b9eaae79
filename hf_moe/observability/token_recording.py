"""Write the decision for every token to disk while the model runs; memory holds one row group and one forward."""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.watch_routing import ModelCall, Routing
from hf_moe.observability.token_table import ROWS, TOKENS, LayerSpec, TokenTable, pyarrow, rows_schema, tokens_schema

_ROW_GROUP = 8192


@dataclass
class _Forward:
    """The decisions of one forward of the model so far: by layer ids and weights, `[T, K]`."""

    call: ModelCall
    domain: str | None
    texts: Sequence[Sequence[str]] | None
    decisions: dict[str, tuple[Tensor, Tensor]]


class TokenRecording:
    """Collects the decisions of a forward's layers; when the next one begins, they go to the file."""

    def __init__(self, layers: list[MoeLayer], *, audit: bool, scratch: str | Path | None):
        """As in `record_routing`.

        Raises:
            ImportError: Without pyarrow.
        """
        pyarrow()
        self._specs = {layer.name: LayerSpec(layer.plain_name, layer.num_experts, layer.top_k) for layer in layers}
        self._audit = audit
        self._folder = tempfile.TemporaryDirectory(prefix="routing-trace-", dir=scratch)
        self._forward: _Forward | None = None
        self._rows = TokenRows()
        self._files: _Files | None = None

    def add(self, routing: Routing, domain: str | None, texts: Sequence[Sequence[str]] | None) -> None:
        """Keep one layer's decision; the caller leaves out the recomputations of gradient checkpointing.

        Args:
            domain: That of the forward, as the first of its layers has it.
            texts: The text of each token, likewise: a list for each row, padding left out.

        Raises:
            ValueError: If the decision cannot be given to single tokens of the call.
        """
        call, name = routing.call, routing.layer.name
        if call is None or call.input_ids is None:
            raise ValueError(
                "detail='tokens' needs to know the tokens: the model was called without input_ids. Call it with "
                "them, or record with detail='counts'."
            )
        if len(routing.index) != call.input_ids.numel():
            raise ValueError(
                f"layer {name!r} routes {len(routing.index)} rows in a call with {call.input_ids.numel()} tokens: it "
                "does not see the tokens one by one. Record this model with detail='counts'."
            )
        if self._forward is None or self._forward.call is not call:
            self.end_forward()
            self._forward = _Forward(call, domain, texts, {})
        if name in self._forward.decisions:
            raise ValueError(f"layer {name!r} ran twice in one call of the model. Record it with detail='counts'.")
        spec = self._specs[name]
        # integers of the table's size; torch has few operations on uint16
        ids = routing.index.detach().clamp(max=spec.num_experts)
        ids = ids.to(torch.uint8 if spec.id_dtype.itemsize == 1 else torch.int32)
        self._forward.decisions[name] = (ids, routing.weights.detach().to(torch.float16))

    def end_forward(self) -> None:
        """Write the tokens of the forward that has ended."""
        forward, self._forward = self._forward, None
        if forward is None:
            return
        missing = self._specs.keys() - forward.decisions.keys()
        if missing:
            raise ValueError(
                f"the layers {', '.join(sorted(missing))} did not run in a call of the model, so its tokens have no "
                "decision there. Record this model with detail='counts'."
            )
        self._write(forward)

    def close(self) -> TokenTable:
        """End the files; they can be read from now on, also after an error in the model."""
        has_text = self._files is not None and self._files.has_text
        files = self._opened(has_text)
        files.end_rows(self._rows)
        files.close()
        return TokenTable(
            Path(self._folder.name),
            list(self._specs.values()),
            num_tokens=files.num_tokens,
            num_rows=files.num_rows,
            is_audit=self._audit,
            has_text=has_text,
            owner=self._folder,
        )

    def _write(self, forward: _Forward) -> None:
        ids_BS = forward.call.input_ids
        assert ids_BS is not None
        mask = forward.call.token_mask(ids_BS.numel())
        mask_BS = np.ones(tuple(ids_BS.shape), bool) if mask is None else mask.view(ids_BS.shape).cpu().numpy()
        token_ids_BS = ids_BS.cpu().numpy()
        has_text = forward.texts is not None and not self._audit
        files = self._opened(has_text)
        if not self._rows.continues(forward.call):
            files.end_rows(self._rows)
            self._rows.begin(len(mask_BS), forward.domain, first_row=files.num_rows)
        row, position = self._rows.extend(token_ids_BS, mask_BS, forward.call)
        columns: dict[str, Any] = {"row": row, "position": position}
        if not self._audit:
            columns["token_id"] = token_ids_BS[mask_BS].astype(np.int32)
        columns["domain"] = [forward.domain] * len(row)
        if files.has_text:
            columns["text"] = _texts(forward.texts, mask_BS)
        kept = np.flatnonzero(mask_BS.reshape(-1))
        for index, (name, spec) in enumerate(self._specs.items()):
            ids, weights = forward.decisions[name]
            columns[f"experts_{index}"] = ids.cpu().numpy()[kept].astype(spec.id_dtype)
            columns[f"weights_{index}"] = weights.cpu().numpy()[kept]
        files.add(columns)

    def _opened(self, has_text: bool) -> "_Files":
        if self._files is None:
            specs = list(self._specs.values())
            self._files = _Files(Path(self._folder.name), specs, is_audit=self._audit, has_text=has_text)
        return self._files


def _texts(texts: Sequence[Sequence[str]] | None, mask_BS: np.ndarray) -> list[str]:
    lengths = mask_BS.sum(1).tolist()
    if texts is None or [len(row) for row in texts] != lengths:
        given = "none" if texts is None else [len(row) for row in texts]
        raise ValueError(
            f"token_texts must hold a text for every token: rows of {lengths} tokens, got {given}. Give them for all "
            "forwards of a recording or for none."
        )
    # lone surrogates cannot be written
    return [text.encode("utf-8", "replace").decode() for row in texts for text in row]


class TokenRows:
    """The token sequences of the batch that runs, over the calls of a `generate` that feeds them piece by piece.

    Their numbers, their lengths and the hashes of their tokens so far.
    """

    def __init__(self) -> None:
        self._first_row = 0
        self._domain: str | None = None
        self.lengths = np.zeros(0, np.int64)
        self._hashes: list[Any] = []

    def continues(self, call: ModelCall) -> bool:
        """Whether the call continues the sequences of the call before it.

        Raises:
            ValueError: If it continues others, which were not seen.
        """
        if call.cached == 0:
            return False
        if call.shape is None or call.shape[0] != len(self.lengths):
            raise ValueError(
                f"the model is called with a cache of {call.cached} positions that were not seen, at least not with "
                "this batch size. Begin before the first tokens of a sequence."
            )
        return True

    def begin(self, count: int, domain: str | None, first_row: int) -> None:
        self._first_row, self._domain = first_row, domain
        self.lengths = np.zeros(count, np.int64)
        self._hashes = [hashlib.sha256() for _ in range(count)]

    def extend(self, ids_BS: np.ndarray, mask_BS: np.ndarray, call: ModelCall) -> tuple[np.ndarray, np.ndarray]:
        """Add the tokens of a call; their rows `[N]` and positions `[N]`, without padding.

        Raises:
            ValueError: If the cache does not hold what was added before: it was cut back or reordered.
        """
        if call.cached:
            held = np.full(len(self.lengths), call.cached)
            if call.mask is not None:
                held = call.mask[:, : call.cached].sum(1).cpu().numpy()
            if not np.array_equal(held, self.lengths):
                raise ValueError(
                    f"the cache holds {held.tolist()} tokens of the rows, {self.lengths.tolist()} were seen: it was "
                    "cut back, as assisted generation does. Single tokens cannot be followed then."
                )
        row_N, column_N = np.nonzero(mask_BS)
        order_BS = mask_BS.cumsum(1) - 1 + self.lengths[:, None]
        for hash_, ids, mask in zip(self._hashes, ids_BS, mask_BS, strict=True):
            hash_.update(np.ascontiguousarray(ids[mask], dtype="<i8").tobytes())
        self.lengths = self.lengths + mask_BS.sum(1)
        return self._first_row + row_N, order_BS[row_N, column_N].astype(np.int32)

    def end(self) -> list[dict[str, Any]]:
        """Drop the rows; returns their records for `rows.parquet`, without the tokens' places."""
        ended = [
            {
                "row": self._first_row + number,
                "domain": self._domain,
                "length": int(self.lengths[number]),
                "sha256": hash_.hexdigest(),
            }
            for number, hash_ in enumerate(self._hashes)
        ]
        self.begin(0, None, 0)
        return ended


class _Files:
    """The two Parquet files, row group by row group."""

    def __init__(self, folder: Path, specs: list[LayerSpec], *, is_audit: bool, has_text: bool):
        self._arrow = pyarrow()
        self.has_text = has_text
        self.num_tokens = self.num_rows = 0
        self._schema = tokens_schema(specs, is_audit=is_audit, has_text=has_text)
        writer = self._arrow.parquet.ParquetWriter
        self._tokens = writer(folder / TOKENS, self._schema)
        self._rows = writer(folder / ROWS, rows_schema())
        self._buffer: list[Any] = []
        self._buffered = 0
        self._first = 0

    def add(self, columns: dict[str, Any]) -> None:
        arrays = [self._array(columns[field.name], field.type) for field in self._schema]
        self._buffer.append(self._arrow.Table.from_arrays(arrays, schema=self._schema))
        self._buffered += len(columns["row"])
        self.num_tokens += len(columns["row"])
        if self._buffered >= _ROW_GROUP:
            self._flush()

    def end_rows(self, rows: TokenRows) -> None:
        """The rows of a batch get no more tokens."""
        ended = rows.end()
        for entry in ended:
            entry |= {"first": self._first, "span": self.num_tokens - self._first}
        self._first = self.num_tokens
        self.num_rows += len(ended)
        if ended:
            self._rows.write_table(self._arrow.Table.from_pylist(ended, schema=rows_schema()))

    def close(self) -> None:
        self._flush()
        self._tokens.close()
        self._rows.close()

    def _flush(self) -> None:
        if self._buffered:
            self._tokens.write_table(self._arrow.concat_tables(self._buffer).combine_chunks())
        self._buffer, self._buffered = [], 0

    def _array(self, values: Any, kind: Any) -> Any:
        if isinstance(values, np.ndarray) and values.ndim == 2:
            flat = self._arrow.array(values.reshape(-1), type=kind.value_type)
            return self._arrow.FixedSizeListArray.from_arrays(flat, type=kind)
        return self._arrow.array(values, type=kind)
