"""Rows hold the documents' tokens in order; mixtures hold the shares that were asked for."""

from collections import Counter

import pytest
import torch

from hf_moe.data.packing import PackedRows, mix, pack

ROWS = {name: torch.full((count, 4), value) for value, (name, count) in enumerate({"a": 3, "b": 50, "c": 7}.items())}


def test_pack_keeps_order_and_separates_documents():
    rows = pack([[1, 2, 3], [4], [5, 6, 7, 8]], row_length=4, end_of_text=0)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [[0, 1, 2, 3], [0, 4, 0, 5]]


def test_pack_refuses_too_few_tokens():
    with pytest.raises(ValueError, match="3 tokens do not fill one row of 4"):
        pack([[1, 2]], row_length=4, end_of_text=0)


def test_rows_are_training_examples():
    row = PackedRows(torch.arange(8, dtype=torch.int32).view(2, 4))[1]
    assert row["input_ids"].tolist() == row["labels"].tolist() == [4, 5, 6, 7]
    assert row["input_ids"].dtype == torch.int64


def test_mix_gives_each_domain_its_share():
    mixed = mix(ROWS, {"a": 0.5, "b": 0.25, "c": 0.25}, count=41, seed=0)
    counts = Counter(mixed[:, 0].tolist())
    assert sum(counts.values()) == 41
    assert abs(counts[0] - 20.5) < 1
    assert abs(counts[1] - 10.25) < 1


def test_every_stretch_has_the_shares():
    mixed = mix(ROWS, {"a": 0.5, "b": 0.25, "c": 0.25}, count=400, seed=0)[:, 0]
    for batch in mixed.split(20):
        counts = Counter(batch.tolist())
        # a row is at most one part away from its place: two more or less
        assert abs(counts[0] - 10) <= 2
        assert abs(counts[1] - 5) <= 2


def test_mix_repeats_a_domain_evenly():
    rows = {"a": torch.arange(3)[:, None]}
    counts = Counter(mix(rows, {"a": 1.0}, count=10, seed=0)[:, 0].tolist())
    assert sorted(counts.values()) == [3, 3, 4]


def test_mix_depends_on_the_seed_only():
    shares = {"a": 0.5, "b": 0.5}
    rows = {name: torch.arange(20)[:, None] + 100 * i for i, name in enumerate(shares)}
    once, again, other = (mix(rows, shares, count=12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_mix_refuses_bad_shares():
    with pytest.raises(ValueError, match=r"sum to 1, got 0.7"):
        mix(ROWS, {"a": 0.5, "b": 0.2}, count=4, seed=0)
    with pytest.raises(ValueError, match=r"\['z'\], which have no rows"):
        mix(ROWS, {"a": 0.5, "z": 0.5}, count=4, seed=0)
