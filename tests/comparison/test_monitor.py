"""Exported counts against a baseline trace."""

import json
from dataclasses import replace

import pytest
import torch

from hf_moe.comparison.monitor import check_thresholds, monitor
from hf_moe.comparison.served_counts import ServedCounts
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.observability.layer_statistics import empty_statistics
from hf_moe.observability.routing_trace import RoutingTrace
from hf_moe.observability.thresholds import RoutingThresholds, ThresholdsError

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]


def statistics(name, counts):
    counts = torch.tensor(counts)
    nothing = empty_statistics(name, len(counts), 2, coactivation=False)
    return replace(nothing, tokens=int(counts.sum()) // 2, counts=counts, weight_mass=counts.double())


def baseline():
    trace = RoutingTrace([empty_statistics(name, 4, 2, coactivation=False) for name in LAYERS], {})
    trace.add([statistics(name, [400, 300, 200, 100]) for name in LAYERS], "law")
    trace.add([statistics(name, [100, 100, 400, 400]) for name in LAYERS], "code")
    return trace


def exported(*counts):
    found = ServedCounts(notes=["a note"])
    for name, values in zip(LAYERS, counts, strict=False):
        found.add(name, dict(enumerate(values)))
    return found


def test_the_same_load_is_no_shift():
    result = monitor(baseline(), exported([2000, 1600, 2400, 2000], [2000, 1600, 2400, 2000]))
    assert result.metrics()["load_shift.max"].value == pytest.approx(0, abs=1e-12)
    assert result.notes == ("a note",)
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_baseline_may_be_one_domain():
    counts = [4000, 3000, 2000, 1000]
    assert monitor(baseline(), exported(counts, counts), domain="law").metrics()["load_shift.max"].value < 1e-12
    assert monitor(baseline(), exported(counts, counts)).metrics()["load_shift.max"].value > 0.02
    with pytest.raises(ValueError, match="no domain 'docs'"):
        monitor(baseline(), exported(counts, counts), domain="docs")


def test_thresholds_find_a_dead_expert_and_its_layer():
    result = monitor(baseline(), exported([500, 400, 600, 500], [900, 0, 600, 500]))
    thresholds = RoutingThresholds.parse(
        ["newly_dead_experts == 0", "load_shift.max <= 0.05", "max_violation.max <= 3"]
    )
    check_thresholds(thresholds)
    verdict = thresholds.judge(result.metrics())
    assert [failed.check.metric for failed in verdict.failures] == ["newly_dead_experts", "load_shift.max"]
    assert "measured 1 (1 in model.layers.1.mlp)" in str(verdict)


def test_thresholds_of_metrics_without_counts_are_refused():
    with pytest.raises(ThresholdsError, match=r"'agreement\.min' is not measured by expert counts alone"):
        check_thresholds(RoutingThresholds.parse(["agreement.min >= 0.9"]))
    with pytest.raises(ThresholdsError, match="bits_per_byte"):
        check_thresholds(RoutingThresholds.parse(["bits_per_byte.domain.law <= +0.1"]))


def test_a_missing_layer_is_refused_unless_left_out():
    found = exported([500, 400, 600, 500])
    with pytest.raises(EvaluationError, match=r"no counts of 1 of 2 layers \(model\.layers\.1\.mlp"):
        monitor(baseline(), found)
    assert len(monitor(baseline(), found, layers=LAYERS[:1]).comparison.layers) == 1


def test_other_experts_and_too_little_traffic_are_refused():
    with pytest.raises(EvaluationError, match="has an expert 4; the baseline has 4 experts"):
        monitor(baseline(), exported([1, 1, 1, 1, 1], [1, 1, 1, 1]))
    few = [10, 10, 10, 10]
    with pytest.raises(EvaluationError, match=r"the export has 40 assignments .*; 400 are needed to judge 4 experts"):
        monitor(baseline(), exported(few, few))
    assert monitor(baseline(), exported(few, few), min_per_expert=10).comparison.layers
