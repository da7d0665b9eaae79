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
from hf_moe.observability.report.text import plural, short_labels

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
        message: What was seen, in numbers.
    """

    layer: str
    kind: Verdict
    message: str


@dataclass(frozen=True)
class Kind:
    """What all findings of one kind have in common.

    Attributes:
        title: Two or three words.
        summary: The verdict as a sentence.
        cause: The likely cause; empty where the finding says it all.
        advice: What to do.
    """

    title: str
    summary: str
    cause: str
    advice: str


KINDS: dict[Verdict, Kind] = {
    "invalid": Kind(
        "Router weights are not finite",
        "Router outputs are not finite: the weights are damaged or training has diverged.",
        "",
        "Go back to the last checkpoint whose weights are finite; clip gradients or lower the learning rate.",
    ),
    "collapsed": Kind(
        "Collapsed",
        "The router has collapsed: nearly all tokens go to the same few experts.",
        "no balancing loss or bias update, or a loss that pools layers.",
        "Go back to a checkpoint before the collapse and train with a balancing loss per layer or a bias update.",
    ),
    "one_takes_most": Kind(
        "One expert takes most tokens",
        "One expert takes most tokens.",
        "too weak a balancing loss, or a bias that runs away.",
        "Strengthen the balancing of these layers; with a bias update, lower its rate.",
    ),
    "collapsing": Kind(
        "Collapsing",
        "The router is collapsing: fewer and fewer experts are in use.",
        "too weak a balancing loss, or too high a learning rate for the router.",
        "Strengthen the balancing now, or lower the router's learning rate: a collapse is hard to undo.",
    ),
    "dead_experts": Kind(
        "Dead experts",
        "Some experts are dead: no token chooses them.",
        "they fell behind early, or the text is of one narrow domain.",
        "Trace more and more varied text first. Experts that stay dead cost memory and add nothing: train on with "
        "balancing, or prune them.",
    ),
    "no_gradient": Kind(
        "The router learns nothing",
        "The router learns nothing from the task: its weights are constant.",
        "one expert for each token, with weights that are normalised to 1.",
        "Set norm_topk_prob=False, or choose more than one expert per token.",
    ),
    "dropping": Kind(
        "Dropped assignments",
        "Many assignments are dropped over the experts' capacity.",
        "",
        "Raise capacity_factor, or balance the load.",
    ),
    "unknown": Kind("Too few tokens to judge", "Too few tokens to judge.", "", "Trace more text."),
    "healthy": Kind("Healthy", "Routing is healthy: no layer has collapsed, and every expert is chosen.", "", ""),
}
_GRAVITY = list(KINDS)
_PATTERNS = {
    "same_expert": "All layers collapsed onto the expert of the same number.",
    "own_expert": "Every layer collapsed onto an expert of its own. Pooled over the layers this looks balanced, so a "
    "balancing loss that pools them sees nothing.",
    "some_layers": "Some layers collapsed, others did not.",
}


@dataclass(frozen=True)
class Health:
    """Result of `diagnose`; `str()` is the verdict and the findings in words, grouped by kind.

    Attributes:
        verdict: The gravest kind of the findings; `unknown` if a layer saw too few tokens to judge; else `healthy`.
        pattern: Where layers collapsed: `same_expert` (all layers, onto the expert of the same number),
            `own_expert` (all layers, each onto an expert of its own, which a loss pooled over the layers calls
            balanced), `some_layers`; else None.
        findings: Gravest first; of one kind, the worst layer first.
        rarely_chosen: Ids by the layer's name, where the routing is healthy and experts get less than `RARELY` of an
            even load. No fault: such an expert may serve other text.
        labels: Short labels by the names of all layers that were judged.
        tokens: Tokens that the layers saw.
    """

    verdict: Verdict
    pattern: Literal["same_expert", "own_expert", "some_layers"] | None
    findings: tuple[Finding, ...]
    rarely_chosen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0

    @property
    def healthy(self) -> bool:
        return self.verdict == "healthy"

    @property
    def summary(self) -> str:
        """The verdict as one sentence."""
        return KINDS[self.verdict].summary

    @property
    def groups(self) -> dict[Verdict, list[Finding]]:
        """Findings by kind, gravest first."""
        found: dict[Verdict, list[Finding]] = {}
        for finding in self.findings:
            found.setdefault(finding.kind, []).append(finding)
        return found

    def __str__(self) -> str:
        return "\n".join([self.summary, *self.details()])

    def details(self) -> list[str]:
        """Everything but the verdict, one paragraph each: the pattern, each kind of finding, the note."""
        groups = [self._told(kind, found) for kind, found in self.groups.items()]
        return [each for each in (self.pattern_words(), *groups, self.note()) if each]

    def pattern_words(self) -> str:
        """Where layers collapsed, as a sentence, or nothing."""
        return _PATTERNS.get(self.pattern or "", "")

    def note(self) -> str:
        """Sentences about the experts that are rarely chosen, or nothing."""
        if not self.rarely_chosen:
            return ""
        name, ids = max(self.rarely_chosen.items(), key=lambda item: len(item[1]))
        others = len(self.rarely_chosen) - 1
        more = f", and some of {plural(others, 'more layer')}" if others else ""
        return (
            f"Rarely chosen (less than an eighth of an even load) in these {self.tokens:,} tokens: "
            f"{plural(len(ids), 'expert')} of {self.label(name)} ({_listed(ids)}){more}. They may serve other text."
        )

    def label(self, layer: str) -> str:
        return self.labels.get(layer, layer)

    def where(self, count: int) -> str:
        """44 -> "44 of 48 layers"; all of them -> "all 48 layers"."""
        every = plural(len(self.labels), "layer")
        if not self.labels or every == "1 layer":
            return plural(count, "layer")
        return f"all {every}" if count == len(self.labels) else f"{count} of {every}"

    def _told(self, kind: Verdict, found: Sequence[Finding]) -> str:
        if len(found) > 1 and len({each.message for each in found}) == 1:
            told_once = f"{KINDS[kind].title} in {self.where(len(found))}: {found[0].message}"
            return "\n".join([told_once, *self._advice(kind)])
        told = found[: told_one_by_one(len(found))]
        order = ", worst first" if len(told) < len(found) else ""
        lines = [f"{KINDS[kind].title} in {self.where(len(found))}{order}:"]
        lines += [f"  {self.label(each.layer)}: {each.message}" for each in told]
        lines += [f"  and {plural(len(found) - len(told), 'more layer')}."] if order else []
        return "\n".join([*lines, *self._advice(kind)])

    def _advice(self, kind: Verdict) -> list[str]:
        cause = [f"Likely cause: {KINDS[kind].cause}"] if KINDS[kind].cause else []
        return [*cause, f"What to do: {KINDS[kind].advice}"]


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
    found = [
        (finding, layer)
        for position, layer in enumerate(layers)
        for finding in _judge(layer, [point[position] for point in history])
    ]
    found.sort(key=lambda pair: (_GRAVITY.index(pair[0].kind), -_severity(*pair)))
    findings = tuple(finding for finding, _ in found)
    return Health(
        findings[0].kind if findings else "healthy",
        _pattern(layers, findings),
        findings,
        {} if findings else {layer.name: ids for layer in layers if (ids := rarely_chosen(layer))},
        dict(zip(names, short_labels(names), strict=True)),
        max(layer.tokens for layer in layers),
    )


def told_one_by_one(findings: int) -> int:
    """How many findings of one kind are told one by one: all of a few, of more the worst."""
    return findings if findings <= 4 else 3


def enough_tokens(layer: LayerStatistics) -> bool:
    """Whether a layer has seen enough tokens to call an expert dead."""
    return float(layer.counts.sum()) >= ENOUGH_PER_EXPERT * layer.num_experts


def rarely_chosen(layer: LayerStatistics) -> tuple[int, ...]:
    """Ids of the experts that are chosen, but for less than `RARELY` of an even load. One never chosen is dead."""
    times_even = layer.load * layer.num_experts
    return tuple(((times_even > 0) & (times_even < RARELY)).nonzero().flatten().tolist())


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
        return [Finding(layer.name, "invalid", "router weights are NaN or infinite.")]
    per_expert = float(layer.counts.sum()) / layer.num_experts
    concentrated = (_collapsed(layer) or _one_takes_most(layer)) if per_expert >= ENOUGH_FOR_COLLAPSE else None
    if concentrated is None and not enough_tokens(layer):
        needed = math.ceil(ENOUGH_PER_EXPERT * layer.num_experts / layer.top_k)
        return [Finding(layer.name, "unknown", f"{layer.tokens:,} tokens were seen; about {needed:,} are needed.")]
    found = [concentrated] if concentrated else [_collapsing(layer, history), _dead(layer)]
    return [finding for finding in (*found, _no_gradient(layer), _dropping(layer)) if finding is not None]


def _severity(finding: Finding, layer: LayerStatistics) -> float:
    """Order among the findings of one kind, the worst largest."""
    if finding.kind == "dead_experts":
        return len(layer.dead_experts) / layer.num_experts
    return layer.drop_share if finding.kind == "dropping" else layer.max_violation if layer.counts.any() else 0.0


def _collapsed(layer: LayerStatistics) -> Finding | None:
    if spread(layer) >= COLLAPSED:
        return None
    busiest = layer.counts.topk(layer.top_k).indices.tolist()
    text = (
        f"{experts_in_use(layer):.1f} of {layer.num_experts} experts are in effect used (top {layer.top_k}; busiest: "
        f"{_listed(busiest)})."
    )
    return Finding(layer.name, "collapsed", text)


def _one_takes_most(layer: LayerStatistics) -> Finding | None:
    chosen_by = int(layer.counts.max()) / layer.tokens
    even = layer.top_k / layer.num_experts
    if chosen_by < max(MOST_TOKENS, TIMES_EVEN * even):
        return None
    text = f"expert {layer.busiest_expert} is chosen by {chosen_by:.0%} of the tokens (even: {even:.0%})."
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
    text = f"experts in effect used fell from {first:.1f} to {experts_in_use(layer):.1f} of {layer.num_experts}."
    return Finding(layer.name, "collapsing", text)


def _dead(layer: LayerStatistics) -> Finding | None:
    if not layer.dead_experts:
        return None
    text = (
        f"{len(layer.dead_experts)} of {layer.num_experts} experts got none of {layer.tokens:,} tokens: "
        f"{_listed(layer.dead_experts)}."
    )
    return Finding(layer.name, "dead_experts", text)


def _no_gradient(layer: LayerStatistics) -> Finding | None:
    """With one expert per token, normalised weights are all the same number."""
    used = layer.counts > 0
    mean_weight = layer.weight_mass[used] / layer.counts[used]
    if layer.top_k != 1 or layer.num_experts == 1 or not bool((mean_weight == mean_weight[0]).all()):
        return None
    text = f"every token's one weight is {float(mean_weight[0]):g}: the task's loss gives the router no gradient."
    return Finding(layer.name, "no_gradient", text)


def _dropping(layer: LayerStatistics) -> Finding | None:
    if not layer.drop_share > MOST_DROPPED:  # nor where it is unknown
        return None
    text = f"{layer.drop_share:.0%} of the assignments are dropped."
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


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
