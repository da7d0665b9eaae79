"""Two models on the same texts: what a `TextProbe` measured of each, and how they differ in routing, weights, bits per
byte and latency, by layer and by domain."""

from dataclasses import dataclass
from typing import Any

from hf_moe.comparison.routing import RoutingComparison, compare_traces
from hf_moe.comparison.weights import LayerDrift, LayerWeights, is_exact, weight_drift
from hf_moe.evaluation.bits_per_byte import BitsPerByte
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.io.old_names import renamed_method
from hf_moe.observability.routing_trace import RoutingTrace
from hf_moe.observability.thresholds import MetricValue, json_number


@dataclass(frozen=True)
class Latency:
    """The fastest of a few forward passes, without a cache and without hooks.

    Attributes:
        seconds: Of the pass.
        tokens: In it.
    """

    seconds: float
    tokens: int

    @property
    def milliseconds_per_1k_tokens(self) -> float:
        return 1e6 * self.seconds / self.tokens


@dataclass(frozen=True)
class Measurement:
    """One model on the texts of a `TextProbe`.

    Attributes:
        trace: Routing by domain, of single tokens.
        bits: By domain.
        latency: By domain; empty if it was not measured.
        weights: Samples by layer; empty if they were not taken.
        window: Tokens that the model read at once, at most. Windows advance by half of it, so that the routing of most
            tokens counts twice.
    """

    trace: RoutingTrace
    bits: dict[str, BitsPerByte]
    latency: dict[str, Latency]
    weights: dict[str, LayerWeights]
    window: int


@dataclass(frozen=True)
class ModelComparison:
    """Differences between two models on the same texts; `compare_measurements` makes one.

    Attributes:
        base, new: The two measurements.
        routing: Of all tokens.
        by_domain: Routing of each domain.
        drift: Of the layers of `routing`, in their order; empty if no weights were taken.
        names: Of the two models, for tables and the page.
    """

    base: Measurement
    new: Measurement
    routing: RoutingComparison
    by_domain: dict[str, RoutingComparison]
    drift: tuple[LayerDrift, ...]
    names: tuple[str, str] = ("base", "new")

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sentences on what could not be compared, and why."""
        drift = [reason for layer in self.drift for reason in layer.left_out]
        return tuple(dict.fromkeys((*self.routing.left_out, *drift)))

    @property
    def drift_is_exact(self) -> bool:
        return is_exact(self.base.weights)

    def bits_change(self, domain: str | None = None) -> float:
        """New minus base, bits per byte; of all text if `domain` is None."""
        before, after = (_bits(side, domain) for side in (self.base, self.new))
        return after - before

    def latency_ratio(self, domain: str | None = None) -> float | None:
        before, after = (_latency(side, domain) for side in (self.base, self.new))
        return None if before is None or after is None else after / before

    def metrics(self) -> dict[str, MetricValue]:
        """Metrics that `RoutingThresholds` can bound, by name."""
        domains = list(self.base.bits)
        bits = {name: self.bits_change(name) for name in domains}
        # NaN first: it is worse than every number
        worst = max(bits, key=lambda name: (bits[name] != bits[name], bits[name]))
        found = {
            **self.routing.metrics(),
            "bits_per_byte.all": MetricValue(self.bits_change()),
            "bits_per_byte.worst_domain": MetricValue(bits[worst], worst),
            **{f"bits_per_byte.domain.{name}": MetricValue(value) for name, value in bits.items()},
            "weight_drift.router.max": self._worst_drift("router"),
            "weight_drift.experts.max": self._worst_drift("experts"),
        }
        ratios = {name: self.latency_ratio(name) for name in domains}
        if known := {name: ratio for name, ratio in ratios.items() if ratio is not None}:
            slowest = max(known, key=lambda name: known[name])
            found["latency.all"] = MetricValue(self.latency_ratio())
            found["latency.worst_domain"] = MetricValue(known[slowest], slowest)
            found |= {f"latency.domain.{name}": MetricValue(ratio) for name, ratio in known.items()}
        return found

    figures = renamed_method("figures", "metrics")

    def _worst_drift(self, part: str) -> MetricValue:
        named = zip(self.routing.layers, self.drift, strict=bool(self.drift))
        values = {layer.name: getattr(drift, part) for layer, drift in named}
        if not values or None in values.values():
            return MetricValue(None, " ".join(self.left_out) or "no weights were taken")
        worst = max(values, key=lambda name: values[name])
        return MetricValue(values[worst], worst)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "models": [
                {"name": name, **side.trace.model_facts}
                for name, side in zip(self.names, (self.base, self.new), strict=True)
            ],
            "figures": {
                name: {"value": json_number(metric.value), "note": metric.note}
                for name, metric in sorted(self.metrics().items())
            },
            "left_out": list(self.left_out),
            "domains": {name: self._domain_dict(name) for name in self.base.bits},
            "layers": [self._layer_dict(position) for position in range(len(self.routing.layers))],
            "weight_drift_is_exact": self.drift_is_exact,
            "window": self.base.window,
        }

    def _domain_dict(self, name: str) -> dict[str, Any]:
        routing = self.by_domain[name].metrics() if name in self.by_domain else {}
        listed = ("agreement.min", "agreement.mean", "overlap.mean", "load_shift.max", "load_shift.mean")
        return {
            "bytes": self.base.bits[name].bytes,
            "tokens": [side.bits[name].tokens for side in (self.base, self.new)],
            "bits_per_byte": [json_number(_bits(side, name)) for side in (self.base, self.new)],
            "milliseconds_per_1k_tokens": [_latency(side, name) for side in (self.base, self.new)],
            **{metric: json_number(routing[metric].value) for metric in listed if metric in routing},
        }

    def _layer_dict(self, position: int) -> dict[str, Any]:
        record = self.routing.layers[position].to_dict()
        if self.drift:
            drift = self.drift[position]
            record["weight_drift"] = {
                "router": json_number(drift.router),
                "experts": json_number(drift.experts),
                "by_expert": None if drift.by_expert is None else [round(v, 8) for v in drift.by_expert.tolist()],
            }
        return record


def compare_measurements(
    base: Measurement, new: Measurement, names: tuple[str, str] = ("base", "new")
) -> ModelComparison:
    """Compare what one `TextProbe` measured of two models.

    Raises:
        ValueError: If no layer can be paired.
        EvaluationError: If the texts differ.
    """
    if _texts(base) != _texts(new):
        raise EvaluationError("the two models were measured on different texts. Measure both with one TextProbe.")
    by_domain = compare_traces(base.trace, new.trace)
    routing = by_domain.pop(None)
    drift: tuple[LayerDrift, ...] = ()
    if base.weights and new.weights:
        pairs = ((base.weights[layer.base.name], new.weights[layer.new.name]) for layer in routing.layers)
        drift = tuple(weight_drift(*pair) for pair in pairs)
    found = {name: part for name, part in by_domain.items() if name is not None}
    return ModelComparison(base, new, routing, found, drift, names)


def _texts(side: Measurement) -> tuple[int, list[tuple[str, int]]]:
    return side.window, [(name, part.bytes) for name, part in side.bits.items()]


def _bits(side: Measurement, domain: str | None) -> float:
    parts = list(side.bits.values()) if domain is None else [side.bits[domain]]
    return sum(part.bits for part in parts) / sum(part.bytes for part in parts)


def _latency(side: Measurement, domain: str | None) -> float | None:
    """Milliseconds per 1,000 tokens."""
    if not side.latency:
        return None
    if domain is not None:
        return side.latency[domain].milliseconds_per_1k_tokens
    parts = side.latency.values()
    return 1e6 * sum(part.seconds for part in parts) / sum(part.tokens for part in parts)
