"""Routing health from a trace: a folder that `RoutingTrace.save` wrote, or its figures as JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_moe.hub.facts import CardError, read_facts, tables, take

if TYPE_CHECKING:
    from hf_moe.observability.routing_trace import RoutingTrace

FIGURES = ("load_entropy", "max_violation", "load_cv", "router_entropy", "margin", "dead_experts", "drop_share")


@dataclass(frozen=True)
class RoutingFacts:
    """`metrics` as `RoutingTrace.metrics()` names them; `domains` the same for each; `verdict` in words, or None."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    domains: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    verdict: str | None = None

    @property
    def layers(self) -> list[str]:
        prefix = f"{FIGURES[0]}/"
        names = [name.removeprefix(prefix) for name in self.metrics if name.startswith(prefix)]
        return [name for name in names if name not in ("mean", "worst")]

    def figure(self, name: str) -> float | None:
        # metric names hold dots: no path
        value = self.metrics.get(name)
        return take({"x": value}, "x", float)


def routing_facts(path: Path) -> RoutingFacts:
    """Facts of a trace's folder, or of a JSON file `{"metrics": {...}, "domains": {name: {...}}, "verdict": "..."}`.

    Raises:
        CardError: If it is neither.
    """
    if path.is_dir():
        return _of_trace(load_trace(path))
    found = read_facts(path)
    metrics = take(found, "metrics", dict)
    if metrics is None:
        raise CardError(f"{str(path)!r} holds no 'metrics'. Give the folder of a trace, or RoutingTrace.metrics().")
    return RoutingFacts(metrics, tables(found, "domains"), take(found, "verdict", str))


def load_trace(folder: Path) -> "RoutingTrace":
    """The trace itself, for plots.

    Raises:
        CardError: If the folder holds none, or a damaged one.
    """
    from hf_moe.observability.routing_trace import RoutingTrace

    try:
        return RoutingTrace.load(folder)
    except (OSError, ValueError) as error:
        raise CardError(f"{str(folder)!r} is no trace: {error}") from error


def _of_trace(trace: "RoutingTrace") -> RoutingFacts:
    from hf_moe.observability.health import diagnose

    health = diagnose([trace.statistics(name) for name in trace.layers])
    domains = {name: _known(trace.metrics(name)) for name in trace.domains}
    return RoutingFacts(_known(trace.metrics()), domains, str(health))


def _known(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}
