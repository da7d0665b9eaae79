"""Examples as rows of equal length: several packed into one, or one a row with padding."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_moe.data.encoding import IGNORED, Example


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


def pack_examples(examples: Sequence[Example], *, row_length: int, padding: int) -> Rows:
    """Whole examples packed into rows by best fit; `position_ids` begin at 0 with each, and what is left is padded.

    Without an attention mask the host's attention keeps such examples apart by their position ids; recurrent layers
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
