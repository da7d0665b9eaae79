"""Routing of two models, layer by layer; the two may differ in their number of experts.

Shape suffixes: T tokens, K slots per token (J in the other model), E experts.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_moe.io.old_names import renamed_method
from hf_moe.observability.layer_statistics import LayerStatistics, jensen_shannon
from hf_moe.observability.routing_trace import RoutingTrace
from hf_moe.observability.thresholds import MetricValue, json_number
from hf_moe.observability.token_table import LayerTokens

_CHUNK = 65_536  # tokens compared at a time


@dataclass(frozen=True)
class LayerComparison:
    """One layer of two models on the same texts. Where experts differ in number, what compares them singly is None.

    Attributes:
        agreement: Share of the tokens that chose the same set of experts; None unless both numbers of experts and
            slots are the same and both models read the same tokens.
        overlap: Mean share of a token's experts that both chose, of the smaller choice; None as for `agreement`, but
            the numbers of slots may differ.
    """

    base: LayerStatistics
    new: LayerStatistics
    agreement: float | None = None
    overlap: float | None = None

    @property
    def name(self) -> str:
        return self.new.name

    @property
    def has_same_experts(self) -> bool:
        return self.base.num_experts == self.new.num_experts

    @property
    def load_shift(self) -> float | None:
        """Jensen-Shannon divergence of the two loads in bits: 0 is the same load, 1 no expert in common."""
        if not self.has_same_experts or not self.base.counts.any() or not self.new.counts.any():
            return None
        return jensen_shannon(self.base.load, self.new.load)

    @property
    def load_shift_by_chance(self) -> float | None:
        """The load shift in bits that two samples of this size have on average where nothing has changed."""
        counts = [int(side.counts.sum()) for side in (self.base, self.new)]
        if not self.has_same_experts or not all(counts):
            return None
        in_use = int(((self.base.counts + self.new.counts) > 0).sum())
        return min((in_use - 1) / (8 * math.log(2)) * sum(1 / count for count in counts), 1.0)

    @property
    def newly_dead(self) -> tuple[int, ...] | None:
        """Experts that tokens chose in the base and none in the new model."""
        return self._gone(self.base, self.new)

    @property
    def revived(self) -> tuple[int, ...] | None:
        """Experts that no token chose in the base and some in the new model."""
        return self._gone(self.new, self.base)

    def _gone(self, one: LayerStatistics, two: LayerStatistics) -> tuple[int, ...] | None:
        return tuple(sorted(set(two.dead_experts) - set(one.dead_experts))) if self.has_same_experts else None

    @property
    def entropy_change(self) -> float | None:
        """New minus base of the mean router entropy (0 to 1); None where a router's probabilities are unknown."""
        return _change(self.base.router_entropy, self.new.router_entropy)

    @property
    def margin_change(self) -> float | None:
        return _change(self.base.margin, self.new.margin)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, the metrics of each of the two models included."""
        return {
            "name": self.name,
            "agreement": self.agreement,
            "overlap": self.overlap,
            "load_shift": self.load_shift,
            "load_shift_by_chance": self.load_shift_by_chance,
            "newly_dead": _listed(self.newly_dead),
            "revived": _listed(self.revived),
            "router_entropy_change": self.entropy_change,
            "margin_change": self.margin_change,
            "base": side_dict(self.base),
            "new": side_dict(self.new),
        }


@dataclass(frozen=True)
class RoutingComparison:
    """Differences between two routings of the same texts.

    Attributes:
        layers: In the order of the new model.
        left_out: What could not be compared, and why; one sentence each.
    """

    layers: tuple[LayerComparison, ...]
    left_out: tuple[str, ...] = ()

    def metrics(self) -> dict[str, MetricValue]:
        """Metrics that `RoutingThresholds` can bound, by their names in
        `hf_moe.observability.threshold_metrics.METRICS`."""
        why = " ".join(self.left_out) or "no layer has it"
        dead = {layer.name: len(layer.new.dead_experts) for layer in self.layers}
        found = {
            **_spread("agreement", self._of(lambda layer: layer.agreement), min, why),
            **_spread("overlap", self._of(lambda layer: layer.overlap), min, why),
            **_spread("load_shift", self._of(lambda layer: layer.load_shift), max, why),
            "dead_experts": MetricValue(float(sum(dead.values())), _places(dead)),
            "newly_dead_experts": self._total(lambda layer: layer.newly_dead, why),
            "revived_experts": self._total(lambda layer: layer.revived, why),
            "load_cv.max": _worst(self._of(lambda layer: layer.new.load_cv), max, why),
            "max_violation.max": _worst(self._of(lambda layer: layer.new.max_violation), max, why),
            "load_entropy.min": _worst(self._of(lambda layer: layer.new.load_entropy), min, why),
        }
        unscored = "a router's probabilities are not known"
        for name, values in (
            ("router_entropy_change", self._of(lambda layer: layer.entropy_change)),
            ("margin_change", self._of(lambda layer: layer.margin_change)),
        ):
            found[f"{name}.min"] = _worst(values, min, unscored)
            found[f"{name}.max"] = _worst(values, max, unscored)
        return found

    figures = renamed_method("figures", "metrics")

    def to_dict(self) -> dict[str, Any]:
        return {"layers": [layer.to_dict() for layer in self.layers], "left_out": list(self.left_out)}

    def _of(self, read: Callable[[LayerComparison], float | None]) -> dict[str, float | None]:
        return {layer.name: read(layer) for layer in self.layers}

    def _total(self, read: Callable[[LayerComparison], tuple[int, ...] | None], why: str) -> MetricValue:
        found = {layer.name: read(layer) for layer in self.layers}
        counts = {name: len(experts) for name, experts in found.items() if experts is not None}
        if len(counts) < len(found):
            return MetricValue(None, why)
        return MetricValue(float(sum(counts.values())), _places(counts))


def compare_layers(
    base: Sequence[LayerStatistics],
    new: Sequence[LayerStatistics],
    base_choices: Mapping[str, Tensor] | None = None,
    new_choices: Mapping[str, Tensor] | None = None,
) -> RoutingComparison:
    """Compare the statistics of two models' layers on the same texts.

    Args:
        base, new: In the models' order. Layers are paired by name; by position where the names differ and the numbers
            of layers do not.
        base_choices, new_choices: By layer name int64 `[T, K]`, the experts of every token in the same order; ids of
            `num_experts` and above are slots without an expert. None where the two did not read the same tokens.

    Raises:
        ValueError: If no layer can be paired, or the choices hold different numbers of tokens.
    """
    pairs, left_out = _pair(base, new)
    layers = []
    for one, two in pairs:
        choices = None
        if base_choices is not None and new_choices is not None:
            choices = (base_choices[one.name], new_choices[two.name])
        layers.append(_compare(one, two, choices))
    return RoutingComparison(tuple(layers), (*left_out, *_inapplicable(layers)))


def compare_traces(base: RoutingTrace, new: RoutingTrace) -> dict[str | None, RoutingComparison]:
    """Compare two traces of the same texts: by each domain that both have, and under None all their tokens.

    Agreement and overlap need traces of single tokens (`detail="tokens"`) that hold the same token ids in the same
    order; `left_out` says where that is not so.

    Raises:
        ValueError: If no layer can be paired.
    """
    pairs, _ = _pair(*([trace.statistics(name) for name in trace.layers] for trace in (base, new)))
    domains: list[str | None] = [None, *(name for name in base.domains if name in new.domains)]
    choices = _Choices(base, new, domains)
    for one, two in pairs:
        choices.read(one, two)
    found: dict[str | None, RoutingComparison] = {}
    for domain in domains:
        sides = [[trace.statistics(name, domain) for name in trace.layers] for trace in (base, new)]
        paired, left_out = _pair(*sides)
        layers = [LayerComparison(one, two, *choices.agreement(domain, two.name)) for one, two in paired]
        found[domain] = RoutingComparison(
            tuple(layers), (*left_out, *_inapplicable(layers), *choices.left_out(domain))
        )
    return found


class _Choices:
    """Agreement by domain and layer from two tables of tokens, one layer in memory at a time."""

    def __init__(self, base: RoutingTrace, new: RoutingTrace, domains: Sequence[str | None]):
        self.base, self.new, self.domains = base.tokens, new.tokens, domains
        self.found: dict[tuple[str | None, str], tuple[float | None, float]] = {}
        self.reasons: dict[str | None, str] = {}
        if self.base is None or self.new is None:
            self.reasons = dict.fromkeys(domains, "a trace holds counts alone (record it with detail='tokens')")
        elif self.base.is_audit or self.new.is_audit:
            self.reasons = dict.fromkeys(domains, "a trace without token ids (an audit) does not tell its tokens")

    def read(self, base: LayerStatistics, new: LayerStatistics) -> None:
        if base.num_experts != new.num_experts or len(self.reasons) == len(self.domains):
            return
        assert self.base is not None
        assert self.new is not None
        one, two = self.base.layer(base.name), self.new.layer(new.name)
        for domain in self.domains:
            if domain in self.reasons:
                continue
            mine, its = (slice(None) if domain is None else side.domain == domain for side in (one, two))
            if not _same_tokens(one, two, mine, its):
                self.reasons[domain] = "the two models did not read the same tokens (their tokenizers differ)"
                continue
            index = [torch.from_numpy(ids.astype("int64")) for ids in (one.experts[mine], two.experts[its])]
            if len(index[0]):
                self.found[domain, new.name] = choice_agreement(index[0], index[1], base.num_experts)

    def agreement(self, domain: str | None, layer: str) -> tuple[float | None, float | None]:
        return (None, None) if domain in self.reasons else self.found.get((domain, layer), (None, None))

    def left_out(self, domain: str | None) -> list[str]:
        reason = self.reasons.get(domain)
        return [] if reason is None else [f"Agreement and overlap are left out: {reason}."]


def _same_tokens(one: LayerTokens, two: LayerTokens, mine: Any, its: Any) -> bool:
    if one.token_id is None or two.token_id is None:
        return False
    return all(
        np.array_equal(ours[mine], theirs[its])
        for ours, theirs in ((one.token_id, two.token_id), (one.position, two.position))
    )


def choice_agreement(base_TK: Tensor, new_TJ: Tensor, num_experts: int) -> tuple[float | None, float]:
    """Share of the tokens with the same set of experts (None if the numbers of slots differ), and the mean overlap.

    Raises:
        ValueError: If the numbers of tokens differ, or there is none.
    """
    if len(base_TK) != len(new_TJ) or not len(base_TK):
        raise ValueError(
            f"the choices must be of the same tokens, got {len(base_TK)} and {len(new_TJ)}. Record both models on the "
            "same texts with one tokenizer."
        )
    same, shared = 0, 0.0
    for one_TK, two_TJ in zip(base_TK.split(_CHUNK), new_TJ.split(_CHUNK), strict=True):
        one_TE, two_TE = (_membership(part, num_experts) for part in (one_TK, two_TJ))
        same += int((one_TE == two_TE).all(-1).sum())
        common, smaller = (one_TE & two_TE).sum(-1), torch.minimum(one_TE.sum(-1), two_TE.sum(-1))
        is_empty = ~one_TE.any(-1) & ~two_TE.any(-1)
        shared += float(torch.where(is_empty, 1.0, common / smaller.clamp_min(1)).double().sum())
    agreement = same / len(base_TK) if base_TK.shape[1] == new_TJ.shape[1] else None
    return agreement, shared / len(base_TK)


def _membership(index_TK: Tensor, num_experts: int) -> Tensor:
    """`[T, E]` bool: which experts a token chose."""
    chosen = torch.zeros(len(index_TK), num_experts + 1, dtype=torch.bool)
    return chosen.scatter_(1, index_TK.long().clamp_max(num_experts), True)[:, :num_experts]


def _pair(
    base: Sequence[LayerStatistics], new: Sequence[LayerStatistics]
) -> tuple[list[tuple[LayerStatistics, LayerStatistics]], list[str]]:
    by_name = {layer.name: layer for layer in base}
    pairs = [(by_name[layer.name], layer) for layer in new if layer.name in by_name]
    if len(pairs) == len(base) == len(new):
        return pairs, []
    if len(base) == len(new):
        return list(zip(base, new, strict=True)), ["The layers have other names: they are paired in their order."]
    if not pairs:
        raise ValueError(
            f"the two models have {len(base)} and {len(new)} MoE layers and no layer name in common: there is nothing "
            "to compare. Compare models of one architecture."
        )
    names = {layer.name for layer in new}
    alone = [layer.name for layer in base if layer.name not in names]
    extra = [layer.name for layer in new if layer.name not in by_name]
    sides = ((alone, "base"), (extra, "new model"))
    return pairs, [f"Only the {side} has {_names(only)}: left out." for only, side in sides if only]


def _compare(base: LayerStatistics, new: LayerStatistics, choices: tuple[Tensor, Tensor] | None) -> LayerComparison:
    if choices is None or base.num_experts != new.num_experts or not len(choices[0]):
        return LayerComparison(base, new)
    agreement, overlap = choice_agreement(*choices, num_experts=base.num_experts)
    return LayerComparison(base, new, agreement, overlap)


def _inapplicable(layers: Sequence[LayerComparison]) -> list[str]:
    found = []
    if other := [layer for layer in layers if not layer.has_same_experts]:
        counts = f"{other[0].base.num_experts} and {other[0].new.num_experts}"
        found.append(
            f"The number of experts differs ({counts}) in {_names([layer.name for layer in other])}: an expert's "
            "number means another expert there, so agreement, overlap, load shift, newly dead and revived experts do "
            "not apply."
        )
    if other := [layer for layer in layers if layer.has_same_experts and layer.base.top_k != layer.new.top_k]:
        counts = f"{other[0].base.top_k} and {other[0].new.top_k}"
        found.append(
            f"The number of experts per token differs ({counts}) in {_names([layer.name for layer in other])}: "
            "agreement does not apply; overlap is of the smaller choice."
        )
    if silent := [layer.name for layer in layers if not layer.base.counts.any() or not layer.new.counts.any()]:
        found.append(f"No token chose an expert in {_names(silent)}: the load shift does not apply.")
    return found


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more layers" if len(names) > 3 else "")


def _spread(name: str, values: Mapping[str, float | None], worst: Callable, why: str) -> dict[str, MetricValue]:
    known = [value for value in values.values() if value is not None]
    mean = MetricValue(sum(known) / len(known)) if known and len(known) == len(values) else MetricValue(None, why)
    return {f"{name}.{worst.__name__}": _worst(values, worst, why), f"{name}.mean": mean}


def _worst(values: Mapping[str, float | None], worst: Callable[..., Any], why: str) -> MetricValue:
    """The worst layer's; unmeasured if one layer has none, so that no threshold passes over it."""
    known = {name: value for name, value in values.items() if value is not None and not math.isnan(value)}
    if not known or len(known) < len(values):
        return MetricValue(None, why)
    name = worst(known, key=lambda layer: known[layer])
    return MetricValue(known[name], name)


def _places(counts: Mapping[str, int]) -> str:
    return _names([f"{count} in {name}" for name, count in counts.items() if count])


def _change(before: float, after: float) -> float | None:
    return None if math.isnan(before) or math.isnan(after) else after - before


def _listed(experts: Iterable[int] | None) -> list[int] | None:
    return None if experts is None else list(experts)


def side_dict(layer: LayerStatistics) -> dict[str, Any]:
    """One model's metrics of a layer as JSON values."""
    names = ("load_cv", "max_violation", "load_entropy", "router_entropy", "margin", "empty_share")
    return {
        "layer": layer.name,
        "experts": layer.num_experts,
        "top_k": layer.top_k,
        "tokens": layer.tokens,
        "dead": list(layer.dead_experts),
        "load": [round(share, 6) for share in layer.load.tolist()],
        **{name: None if math.isnan(value := getattr(layer, name)) else json_number(float(value)) for name in names},
    }
