"""Judge the health of a routing from the statistics of each layer: a verdict in plain words.

Each layer is judged on its own: eight layers that each send every token to an expert of their own have a perfect load
when the layers are pooled, and transformers' balancing loss pools them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from hf_moe.observability.layer_statistics import LayerStatistics

Verdict = Literal[
    "invalid",
    "collapsed",
    "one_takes_most",
    "collapsing",
    "dead_experts",
    "no_gradient",
    "dropping",
    "unknown",
    "healthy",
]
# assignments: an expert that gets a thirtieth of the mean load still appears with 95 % probability
ENOUGH_PER_EXPERT = 100
# a collapse is seen with fewer
ENOUGH_FOR_COLLAPSE = 2
# share of the experts beyond top_k that are in effect used: below, a layer has collapsed
COLLAPSED = 0.1
# share of the tokens that choose one expert, and how many times its even share that must be
MOST_TOKENS, TIMES_EVEN = 0.75, 3.0
# how far the share of experts in use must fall over the history, and how steadily (Kendall's tau)
FALL, STEADINESS, SHORTEST_HISTORY = 0.15, -0.6, 4
MOST_DROPPED = 0.1
# share of an even load below which an expert is rarely chosen: reported without a verdict (it may serve other text)
RARELY = 1 / 8


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one layer.

    Attributes:
        layer: The layer's name.
        kind: The verdict that it leads to.
        message: What was seen, in numbers, and the likely cause.
    """

    layer: str
    kind: Verdict
    message: str


@dataclass(frozen=True)
class Health:
    """Result of `diagnose`; `str()` is the verdict and the findings in words.

    Attributes:
        verdict: The gravest kind of the findings; `unknown` if a layer saw too few tokens to judge; else `healthy`.
        pattern: Where layers collapsed: `same_expert` (all layers, onto the expert of the same number),
            `own_expert` (all layers, each onto an expert of its own, which a loss pooled over the layers calls
            balanced), `some_layers`; else None.
        findings: Gravest first.
        rarely_chosen: Ids by the layer's name, where the routing is healthy and experts get less than `RARELY` of an
            even load. No fault: such an expert may serve other text.
    """

    verdict: Verdict
    pattern: Literal["same_expert", "own_expert", "some_layers"] | None
    findings: tuple[Finding, ...]
    rarely_chosen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        return self.verdict == "healthy"

    def __str__(self) -> str:
        lines = [_SUMMARY[self.verdict], *(f"{each.layer}: {each.message}" for each in self.findings), self.note()]
        return "\n".join(filter(None, lines))

    def note(self, labels: Mapping[str, str] | None = None) -> str:
        """One sentence about the experts that are rarely chosen, or nothing.

        Args:
            labels: Shorter names of the layers.
        """
        if not self.rarely_chosen:
            return ""
        name, ids = max(self.rarely_chosen.items(), key=lambda item: len(item[1]))
        others = len(self.rarely_chosen) - 1
        more = f", and some of {others} more layer{'s' if others > 1 else ''}" if others else ""
        label = (labels or {}).get(name, name)
        return (
            f"Rarely chosen in this text, with less than an eighth of an even load: {len(ids)} expert"
            f"{'s' if len(ids) > 1 else ''} of {label} ({_listed(ids)}){more}."
        )


_SUMMARY: dict[Verdict, str] = {
    "invalid": "Router outputs are not finite: the weights are damaged or training has diverged.",
    "collapsed": "The router has collapsed: nearly all tokens go to the same few experts.",
    "one_takes_most": "One expert takes most tokens.",
    "collapsing": "The router is collapsing: fewer and fewer experts are in use.",
    "dead_experts": "Some experts are dead: no token chooses them.",
    "no_gradient": "The router learns nothing from the task: its weights are constant.",
    "dropping": "Many assignments are dropped over the experts' capacity.",
    "unknown": "Too few tokens to judge.",
    "healthy": "Routing is healthy: no layer has collapsed, and every expert is chosen.",
}
_GRAVITY = list(_SUMMARY)


def diagnose(layers: Sequence[LayerStatistics], history: Sequence[Sequence[LayerStatistics]] = ()) -> Health:
    """Judge the routing of every layer.

    Args:
        layers: The latest statistics.
        history: Earlier ones of the same layers over equal spans of training, oldest first: a fall is seen from
            `SHORTEST_HISTORY` points on, the latest included.

    Raises:
        ValueError: If there is no layer, or the history is of other layers.
    """
    if not layers:
        raise ValueError("there is no layer to judge. Record the routing of a Mixture-of-Experts model.")
    names = [layer.name for layer in layers]
    if any([layer.name for layer in point] != names for point in history):
        raise ValueError("the history must hold the same layers in the same order as the latest statistics.")
    findings = []
    for position, layer in enumerate(layers):
        findings += _judge(layer, [point[position] for point in history])
    findings.sort(key=lambda finding: _GRAVITY.index(finding.kind))
    verdict = findings[0].kind if findings else "healthy"
    return Health(verdict, _pattern(layers, findings), tuple(findings), {} if findings else _rarely_chosen(layers))


def enough_tokens(layer: LayerStatistics) -> bool:
    """Whether a layer has seen enough tokens to call an expert dead."""
    return float(layer.counts.sum()) >= ENOUGH_PER_EXPERT * layer.num_experts


def experts_in_use(layer: LayerStatistics) -> float:
    """Effective number of experts: the exponential of the load's entropy, from about `top_k` to `num_experts`."""
    load = layer.load
    return math.exp(float(-(load * load.clamp_min(1e-300).log()).sum())) if load.any() else math.nan


def spread(layer: LayerStatistics) -> float:
    """Share of the experts beyond `top_k` that are in effect used: 0 is collapsed, 1 balanced."""
    spare = layer.num_experts - layer.top_k
    return 1.0 if spare <= 0 else (experts_in_use(layer) - layer.top_k) / spare


def _judge(layer: LayerStatistics, history: list[LayerStatistics]) -> list[Finding]:
    """Findings of one layer; a collapse explains dead experts and a fall, which are then left out."""
    if not (bool(layer.weight_mass.isfinite().all()) and math.isfinite(layer.entropy_sum)):
        text = "router weights are NaN or infinite. Go back to an earlier checkpoint."
        return [Finding(layer.name, "invalid", text)]
    per_expert = float(layer.counts.sum()) / layer.num_experts
    concentrated = (_collapsed(layer) or _one_takes_most(layer)) if per_expert >= ENOUGH_FOR_COLLAPSE else None
    if concentrated is None and not enough_tokens(layer):
        needed = math.ceil(ENOUGH_PER_EXPERT * layer.num_experts / layer.top_k)
        return [Finding(layer.name, "unknown", f"{layer.tokens:,} tokens were seen; about {needed:,} are needed.")]
    found = [concentrated] if concentrated else [_collapsing(layer, history), _dead(layer)]
    return [finding for finding in (*found, _no_gradient(layer), _dropping(layer)) if finding is not None]


def _collapsed(layer: LayerStatistics) -> Finding | None:
    if spread(layer) >= COLLAPSED:
        return None
    busiest = layer.counts.topk(layer.top_k).indices.tolist()
    text = (
        f"{experts_in_use(layer):.1f} of {layer.num_experts} experts are in effect used (top {layer.top_k}; busiest: "
        f"{_listed(busiest)}). Likely cause: no balancing loss or bias update, or a loss that pools layers."
    )
    return Finding(layer.name, "collapsed", text)


def _one_takes_most(layer: LayerStatistics) -> Finding | None:
    chosen_by = int(layer.counts.max()) / layer.tokens
    even = layer.top_k / layer.num_experts
    if chosen_by < max(MOST_TOKENS, TIMES_EVEN * even):
        return None
    text = (
        f"expert {layer.busiest_expert} is chosen by {chosen_by:.0%} of the tokens (even: {even:.0%}). Likely cause: "
        "too weak a balancing loss, or a bias that runs away."
    )
    return Finding(layer.name, "one_takes_most", text)


def _collapsing(layer: LayerStatistics, history: list[LayerStatistics]) -> Finding | None:
    shares = [spread(point) for point in (*history, layer) if point.counts.any()]
    if len(shares) < SHORTEST_HISTORY:
        return None
    third = max(len(shares) // 3, 1)
    before, now = fmean(shares[:third]), fmean(shares[-third:])
    if before - now < FALL or _kendall(shares) > STEADINESS:
        return None
    first = layer.top_k + before * (layer.num_experts - layer.top_k)
    text = (
        f"experts in effect used fell from {first:.1f} to {experts_in_use(layer):.1f} of {layer.num_experts}. Likely "
        "cause: too weak a balancing loss, or too high a learning rate for the router."
    )
    return Finding(layer.name, "collapsing", text)


def _dead(layer: LayerStatistics) -> Finding | None:
    if not layer.dead_experts:
        return None
    text = (
        f"{len(layer.dead_experts)} of {layer.num_experts} experts got none of {layer.tokens:,} tokens: "
        f"{_listed(layer.dead_experts)}. Likely cause: they fell behind early, or the text is of one narrow domain."
    )
    return Finding(layer.name, "dead_experts", text)


def _no_gradient(layer: LayerStatistics) -> Finding | None:
    """With one expert per token, normalised weights are all the same number."""
    used = layer.counts > 0
    mean_weight = layer.weight_mass[used] / layer.counts[used]
    if layer.top_k != 1 or layer.num_experts == 1 or not bool((mean_weight == mean_weight[0]).all()):
        return None
    text = (
        f"every token's one weight is {float(mean_weight[0]):g}: the task's loss gives the router no gradient. Set "
        "norm_topk_prob=False, or choose more experts per token."
    )
    return Finding(layer.name, "no_gradient", text)


def _dropping(layer: LayerStatistics) -> Finding | None:
    if not layer.drop_share > MOST_DROPPED:  # nor where it is unknown
        return None
    text = f"{layer.drop_share:.0%} of the assignments are dropped. Raise capacity_factor."
    return Finding(layer.name, "dropping", text)


def _pattern(
    layers: Sequence[LayerStatistics], findings: Sequence[Finding]
) -> Literal["same_expert", "own_expert", "some_layers"] | None:
    collapsed = {finding.layer for finding in findings if finding.kind == "collapsed"}
    if not collapsed:
        return None
    if len(collapsed) < len(layers):
        return "some_layers"
    onto = {frozenset(layer.counts.topk(layer.top_k).indices.tolist()) for layer in layers}
    return "same_expert" if len(onto) == 1 else "own_expert"


def _kendall(values: Sequence[float]) -> float:
    """Kendall's tau of values against their order: -1 falls at every step, 1 rises at every step."""
    pairs = [(one, two) for i, one in enumerate(values) for two in values[i + 1 :]]
    return sum((two > one) - (two < one) for one, two in pairs) / len(pairs)


def _rarely_chosen(layers: Sequence[LayerStatistics]) -> dict[str, tuple[int, ...]]:
    rare = {
        layer.name: tuple((layer.load * layer.num_experts < RARELY).nonzero().flatten().tolist()) for layer in layers
    }
    return {name: ids for name, ids in rare.items() if ids}


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
