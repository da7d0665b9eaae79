"""Metrics of balance from hand-made counts."""

import math

import pytest
import torch

from hf_moe.observability.layer_statistics import (
    LayerStatistics,
    empty_statistics,
    jensen_shannon,
    load_entropy,
    max_violation,
)


def statistics(counts, **values):
    counts = torch.tensor(counts)
    given = {"tokens": int(counts.sum()), "weight_mass": counts.double(), **values}
    return LayerStatistics("layer", len(counts), 1, counts=counts, **given)


def test_balance_and_its_opposite():
    even, one = statistics([5, 5, 5, 5]), statistics([0, 20, 0, 0])
    assert (even.load_cv, even.max_violation, even.load_entropy, even.dead_experts) == (0, 0, 1, ())
    assert (one.max_violation, one.load_entropy, one.dead_experts, one.busiest_expert) == (3, 0, (0, 2, 3), 1)
    assert one.load_cv == pytest.approx(math.sqrt(3))


def test_balance_at_both_ends():
    even, one = torch.full((8,), 5), torch.tensor([0, 0, 40, 0, 0, 0, 0, 0])
    assert (load_entropy(even), max_violation(even)) == pytest.approx((1, 0))
    assert (load_entropy(one), max_violation(one)) == pytest.approx((0, 7))
    half = torch.tensor([10, 10, 0, 0])
    assert (load_entropy(half), max_violation(half)) == pytest.approx((math.log(2) / math.log(4), 1))
    assert load_entropy(torch.tensor([3])) == 1


def test_no_tokens_have_no_balance():
    for metric in (load_entropy, max_violation):
        with pytest.raises(ValueError, match="counts are all zero"):
            metric(torch.zeros(4))


def test_sums_add_up():
    both = statistics([1, 3], scored_tokens=4, entropy_sum=2 * math.log(2), margin_sum=1.0, dropped=1, empty_slots=2)
    both = both + statistics([3, 1], dropped=2, empty_slots=2)
    assert both.counts.tolist() == [4, 4]
    assert both.weight_mass.tolist() == [4.0, 4.0]
    assert (both.tokens, both.scored_tokens, both.dropped, both.empty_share) == (8, 4, 3, 0.5)
    assert (both.router_entropy, both.margin) == (0.5, 0.25)


def test_what_one_side_does_not_know_the_sum_does_not_know():
    assert (statistics([1, 1], dropped=1) + statistics([1, 1])).dropped is None


def test_nothing_seen_is_not_called_balanced():
    nothing = empty_statistics("layer", 4, 2)
    assert all(math.isnan(getattr(nothing, name)) for name in ("load_cv", "max_violation", "load_entropy", "margin"))
    assert len(nothing.dead_experts) == 4


def test_different_layers_cannot_be_added():
    with pytest.raises(ValueError, match="different layers"):
        statistics([1, 1]) + statistics([1, 1, 1])


def test_jensen_shannon_in_bits():
    p, q = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.25, 0.75])
    assert jensen_shannon(p, p) == 0
    assert jensen_shannon(p, q) == pytest.approx(1)
    r = torch.tensor([0.1, 0.2, 0.3, 0.4])
    mean = [(a + b) / 2 for a, b in zip(p.tolist(), r.tolist(), strict=True)]
    truth = sum(
        0.5 * a * math.log2(a / m) for side in (p, r) for a, m in zip(side.tolist(), mean, strict=True) if a > 0
    )
    assert jensen_shannon(p, r) == pytest.approx(truth, rel=1e-6)
    assert jensen_shannon(r, p) == pytest.approx(truth, rel=1e-6)
