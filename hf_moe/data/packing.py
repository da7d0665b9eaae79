"""Rows of equal length from documents of any length, and mixtures of domains."""

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


class PackedRows(Dataset):
    """Training rows for a causal language model: `input_ids` and `labels`, both int64 of shape (row_length,)."""

    def __init__(self, rows: Tensor):
        self.rows = rows  # (rows, row_length), int32

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row.clone()}


def pack(documents: Sequence[Sequence[int]], *, row_length: int, end_of_text: int) -> Tensor:
    """Concatenate documents, each after an `end_of_text` token, and cut into rows of int32, shape (rows, row_length).

    Documents run on from row to row and share rows (attention is not cut between them); the last, incomplete row is
    dropped.

    Raises:
        ValueError: If the documents do not fill one row.
    """
    stream = [token for document in documents for token in (end_of_text, *document)]
    count = len(stream) // row_length
    if not count:
        raise ValueError(
            f"{len(stream)} tokens do not fill one row of {row_length}. Add text, or choose shorter rows."
        )
    return torch.tensor(stream[: count * row_length], dtype=torch.int32).view(count, row_length)


def mix(rows: Mapping[str, Tensor], shares: Mapping[str, float], *, count: int, seed: int) -> Tensor:
    """Draw `count` rows with each domain's share, spread evenly: every stretch of them has about these shares.

    A domain that runs out starts again, reshuffled. Train on the rows in their order.

    Raises:
        ValueError: If the shares do not sum to 1 or name an unknown domain.
    """
    order = draw({name: len(part) for name, part in rows.items()}, shares, count=count, seed=seed)
    return torch.stack([rows[name][index] for name, index in order])


def draw(available: Mapping[str, int], shares: Mapping[str, float], *, count: int, seed: int) -> list[tuple[str, int]]:
    """`mix` as places: the domain and the index there of each of `count` rows.

    Args:
        available: Rows of each domain.

    Raises:
        ValueError: As `mix`.
    """
    if unknown := sorted(set(shares) - set(available)):
        raise ValueError(f"shares name {unknown}, which have no rows; known: {sorted(available)}.")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares must sum to 1, got {sum(shares.values())} from {dict(shares)}.")
    rng = random.Random(seed)
    placed = []
    for name, quota in _quotas(shares, count).items():
        drawn = _draw(available[name], quota, rng)
        # the i-th of n rows lies at random in the i-th of n equal parts
        placed += [((place + rng.random()) / quota, name, index) for place, index in enumerate(drawn)]
    return [(name, index) for _, name, index in sorted(placed)]


def _quotas(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """Whole rows that sum to `count`: rounded down, the rest to the largest remainders."""
    quotas = {name: int(share * count) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: shares[name] * count - quotas[name], reverse=True)
    for name in by_remainder[: count - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _draw(available: int, quota: int, rng: random.Random) -> list[int]:
    drawn: list[int] = []
    while len(drawn) < quota:
        order = list(range(available))
        rng.shuffle(order)
        drawn += order[: quota - len(drawn)]
    return drawn
