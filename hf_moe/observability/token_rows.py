"""Which token sequences a batch holds, over the calls of a `generate` that feeds them piece by piece."""

import hashlib
from typing import Any

import numpy as np

from hf_moe.layers.watch_routing import ModelCall


class TokenRows:
    """The sequences of the batch that runs: numbers, lengths and the hashes of what they hold so far."""

    def __init__(self) -> None:
        self._first_row = 0
        self._domain: str | None = None
        self.lengths = np.zeros(0, np.int64)
        self._hashes: list[Any] = []

    def continues(self, call: ModelCall) -> bool:
        """Whether the call goes on with the sequences of the call before it.

        Raises:
            ValueError: If it goes on with others, which were not seen.
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
        """What the rows were; none is left."""
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
