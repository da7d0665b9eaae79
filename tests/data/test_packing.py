"""Rows hold what they are made of in order and keep examples apart; mixtures hold the shares that were asked for."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from hf_moe.data.encoding import IGNORED, Example
from hf_moe.data.packing import Mixture, PackedRows, draw, mix, pack, pack_examples, pad_examples
from tiny_moe import hf_moe_model, qwen_model

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


# ---- whole examples in rows

LENGTHS = [3, 16, 7, 9, 1, 12, 4, 16, 5]


def examples(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(2, 60, (length,), generator=generator).tolist() for length in lengths]
    return [Example(ids, [IGNORED, *ids[1:]]) for ids in made]


def segments(rows):
    """The examples of packed rows, found again by their positions."""
    found = []
    for ids, positions in zip(rows.columns["input_ids"].tolist(), rows.columns["position_ids"].tolist(), strict=True):
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(ids)]
        found += [ids[begin:end] for begin, end in pairwise(starts)]
    return found


def test_every_example_is_packed_once_and_whole():
    given = examples()
    rows = pack_examples(given, row_length=16, padding=0)
    found = segments(rows)
    for example in given:
        found.remove(example.input_ids)
    assert all(set(rest) == {0} for rest in found)  # padding
    assert rows.loss_tokens == sum(len(example.labels) - 1 for example in given)


def test_packing_is_tight():
    rows = pack_examples(examples(), row_length=16, padding=0)
    assert len(rows) == -(-sum(LENGTHS) // 16)


def test_no_label_crosses_from_one_example_to_the_next():
    columns = pack_examples(examples(), row_length=16, padding=0).columns
    assert (columns["labels"][columns["position_ids"] == 0] == IGNORED).all()


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="17 tokens does not fit a row of 16"):
        pack_examples(examples([17]), row_length=16, padding=0)


@pytest.mark.parametrize("make", [qwen_model, hf_moe_model], ids=["qwen3_moe", "hf_moe"])
def test_a_model_computes_packed_examples_as_if_alone(make):
    model = make().eval()
    given = examples([6, 10], seed=1)
    packed = pack_examples(given, row_length=20, padding=0)
    with torch.no_grad():
        batch = {name: column.long() for name, column in packed.columns.items()}
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        for example in given:
            at = packed.columns["input_ids"][0].tolist().index(example.input_ids[0])
            alone = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[at : at + len(alone)], alone)


def test_padded_rows_mask_what_is_not_there():
    given = examples([3, 5])
    columns = pad_examples(given, row_length=8, padding=0).columns
    assert columns["attention_mask"].sum(1).tolist() == [3, 5]
    assert (columns["labels"][columns["attention_mask"] == 0] == IGNORED).all()


def test_a_mixture_has_the_shares_asked_for():
    rows = {name: pack_examples(examples(seed=seed), row_length=16, padding=0) for seed, name in enumerate("ab")}
    order = draw({name: len(part) for name, part in rows.items()}, {"a": 0.25, "b": 0.75}, count=40, seed=0)
    mixture = Mixture(rows, order)
    assert len(mixture) == 40
    assert sum(name == "a" for name, _ in order) == 10
    assert mixture[0]["input_ids"].dtype == torch.int64
