"""Packed rows keep their examples apart: in the labels, in the positions, and in what a model computes."""

from itertools import pairwise

import pytest
import torch

from hf_moe.data.encoding import IGNORED, Example
from hf_moe.data.packing import draw
from hf_moe.data.rows import Mixture, pack_examples, pad_examples
from tiny_moe import hf_moe_model, qwen_model

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
