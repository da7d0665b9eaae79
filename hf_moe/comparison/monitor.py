"""Compare the expert counts that a serving process exported with a stored routing trace."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_moe.comparison.routing import RoutingComparison, compare_layers
from hf_moe.comparison.served_counts import ServedCounts, by_layer_name
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.observability.health import ENOUGH_PER_EXPERT
from hf_moe.observability.layer_statistics import LayerStatistics, empty_statistics
from hf_moe.observability.routing_trace import RoutingTrace
from hf_moe.observability.thresholds import MetricValue, RoutingThresholds

# the metrics that counts alone tell: those of the load
MEASURED = frozenset(
    {
        "load_shift.max",
        "load_shift.mean",
        "dead_experts",
        "newly_dead_experts",
        "revived_experts",
        "load_cv.max",
        "max_violation.max",
        "load_entropy.min",
    }
)


@dataclass(frozen=True)
class Monitoring:
    """A window of serving against the baseline.

    Attributes:
        comparison: Layer by layer; the base is the baseline trace.
        notes: What deserves attention, one sentence each.
    """

    comparison: RoutingComparison
    notes: tuple[str, ...]

    def metrics(self) -> dict[str, MetricValue]:
        """Metrics that `RoutingThresholds` can bound, by name."""
        return {name: metric for name, metric in self.comparison.metrics().items() if name in MEASURED}

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "figures": {name: {"value": one.value, "note": one.note} for name, one in self.metrics().items()},
            "notes": list(self.notes),
            **self.comparison.to_dict(),
        }


def check_thresholds(thresholds: RoutingThresholds) -> None:
    """Refuse thresholds of metrics that counts alone do not tell.

    Raises:
        ThresholdsError: Naming the first such check.
    """
    thresholds.require(lambda metric: metric in MEASURED, "by expert counts alone (`hf-moe compare` measures it)")


def monitor(
    baseline: RoutingTrace,
    exported: ServedCounts,
    *,
    domain: str | None = None,
    layers: Sequence[str] | None = None,
    min_per_expert: float = ENOUGH_PER_EXPERT,
) -> Monitoring:
    """Compare exported counts with a baseline.

    Args:
        domain: Of the baseline; all its tokens if None.
        layers: Those to judge, by the names of the baseline; all if None. The export must have each of them.
        min_per_expert: Assignments per expert, on average, below which a layer is not judged.

    Raises:
        EvaluationError: If a layer is missing, has experts that the baseline lacks, or too few assignments.
        CountsError: If a layer of the export is not in the baseline.
        ValueError: If the baseline has no such domain or layer.
    """
    wanted = list(layers) if layers is not None else baseline.layers
    before = [baseline.statistics(name, domain) for name in wanted]
    names = {layer: name for name, layer in by_layer_name(exported.counts, baseline.layers).items()}
    if missing := [name for name in wanted if name not in names]:
        raise EvaluationError(
            f"the export has no counts of {len(missing)} of {len(wanted)} layers ({missing[0]}, ...). Export every "
            "MoE layer, or name those to judge with --layer."
        )
    after = [_statistics(layer, exported.counts[names[layer.name]]) for layer in before]
    for old, new in zip(before, after, strict=True):
        _require_enough(old, "the baseline", min_per_expert)
        _require_enough(new, "the export", min_per_expert)
    return Monitoring(compare_layers(before, after), tuple(exported.notes))


def _statistics(baseline: LayerStatistics, counts: dict[int, int]) -> LayerStatistics:
    if (largest := max(counts)) >= baseline.num_experts:
        raise EvaluationError(
            f"layer {baseline.name!r} of the export has an expert {largest}; the baseline has {baseline.num_experts} "
            "experts. Record a baseline of the model that is served."
        )
    totals = torch.zeros(baseline.num_experts, dtype=torch.int64)
    totals[list(counts)] = torch.tensor(list(counts.values()))
    nothing = empty_statistics(baseline.name, baseline.num_experts, baseline.top_k, coactivation=False)
    # null experts and dropped slots are not exported: a lower bound
    return replace(nothing, counts=totals, tokens=int(totals.sum()) // baseline.top_k)


def _require_enough(layer: LayerStatistics, origin: str, min_per_expert: float) -> None:
    needed = min_per_expert * layer.num_experts
    if (seen := int(layer.counts.sum())) < needed:
        raise EvaluationError(
            f"{origin} has {seen:,} assignments in layer {layer.name!r}; {needed:,.0f} are needed to judge "
            f"{layer.num_experts} experts ({min_per_expert:g} each). Take a longer window."
        )
