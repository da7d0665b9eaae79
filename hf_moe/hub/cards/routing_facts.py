"""Facts of routing from a trace that `RoutingTrace.save` or `hf-moe trace` wrote."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hf_moe.hub.cards.facts import CardError, read_facts, take

if TYPE_CHECKING:
    from hf_moe.observability.routing_trace import RoutingTrace

_TRACE = "trace"  # in the folder that `hf-moe trace` writes


@dataclass(frozen=True)
class RoutingFacts:
    """`metrics` as `RoutingTrace.metrics()` names them; `model` its `model_facts`; `verdict` in words, or None."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    verdict: str | None = None

    @property
    def layers(self) -> list[str]:
        prefix = "load_entropy/"
        names = [name.removeprefix(prefix) for name in self.metrics if name.startswith(prefix)]
        return [name for name in names if name not in ("mean", "worst")]

    def metric(self, name: str) -> float | None:
        # metric names hold dots: no path
        return take({"x": self.metrics.get(name)}, "x", float)


def routing_facts(path: Path) -> RoutingFacts:
    """Facts of a trace's folder, of the folder that `hf-moe trace` wrote, or of the `metrics.json` in it.

    Raises:
        CardError: If it is none of them.
    """
    if path.is_dir():
        return _of_trace(load_trace(path))
    found = read_facts(path)
    metrics = take(found, "metrics.all", dict)
    if metrics is None:
        raise CardError(f"{str(path)!r} is no metrics.json of hf-moe trace. Give that, or the folder it lies in.")
    return RoutingFacts(metrics, take(found, "model_facts", dict) or {}, _verdict(take(found, "health", dict) or {}))


def load_trace(folder: Path) -> "RoutingTrace":
    """The trace itself, for plots.

    Raises:
        CardError: If the folder holds none, or a damaged one.
    """
    from hf_moe.observability.routing_trace import RoutingTrace

    inner = folder / _TRACE
    try:
        return RoutingTrace.load(inner if inner.is_dir() else folder)
    except (OSError, ValueError) as error:
        raise CardError(f"{str(folder)!r} is no trace: {error}") from error


def _of_trace(trace: "RoutingTrace") -> RoutingFacts:
    metrics = {name: None if math.isnan(value) else value for name, value in trace.metrics().items()}
    return RoutingFacts(metrics, trace.model_facts, str(trace.health()))


def _verdict(health: Mapping[str, Any]) -> str | None:
    """Verdict in the words of `Health`; one that it does not know is left out."""
    from hf_moe.observability.health import Finding, Health, Verdict

    verdict = take(health, "verdict", str)
    if verdict not in get_args(Verdict):
        return None
    findings = [
        Finding(*(str(each.get(part)) for part in ("layer", "kind", "message")))  # type: ignore[arg-type]
        for each in take(health, "findings", list) or []
        if isinstance(each, dict)
    ]
    return str(Health(verdict, None, tuple(findings)))  # type: ignore[arg-type]
