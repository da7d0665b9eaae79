"""The part of a card on routing: health, balance by layer, agreement with the base."""

from collections.abc import Sequence

from hf_moe.hub.cards.markdown import NOT_MEASURED, cell, details, image, table
from hf_moe.hub.cards.routing_facts import RoutingFacts
from hf_moe.hub.cards.training_facts import TrainingFacts

_AGREEMENT_NOTE = (
    "The table gives the share of held-out tokens that get the same experts as before training. Freezing the router "
    "does not freeze the routing: training changes the hidden states that the routers of later layers see."
)
_BALANCE_NOTE = (
    "Load entropy is 1 if all experts get the same load, and 0 if one gets all. Max violation is how far the busiest "
    "expert is above the mean load; 0 is even."
)
_ROUTER_NOTE = (
    "Load CV is the load's standard deviation over its mean; 0 is even. Router entropy is 0 where the router is "
    "certain, and 1 where it is undecided. Margin is the distance between the two best experts. Dead experts got no "
    "token. Dropped is the share of assignments that found no room."
)
_MOST_LAYERS = 8  # rows that a card shows; of more it has the range, and a part that opens
_COLUMNS = {
    "load_entropy": "load entropy",
    "max_violation": "max violation",
    "load_cv": "load CV",
    "router_entropy": "router entropy",
    "margin": "margin",
    "dead_experts": "dead",
    "drop_share": "dropped",
}


def routing_section(found: RoutingFacts, training: TrainingFacts, plots: Sequence[str]) -> str:
    """Health, balance by layer, agreement with the base."""
    parts = [
        _health(found, training),
        _balance(found, training),
        _agreement(training),
        image(plots, "plots/expert_load.png", "Load of every expert in every layer"),
    ]
    return "\n\n".join(part for part in parts if part)


def _health(found: RoutingFacts, training: TrainingFacts) -> str:
    if found.verdict is not None:
        return cell(found.verdict)
    verdicts: dict[str, list[str]] = {}
    for variant, verdict in training.health.items():
        verdicts.setdefault(cell(verdict), []).append(cell(variant))
    lines = [f"Health {' and '.join(variants)} training: {verdict}" for verdict, variants in verdicts.items()]
    return "\n\n".join(lines) or f"Health: {NOT_MEASURED}."


def _balance(found: RoutingFacts, training: TrainingFacts) -> str:
    if found.layers:
        rows = [(layer, *(_metric(found, metric, layer) for metric in _COLUMNS)) for layer in found.layers]
        balance = _shown("The balance of every layer", table(["layer", *_COLUMNS.values()], rows), len(rows))
        return f"{balance}\n\n{_BALANCE_NOTE} {_ROUTER_NOTE}"
    if not training.load_entropy:
        return ""
    violations = training.max_violation or (None,) * len(training.load_entropy)
    rows = list(zip(range(len(training.load_entropy)), training.load_entropy, violations, strict=False))
    return f"{table(['layer, before training the adapter', 'load entropy', 'max violation'], rows)}\n\n{_BALANCE_NOTE}"


def _metric(found: RoutingFacts, name: str, layer: str) -> float | int | None:
    value = found.metric(f"{name}/{layer}")
    return value if value is None or name != "dead_experts" else round(value)


def _agreement(training: TrainingFacts) -> str:
    agreed = [domain for domain in training.domains if domain.agreement]
    if not agreed:
        return f"Routing agreement with the base model: {NOT_MEASURED}."
    layers = range(max(len(domain.agreement) for domain in agreed))
    rows = [(i, *(_percent(dict(enumerate(domain.agreement)).get(i)) for domain in agreed)) for i in layers]
    columns = ["layer", *(domain.name for domain in agreed)]
    if len(rows) <= _MOST_LAYERS:
        return f"{table(columns, rows)}\n\n{_AGREEMENT_NOTE}"
    ranges = [(domain.name, *map(_percent, _ends(domain.agreement))) for domain in agreed]
    short = table(["domain", "same experts, lowest layer", "highest layer"], ranges)
    return f"{short}\n\n{_shown('Every layer', table(columns, rows), len(rows))}\n\n{_AGREEMENT_NOTE}"


def _shown(summary: str, layers: str, rows: int) -> str:
    return layers if rows <= _MOST_LAYERS else details(summary, layers)


def _ends(shares: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [share for share in shares if share is not None]
    return min(known, default=None), max(known, default=None)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"
