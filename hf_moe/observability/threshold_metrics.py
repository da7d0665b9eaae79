"""Metrics that thresholds can bound: the meaning of each, and the values it can have."""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: As in a file of thresholds.
        meaning: In words, without a full stop.
        low: Smallest possible value.
        high: Largest possible value.
        is_count: Whether it is a whole number.
        is_change: Whether it is a signed difference, new minus base.
    """

    name: str
    meaning: str
    low: float = 0.0
    high: float = math.inf
    is_count: bool = False
    is_change: bool = False

    @property
    def range_text(self) -> str:
        if math.isinf(self.high):
            return "0 or more" if self.low == 0 else "any number"
        return f"from {self.low:g} to {self.high:g}"


def _named(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


METRICS = _named(
    Metric("agreement.min", "share of the tokens that go to the same set of experts, in the worst layer", high=1.0),
    Metric("agreement.mean", "share of the tokens that go to the same set of experts, mean of the layers", high=1.0),
    Metric("overlap.min", "share of a token's experts that both models chose, in the worst layer", high=1.0),
    Metric("overlap.mean", "share of a token's experts that both models chose, mean of the layers", high=1.0),
    Metric("load_shift.max", "Jensen-Shannon divergence of the expert loads in bits, in the worst layer", high=1.0),
    Metric("load_shift.mean", "Jensen-Shannon divergence of the expert loads in bits, mean of the layers", high=1.0),
    Metric("dead_experts", "experts of the new model that no token chose, in all layers", is_count=True),
    Metric("newly_dead_experts", "experts that tokens chose in the base and none in the new model", is_count=True),
    Metric("revived_experts", "experts that no token chose in the base and some in the new model", is_count=True),
    Metric("load_cv.max", "standard deviation of the new model's expert load over its mean, in the worst layer"),
    Metric("max_violation.max", "how far the busiest expert is above the mean load, in the worst layer"),
    Metric("load_entropy.min", "entropy of the new model's expert load, 1 is balanced, in the worst layer", high=1.0),
    Metric("router_entropy_change.min", "the largest fall of the router's entropy", -1.0, 1.0, is_change=True),
    Metric("router_entropy_change.max", "the largest rise of the router's entropy", -1.0, 1.0, is_change=True),
    Metric("margin_change.min", "the largest fall of the router's margin", -1.0, 1.0, is_change=True),
    Metric("margin_change.max", "the largest rise of the router's margin", -1.0, 1.0, is_change=True),
    Metric("weight_drift.router.max", "norm of the change of a router's weights over their norm, in the worst layer"),
    Metric("weight_drift.experts.max", "norm of the change of the experts' weights over their norm, worst layer"),
    Metric(
        "bits_per_byte.worst_domain",
        "the change of bits per byte against the base, in the worst domain",
        -math.inf,
        is_change=True,
    ),
    Metric("bits_per_byte.all", "the change of bits per byte against the base, all text", -math.inf, is_change=True),
    Metric("latency.worst_domain", "time of a forward pass, divided by the base's, in the worst domain"),
    Metric("latency.all", "time of a forward pass, divided by the base's, all domains together"),
)
"""By name. `bits_per_byte.domain.NAME` and `latency.domain.NAME` besides, of one domain."""

BY_DOMAIN = {"bits_per_byte": METRICS["bits_per_byte.all"], "latency": METRICS["latency.all"]}
_DOMAIN = re.compile(r"(bits_per_byte|latency)\.domain\.([A-Za-z0-9][A-Za-z0-9_-]{0,31})")

ORDER = frozenset(
    {
        ("agreement.min", "agreement.mean"),
        ("overlap.min", "overlap.mean"),
        ("agreement.min", "overlap.min"),
        ("agreement.mean", "overlap.mean"),
        ("load_shift.mean", "load_shift.max"),
        ("newly_dead_experts", "dead_experts"),
        ("router_entropy_change.min", "router_entropy_change.max"),
        ("margin_change.min", "margin_change.max"),
        ("bits_per_byte.all", "bits_per_byte.worst_domain"),
    }
)
"""Pairs of metrics of which the first is never above the second."""


def metric_named(name: str) -> Metric | None:
    """The metric of that name, or None."""
    if (found := _DOMAIN.fullmatch(name)) is not None:
        whole = BY_DOMAIN[found[1]]
        meaning = whole.meaning.replace("all text", f"in {found[2]}").replace("all domains together", f"in {found[2]}")
        return Metric(name, meaning, whole.low, whole.high, whole.is_count, whole.is_change)
    return METRICS.get(name)


def domain_of(name: str) -> str | None:
    """The domain that a metric is of, if it is of one."""
    found = _DOMAIN.fullmatch(name)
    return None if found is None else found[2]
