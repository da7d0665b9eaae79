"""Find the recorded token sequence that a model is reading."""

from collections.abc import Iterable

import numpy as np

from hf_moe.observability.token_table import TokenRow

_LENGTHS_KEPT = 8


class RecordedRows:
    """Recorded rows in memory, found by what they begin with. The first of several alike counts."""

    def __init__(self, rows: Iterable[TokenRow]):
        """
        Raises:
            ValueError: If there is no row, or the rows come from an audit and hold no token ids.
        """
        self.rows = list(rows)
        if not self.rows:
            raise ValueError("there is no recorded row to replay. Record with detail='tokens'.")
        self._ids: list[np.ndarray] = []
        for row in self.rows:
            if row.token_ids is None:
                raise ValueError("an audit holds no token ids to replay by. Record without audit=True.")
            self._ids.append(row.token_ids.astype(np.int64))
        self._tables: dict[tuple[int, bool], dict[bytes, int]] = {}
        self._lengths = sorted({len(ids) for ids in self._ids}, reverse=True)

    def find(self, tokens: np.ndarray) -> tuple[TokenRow, int] | None:
        """The row that begins with `tokens`, else the longest row with which `tokens` begin; and how many tokens of
        both agree. None if there is neither.

        Args:
            tokens: `[S]` int64.
        """
        found = self._table(len(tokens), exact=False).get(tokens.tobytes())
        if found is not None:
            return self.rows[found], len(tokens)
        for length in (each for each in self._lengths if 0 < each < len(tokens)):
            found = self._table(length, exact=True).get(tokens[:length].tobytes())
            if found is not None:
                return self.rows[found], length
        return None

    def closest(self, tokens: np.ndarray) -> str:
        """Where `tokens` part from the recorded row that agrees longest."""
        agreed = [_agreed(ids, tokens) for ids in self._ids]
        best = int(np.argmax(agreed))
        place, ids = agreed[best], self._ids[best]
        recorded = f"token {ids[place]}" if place < len(ids) else "no further token"
        got = f"token {tokens[place]}" if place < len(tokens) else "no further token"
        return f"recorded row {self.rows[best].row} is closest: at position {place} it has {recorded}, the model {got}"

    def _table(self, length: int, *, exact: bool) -> dict[bytes, int]:
        """Rows by their first `length` tokens, those of exactly this length or of at least it."""
        if (length, exact) not in self._tables:
            while len(self._tables) >= _LENGTHS_KEPT:
                self._tables.pop(next(iter(self._tables)))
            table: dict[bytes, int] = {}
            for index, ids in enumerate(self._ids):
                if len(ids) == length or (not exact and len(ids) > length):
                    table.setdefault(ids[:length].tobytes(), index)
            self._tables[length, exact] = table
        return self._tables[length, exact]


def _agreed(one: np.ndarray, other: np.ndarray) -> int:
    shared = min(len(one), len(other))
    differs = np.flatnonzero(one[:shared] != other[:shared])
    return int(differs[0]) if len(differs) else shared
