"""The metric modules load by path through `evaluate`, without the Hub."""

import math

import pytest

evaluate = pytest.importorskip("evaluate", reason="needs evaluate: pip install hf-moe[eval]")

from hf_moe.evaluation.metrics import METRICS, metric_path  # noqa: E402


@pytest.fixture(scope="module")
def metrics():
    return {name: evaluate.load(metric_path(name)) for name in METRICS}


def test_expert_utilization(metrics):
    metric = metrics["expert_utilization"]
    found = metric.compute(predictions=[[0, 1], [0, 2], [0, 4]], num_experts=4)
    assert found["shares"] == [0.6, 0.2, 0.2, 0.0]
    entropy = -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2)) / math.log(4)
    assert found["entropy"] == pytest.approx(entropy, rel=1e-12)
    assert found["max_violation"] == pytest.approx(0.6 * 4 - 1)
    assert found["unused"] == 1


def test_expert_utilization_in_batches_and_refusals(metrics):
    metric = metrics["expert_utilization"]
    metric.add_batch(predictions=[[0], [1]])
    metric.add_batch(predictions=[[2], [3]])
    assert metric.compute(num_experts=4)["entropy"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 4\].*got 5"):
        metric.compute(predictions=[[5]], num_experts=4)
    with pytest.raises(ValueError, match="no token was assigned"):
        metric.compute(predictions=[[4]], num_experts=4)


def test_routing_agreement(metrics):
    metric = metrics["routing_agreement"]
    found = metric.compute(predictions=[[0, 1], [2, 3], [4, 5]], references=[[1, 0], [2, 5], [0, 1]])
    assert found == {"same_set": pytest.approx(1 / 3), "overlap": pytest.approx(0.5)}
    with pytest.raises(ValueError, match="at least one reference expert"):
        metric.compute(predictions=[[0]], references=[[]])


def test_they_say_what_they_take_and_whom_to_cite(metrics):
    for metric in metrics.values():
        assert "shape [tokens, experts per token]" in metric.inputs_description
        assert "arXiv" in metric.citation


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="must be one of expert_utilization, routing_agreement, got 'bleu'"):
        metric_path("bleu")
