"""Training rows of equal length, of documents run together or of whole examples, and mixtures of domains."""

import random
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_moe.data.encoding import IGNORED, Example


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


class Rows(Dataset):
    """A causal language model's inputs, each `[row_length]` int64: `input_ids`, `labels`; `position_ids` of packed
    rows, `attention_mask` of padded ones."""

    def __init__(self, columns: Mapping[str, Tensor]):
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index].long() for name, column in self.columns.items()}

    @property
    def loss_tokens(self) -> int:
        return int((self.columns["labels"] != IGNORED).sum())


def pack_examples(examples: Sequence[Example], *, row_length: int, padding: int) -> Rows:
    """Whole examples packed into rows by best fit; `position_ids` begin at 0 with each, and what is left is padded.

    Without an attention mask transformers' attention keeps such examples apart by their position ids; recurrent layers
    (Mamba, linear attention) do not, see `packing_check.check_packing`.

    Raises:
        ValueError: If an example is longer than a row.
    """
    members: list[list[Example]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for example in sorted(examples, key=lambda example: len(example.input_ids), reverse=True):
        length = len(example.input_ids)
        if length > row_length:
            raise ValueError(f"an example of {length} tokens does not fit a row of {row_length}. Cut it first.")
        place = bisect_left(free, (length, -1))
        left, row = free.pop(place) if place < len(free) else (row_length, len(members))
        if row == len(members):
            members.append([])
        members[row].append(example)
        insort(free, (left - length, row))
    columns = {name: torch.empty(len(members), row_length, dtype=torch.int32) for name in PACKED}
    for row, parts in enumerate(members):
        _fill(columns, row, parts, padding)
    return Rows(columns)


PACKED = ("input_ids", "labels", "position_ids")


def _fill(columns: Mapping[str, Tensor], row: int, parts: Sequence[Example], padding: int) -> None:
    at = 0
    for part in parts:
        end = at + len(part.input_ids)
        columns["input_ids"][row, at:end] = torch.tensor(part.input_ids)
        columns["labels"][row, at:end] = torch.tensor(part.labels)
        columns["position_ids"][row, at:end] = torch.arange(end - at)
        at = end
    columns["input_ids"][row, at:] = padding
    columns["labels"][row, at:] = IGNORED
    columns["position_ids"][row, at:] = torch.arange(columns["input_ids"].shape[1] - at)


def pad_examples(examples: Sequence[Example], *, row_length: int, padding: int) -> Rows:
    """One example a row, padded on the right, with its `attention_mask`."""
    columns = {
        "input_ids": torch.full((len(examples), row_length), padding, dtype=torch.int32),
        "labels": torch.full((len(examples), row_length), IGNORED, dtype=torch.int32),
        "attention_mask": torch.zeros(len(examples), row_length, dtype=torch.int32),
    }
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        columns["input_ids"][row, :length] = torch.tensor(example.input_ids)
        columns["labels"][row, :length] = torch.tensor(example.labels)
        columns["attention_mask"][row, :length] = 1
    return Rows(columns)


class Mixture(Dataset):
    """Rows of several domains in a given order, as `draw` gives it."""

    def __init__(self, rows: Mapping[str, Rows], order: Sequence[tuple[str, int]]):
        self.rows = rows
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        domain, place = self.order[index]
        return self.rows[domain][place]


def mix(rows: Mapping[str, Tensor], shares: Mapping[str, float], *, count: int, seed: int) -> Tensor:
    """Draw `count` rows with each domain's share, spread evenly: every stretch of them has about these shares.

    A domain that runs out starts again, reshuffled. Train on the rows in their order.

    Raises:
        ValueError: If the shares do not sum to 1 or name an unknown domain.
    """
    order = draw({name: len(part) for name, part in rows.items()}, shares, count=count, seed=seed)
    return torch.stack([rows[name][index] for name, index in order])


def draw(available: Mapping[str, int], shares: Mapping[str, float], *, count: int, seed: int) -> list[tuple[str, int]]:
    """The domain, and the index in it, of each of the `count` rows that `mix` draws.

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
    by_place = []
    for name, quota in _quotas(shares, count).items():
        drawn = _draw(available[name], quota, rng)
        # the i-th of n rows lies at random in the i-th of n equal parts
        by_place += [((place + rng.random()) / quota, name, index) for place, index in enumerate(drawn)]
    return [(name, index) for _, name, index in sorted(by_place)]


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
