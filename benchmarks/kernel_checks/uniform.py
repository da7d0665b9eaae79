"""Rows, tiles and experts that uniform routing is expected to give.

An expert's rows are binomial: every token takes it with probability K / E.
"""

import functools
import math
from typing import NamedTuple


class Routing(NamedTuple):
    """T tokens, each with K different ones of E experts, all equally likely."""

    tokens: int
    slots: int
    experts: int

    @property
    def rows(self) -> int:
        return self.tokens * self.slots

    @property
    def share_hit(self) -> float:
        """The expected share of experts with a row."""
        return 1 - (1 - self.slots / self.experts) ** self.tokens

    def tiles(self, block: int) -> float:
        """Expected tiles of `block` rows, of all experts."""
        return _expected_tiles(self.tokens, self.slots / self.experts, block) * self.experts

    def rows_with_padding(self, block: int, halves: bool = False) -> float:
        """Rows that tiles of `block` rows compute; with `halves`, a last tile that is at most half full costs half."""
        step = block // 2 if halves else block
        return self.tiles(step) * step


@functools.lru_cache(maxsize=256)
def _expected_tiles(tokens: int, probability: float, block: int) -> float:
    if probability == 1:
        return math.ceil(tokens / block)
    total = 0.0
    for rows in range(1, tokens + 1):
        logarithm = math.lgamma(tokens + 1) - math.lgamma(rows + 1) - math.lgamma(tokens - rows + 1)
        logarithm += rows * math.log(probability) + (tokens - rows) * math.log1p(-probability)
        total += math.exp(logarithm) * math.ceil(rows / block)
    return total
