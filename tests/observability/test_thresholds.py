"""Thresholds refuse bad lines when they are read, and judge metrics."""

import json
import math

import pytest

from hf_moe.observability.threshold_metrics import METRICS, ORDER, metric_named
from hf_moe.observability.thresholds import MetricValue, RoutingThresholds, ThresholdsError

MEASURED = {
    "agreement.min": MetricValue(0.85, "model.layers.3.mlp"),
    "dead_experts": MetricValue(2.0, "2 in model.layers.0.mlp"),
    "bits_per_byte.worst_domain": MetricValue(0.0113, "law"),
    "load_shift.max": MetricValue(None, "the number of experts differs"),
    "latency.all": MetricValue(math.nan),
}


def refusal(*lines: str) -> str:
    with pytest.raises(ThresholdsError) as caught:
        RoutingThresholds.parse(lines)
    return str(caught.value)


def load(tmp_path, text: str | bytes) -> RoutingThresholds:
    path = tmp_path / "gate.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return RoutingThresholds.load(path)


def test_a_file_is_read_with_its_line_numbers(tmp_path):
    thresholds = load(
        tmp_path,
        """# what an upgrade must keep
checks:
  - agreement.min >= 0.9

  - dead_experts == 0   # none
  - "bits_per_byte.worst_domain <= +0.02"
  - bits_per_byte.domain.law < -1e-2
""",
    )
    assert [(check.metric, check.operator, check.threshold, check.line) for check in thresholds.checks] == [
        ("agreement.min", ">=", 0.9, 3),
        ("dead_experts", "==", 0.0, 5),
        ("bits_per_byte.worst_domain", "<=", 0.02, 6),
        ("bits_per_byte.domain.law", "<", -0.01, 7),
    ]
    assert thresholds.domains == ("law",)


@pytest.mark.parametrize(
    ("line", "holds"),
    [
        ("agreement.min >= 0.85", True),
        ("agreement.min > 0.85", False),
        ("agreement.min >= 0.9", False),
        ("dead_experts == 0", False),
        ("dead_experts <= 2", True),
        ("dead_experts < 2", False),
        ("bits_per_byte.worst_domain <= +0.02", True),
        ("bits_per_byte.worst_domain <= 0", False),
        ("load_shift.max <= 0.1", False),  # not measured
        ("latency.all <= 2", False),  # NaN
        ("weight_drift.router.max == 0", False),  # nobody measured it
    ],
)
def test_a_check_holds_or_not(line, holds):
    verdict = RoutingThresholds.parse([line]).judge(MEASURED)
    assert verdict.passed is holds
    assert len(verdict.failures) == (0 if holds else 1)


def test_a_failure_names_line_measurement_and_place():
    verdict = RoutingThresholds.parse(
        ["dead_experts <= 2", "agreement.min >= 0.9", "load_shift.max <= 0.1"], "gate.yaml"
    ).judge(MEASURED)
    assert str(verdict).splitlines() == [
        "gate.yaml: FAILED, 1 of 3 checks hold",
        "  failed: line 2: agreement.min >= 0.9: measured 0.85 (model.layers.3.mlp)",
        "  failed: line 3: load_shift.max <= 0.1: not measured: the number of experts differs",
    ]
    report = verdict.to_dict()
    assert [check["passed"] for check in report["checks"]] == [True, False, False]
    json.dumps(report, allow_nan=False)
    json.dumps(RoutingThresholds.parse(["latency.all <= 2"]).judge(MEASURED).to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("agreement.min >= 1.2", "can never hold: agreement.min is from 0 to 1"),
        ("agreement.min > 1", "can never hold"),
        ("dead_experts == -1", "can never hold: dead_experts is 0 or more"),
        ("dead_experts < 0", "can never hold"),
        ("router_entropy_change.min >= +1.5", "can never hold"),
        ("agreement.min >= 0", "always holds"),
        ("load_shift.max <= 1", "always holds"),
        ("dead_experts > -1", "always holds"),
        ("dead_experts == 2.5", "is a whole number, got 2.5"),
        ("agreement.min == 0.9", "no measurement is exactly 0.9. Use >= or <="),
        ("agreement.min >= nan", "must be a finite decimal number without quotes, got 'nan'"),
        ("agreement.min >= .inf", "finite decimal number"),
        ("latency.all <= 1e999", "too large for a number"),
        ("agreement.min >= '0.9'", "without quotes"),
        ("agreement.min >= 90%", "finite decimal number"),
        ("agreement.min >= 0,9", "finite decimal number"),
        ("agreement.min >= ٠.٩", "finite decimal number"),
        ("agreement.min >= __import__('os').sep", "finite decimal number"),
        ("agreement.min => 0.9", "the operator must be one of == >= <= > <, got '=>'"),
        ("agreement.min != 0.9", "the operator must be"),
        ("agreement.min >= 0.9 and dead_experts == 0", "is no check. Write 'metric operator number'"),
        ("agreement.min", "is no check"),
        ("agreement.mni >= 0.9", "unknown metric 'agreement.mni'. Did you mean 'agreement.min'?"),
        ("wallclock <= 3", "unknown metric 'wallclock'. Known: agreement.min"),
        ("bits_per_byte.worst_domain <= 0.02", "write the sign, +0.02"),
        ("bits_per_byte.domain.a/b <= +0.02", "unknown metric"),
    ],
)
def test_a_line_is_refused_with_its_number(line, message):
    text = refusal("max_violation.max <= 3", line)
    assert text.startswith("thresholds, line 2: ")
    assert message in text


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("agreement.min >= 0.9", "agreement.min <= 0.8"), "cannot both hold"),
        (("agreement.min > 0.9", "agreement.min < 0.9"), "cannot both hold"),
        (("dead_experts > 0", "dead_experts < 1"), "cannot both hold"),
        (("agreement.min >= 0.9", "agreement.mean <= 0.8"), "cannot both hold"),
        (("agreement.mean <= 0.8", "agreement.min >= 0.9"), "cannot both hold"),
        (("newly_dead_experts == 3", "dead_experts == 0"), "cannot both hold"),
        (("agreement.min >= 0.9", "agreement.min >= 0.8"), "bound the same thing twice"),
    ],
)
def test_contradictions_are_refused(lines, message):
    text = refusal(lines[0], "max_violation.max <= 3", lines[1])
    assert text.startswith("thresholds, lines 1 and 3: ")
    assert message in text


def test_a_corridor_is_no_contradiction():
    RoutingThresholds.parse(
        ["agreement.mean >= 0.9", "agreement.min >= 0.8", "agreement.mean <= 0.99", "dead_experts < 1"]
    )
    RoutingThresholds.parse(["agreement.mean >= 0.9", "agreement.min <= 0.8"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping with the key 'checks', got nothing"),
        ("- agreement.min >= 0.9", "must be a mapping with the key 'checks', got a list"),
        ("checks:", "'checks' must be a list, got ''"),
        ("checks: []", "there is no check: anything would pass"),
        ("checks: agreement.min >= 0.9", "'checks' must be a list, got 'agreement.min >= 0.9'"),
        ("checks:\n  agreement.min: 0.9", "'checks' must be a list, got a mapping"),
        ("agreement.min: 0.9", "line 1: unknown key 'agreement.min'. Write it as a line under 'checks:'"),
        ("checks:\n  - dead_experts == 0\nlimits: 3", "line 3: unknown key 'limits'"),
        ("checks: [dead_experts == 0]\nchecks: [agreement.min >= 0.9]", "line 2: the key 'checks' is there twice"),
        ("checks:\n  - agreement.min: 0.9", "line 2: a check must be a text, got a mapping"),
        ("checks:\n  - 0.9", "line 2: a check must be a text, got '0.9'"),
        ("checks:\n  - true", "line 2: a check must be a text"),
        ("checks:\n  - {a: b", "not valid YAML"),
        ("checks:\n\t- dead_experts == 0", "line 2: not valid YAML"),
        ("checks: [dead_experts == 0]\n---\nchecks: []", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        (b"checks:\n  - \xff", "not UTF-8 text (byte 12)"),
        ("checks: [dead_experts == 0]\n#" + "x" * 100_000, "at most 100,000 bytes"),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path):
    with pytest.raises(ThresholdsError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "gate.yaml") in str(caught.value)


def test_what_cannot_be_measured_is_refused_beforehand():
    thresholds = RoutingThresholds.parse(["dead_experts == 0", "agreement.min >= 0.9", "latency.domain.law <= 2"])
    with pytest.raises(ThresholdsError, match=r"line 2: 'agreement.min' is not measured in histograms"):
        thresholds.require(lambda metric: not metric.startswith("agreement"), "in histograms")
    with pytest.raises(ThresholdsError, match=r"line 3: there is no domain 'law'; the texts are of code, docs"):
        thresholds.require_domains(["code", "docs"])
    thresholds.require_domains(["law"])


def test_metrics_and_their_order_are_known():
    assert all(name in METRICS for pair in ORDER for name in pair)
    assert metric_named("latency.domain.law").meaning.endswith("in law")
