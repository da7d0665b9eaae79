"""The paired bootstrap against scipy's, and what is refused."""

import json

import numpy as np
import pytest

from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.paired import paired_differences


def samples(values, metric="acc", name="none"):
    return [{"doc": str(i), "filter": name, "values": {metric: value}} for i, value in enumerate(values)]


def right_or_wrong(count, chance, seed):
    return np.random.default_rng(seed).binomial(1, chance, count).tolist()


def test_interval_equals_scipys_paired_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    one, two = right_or_wrong(300, 0.5, 1), right_or_wrong(300, 0.6, 2)
    found = paired_differences(samples(one), samples(two))["acc,none"]
    expected = stats.bootstrap(
        (np.array(one), np.array(two)),
        lambda a, b, axis: b.mean(axis) - a.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        random_state=1,
    ).confidence_interval
    # both ends are drawn: about a tenth of the interval's own uncertainty
    assert found.low == pytest.approx(expected.low, abs=0.006)
    assert found.high == pytest.approx(expected.high, abs=0.006)
    assert found.first == sum(one) / 300
    assert found.second == sum(two) / 300
    assert found.difference == found.second - found.first
    assert found.first_ahead == sum(a > b for a, b in zip(one, two, strict=True))
    assert found.second_ahead == sum(b > a for a, b in zip(one, two, strict=True))


def test_pairing_sees_what_two_separate_errors_hide():
    # 40 % against 45 % of 200: each has a standard error of 3.5 points, but only ten documents changed, all one way
    one = [1] * 80 + [0] * 120
    two = [1] * 90 + [0] * 110
    found = paired_differences(samples(one), samples(two))["acc,none"]
    assert found.is_real
    assert 0 < found.low < 0.05 < found.high
    same = paired_differences(samples(one), samples(one))["acc,none"]
    assert (same.difference, same.low, same.high, same.is_real) == (0, 0, 0, False)


def test_no_difference_is_real_in_one_of_twenty():
    real = 0
    for seed in range(200):
        one, two = right_or_wrong(150, 0.4, 2 * seed), right_or_wrong(150, 0.4, 2 * seed + 1)
        real += paired_differences(samples(one), samples(two), draws=500)["acc,none"].is_real
    # binomial with 200 draws at 5 %: 10 +- 3.1, and percentile intervals are a little too narrow
    assert 2 <= real <= 22


def test_ratios_are_aggregated_as_lm_eval_does():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    one, two = [[-30.0, 10], [-50.0, 30], [-5.0, 2]], [[-20.0, 10], [-52.0, 30], [-4.0, 2]]
    for metric, aggregate in (
        ("word_perplexity", metrics.weighted_perplexity),
        ("bits_per_byte", metrics.bits_per_byte),
    ):
        found = paired_differences(samples(one, metric), samples(two, metric))[f"{metric},none"]
        assert found.first == pytest.approx(aggregate([tuple(pair) for pair in one]), rel=1e-12)
        assert found.second == pytest.approx(aggregate([tuple(pair) for pair in two]), rel=1e-12)
        # on the second document alone the second needs more
        assert (found.first_ahead, found.second_ahead) == (2, 1)


def test_each_filter_is_compared_by_itself():
    one = samples([1, 0], name="strict") + samples([1, 1], name="flexible")
    two = samples([1, 1], name="strict") + samples([1, 1], name="flexible")
    found = paired_differences(one, two)
    assert found["acc,strict"].difference == 0.5
    assert found["acc,flexible"].difference == 0


@pytest.mark.parametrize("value", [float("nan"), "a", [1, 2, 3], [1.0, 0], None])
def test_values_without_a_mean_are_left_out(value):
    assert paired_differences(samples([1, value]), samples([1, value])) == {}


def test_other_documents_or_filters_are_refused():
    with pytest.raises(EvaluationError, match=r"did not see the same documents \(3 and 2\).*same --limit"):
        paired_differences(samples([1, 0, 1]), samples([1, 0]))
    shuffled = samples([1, 0])[::-1]
    with pytest.raises(EvaluationError, match="the same documents"):
        paired_differences(samples([1, 0]), shuffled)
    with pytest.raises(EvaluationError, match="filters differ"):
        paired_differences(samples([1]), samples([1], name="strict"))


def test_the_same_seed_gives_the_same_interval():
    one, two = samples(right_or_wrong(50, 0.5, 0)), samples(right_or_wrong(50, 0.5, 1))
    results = [json.dumps(paired_differences(one, two, seed=3)["acc,none"].to_dict()) for _ in range(2)]
    assert results[0] == results[1]
