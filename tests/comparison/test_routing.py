"""Two models' routing, compared from hand-made counts and choices; the truth is computed with Python's own sets."""

import json
import math
import random

import pytest
import torch

from hf_moe.comparison.routing import choice_agreement, compare_layers
from hf_moe.observability.layer_statistics import LayerStatistics


def layer(counts, *, name="model.layers.0.mlp", top_k=1, entropy=0.5, margin=0.2):
    counts = torch.tensor(counts)
    tokens = int(counts.sum()) // top_k
    return LayerStatistics(
        name=name,
        num_experts=len(counts),
        top_k=top_k,
        tokens=tokens,
        counts=counts,
        weight_mass=counts.double(),
        scored_tokens=tokens,
        entropy_sum=tokens * entropy * math.log(len(counts)),
        margin_sum=tokens * margin,
    )


def choices_of(rows, top_k):
    return torch.tensor(rows, dtype=torch.int64).view(-1, top_k)


@pytest.mark.parametrize(("top_k", "other_k"), [(2, 2), (3, 3), (2, 4), (4, 1)])
def test_agreement_and_overlap_match_sets(top_k, other_k):
    rng = random.Random(top_k * 10 + other_k)
    one = [rng.sample(range(6), top_k) for _ in range(200)]
    two = [row[::-1] if rng.random() < 0.5 and top_k == other_k else rng.sample(range(6), other_k) for row in one]
    agreement, overlap = choice_agreement(choices_of(one, top_k), choices_of(two, other_k), 6)
    pairs = [(set(a), set(b)) for a, b in zip(one, two, strict=True)]
    same = sum(a == b for a, b in pairs) / 200
    assert agreement == (same if top_k == other_k else None)
    assert overlap == pytest.approx(sum(len(a & b) / min(top_k, other_k) for a, b in pairs) / 200)
    assert top_k != other_k or same >= 0.4  # the order of the slots does not count


def test_slots_without_an_expert_are_no_expert():
    one = torch.tensor([[0, 4], [4, 4], [4, 4], [1, 2]])
    two = torch.tensor([[4, 0], [4, 4], [4, 3], [1, 4]])
    assert choice_agreement(one, two, 4) == (0.5, (1 + 1 + 0 + 1) / 4)


def test_choices_of_different_tokens_are_refused():
    with pytest.raises(ValueError, match="must be of the same tokens, got 3 and 4"):
        choice_agreement(torch.zeros(3, 1), torch.zeros(4, 1), 2)


def test_the_shift_by_chance_is_that_of_two_samples():
    generator = torch.Generator().manual_seed(0)
    load = torch.rand(16, generator=generator).double() + 0.2

    def draw(count):
        return torch.bincount(load.multinomial(count, replacement=True, generator=generator), minlength=16).tolist()

    comparisons = [compare_layers([layer(draw(2000))], [layer(draw(5000))]).layers[0] for _ in range(60)]
    measured = sum(each.load_shift for each in comparisons) / 60
    assert comparisons[0].load_shift_by_chance == pytest.approx(measured, rel=0.15)


def test_dead_and_revived_experts():
    found = compare_layers([layer([5, 0, 3, 0])], [layer([0, 0, 4, 4], entropy=0.4, margin=0.5)]).layers[0]
    assert (found.newly_dead, found.revived, found.new.dead_experts) == ((0,), (3,), (0, 1))
    assert found.entropy_change == pytest.approx(-0.1)
    assert found.margin_change == pytest.approx(0.3)
    assert found.agreement is None


def test_metrics_name_the_worst_layer():
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    base = [layer([4, 4], name=name) for name in names]
    new = [layer([4, 4], name=names[0]), layer([8, 0], name=names[1])]
    ids = [torch.tensor([0, 1] * 4).view(-1, 1), torch.zeros(8, 1, dtype=torch.int64)]
    comparison = compare_layers(base, new, dict.fromkeys(names, ids[0]), dict(zip(names, ids, strict=True)))
    metrics = comparison.metrics()
    assert (metrics["agreement.min"].value, metrics["agreement.min"].note) == (0.5, names[1])
    assert metrics["agreement.mean"].value == 0.75
    assert (metrics["dead_experts"].value, metrics["dead_experts"].note) == (1, f"1 in {names[1]}")
    assert metrics["load_shift.max"].note == names[1]
    assert metrics["load_shift.mean"].value == pytest.approx(metrics["load_shift.max"].value / 2)
    assert metrics["max_violation.max"].value == 1
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_other_numbers_of_experts_leave_out_what_compares_them_singly():
    ids = torch.tensor([[0], [1]])
    key = "model.layers.0.mlp"
    comparison = compare_layers([layer([2, 2])], [layer([2, 2, 0])], {key: ids}, {key: ids})
    found, metrics = comparison.layers[0], comparison.metrics()
    assert (found.agreement, found.overlap, found.load_shift, found.newly_dead, found.revived) == (None,) * 5
    assert found.entropy_change == pytest.approx(0)
    assert "The number of experts differs (2 and 3) in model.layers.0.mlp" in comparison.left_out[0]
    for name in ("agreement.min", "agreement.mean", "load_shift.max", "newly_dead_experts"):
        assert metrics[name].value is None
        assert "number of experts differs" in metrics[name].note
    assert metrics["dead_experts"].value == 1


def test_other_top_k_leaves_out_agreement_alone():
    key = "model.layers.0.mlp"
    one, two = torch.tensor([[0], [1]]), torch.tensor([[0, 2], [2, 0]])
    comparison = compare_layers([layer([1, 1, 0])], [layer([2, 0, 2], top_k=2)], {key: one}, {key: two})
    assert comparison.layers[0].agreement is None
    assert comparison.layers[0].overlap == 0.5
    assert comparison.layers[0].load_shift > 0
    assert "The number of experts per token differs (1 and 2)" in comparison.left_out[0]
    assert comparison.metrics()["agreement.min"].value is None


def test_layers_are_paired_by_name_then_by_position():
    names = [f"model.layers.{i}.mlp" for i in range(3)]
    other = [f"backbone.{i}.moe" for i in range(3)]
    base = [layer([4, 4], name=name) for name in names]
    renamed = compare_layers(base, [layer([4, 4], name=name) for name in other])
    assert [(each.base.name, each.new.name) for each in renamed.layers] == list(zip(names, other, strict=True))
    assert "paired in their order" in renamed.left_out[0]
    fewer = compare_layers(base, base[1:])
    assert [each.name for each in fewer.layers] == names[1:]
    assert fewer.left_out == (f"Only the base has {names[0]}: left out.",)
    with pytest.raises(ValueError, match="3 and 1 MoE layers and no layer name in common"):
        compare_layers(base, [layer([4, 4], name="encoder.0")])


def test_a_layer_without_tokens_has_no_load_shift():
    comparison = compare_layers([layer([0, 0])], [layer([1, 1])])
    assert comparison.layers[0].load_shift is None
    assert comparison.metrics()["load_shift.max"].value is None
    assert comparison.metrics()["load_cv.max"].value == 0
    json.dumps(comparison.to_dict(), allow_nan=False)
