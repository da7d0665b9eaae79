"""The part of a card on routing: health, balance by layer, agreement with the base."""

from collections.abc import Sequence

from hf_moe.hub.cards.markdown import NOT_MEASURED, cell, image, table
from hf_moe.hub.cards.routing_facts import RoutingFacts
from hf_moe.hub.cards.training_facts import TrainingFacts

_AGREEMENT_NOTE = (
    "Agreement: the share of held-out tokens whose set of experts is the same before and after training. A frozen "
    "router is no frozen routing: what earlier layers learn moves its inputs."
)
_BALANCE_NOTE = (
    "Load entropy: 1 is balanced, 0 is one expert for all. Max violation: how far the busiest expert is above the "
    "mean load; 0 is balanced."
)
_ROUTER_NOTE = (
    "Load CV: the variation of the load, 0 is balanced. Router entropy: 0 is certain, 1 is undecided. Margin: between "
    "the two best experts. Dead: experts that no token chose. Dropped: share of the assignments."
)
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
        image(plots, "plots/expert_load.png", "Load of each expert by layer and domain"),
    ]
    return "\n\n".join(part for part in parts if part)


def _health(found: RoutingFacts, training: TrainingFacts) -> str:
    if found.verdict is not None:
        return cell(found.verdict)
    verdicts = [f"Health {cell(variant)} training: {cell(verdict)}" for variant, verdict in training.health.items()]
    return "\n\n".join(verdicts) or f"Health: {NOT_MEASURED}."


def _balance(found: RoutingFacts, training: TrainingFacts) -> str:
    if found.layers:
        rows = [(layer, *(_metric(found, metric, layer) for metric in _COLUMNS)) for layer in found.layers]
        return f"{table(['layer', *_COLUMNS.values()], rows)}\n\n{_BALANCE_NOTE} {_ROUTER_NOTE}"
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
    rows = [(i, *(dict(enumerate(domain.agreement)).get(i) for domain in agreed)) for i in layers]
    return f"{table(['layer', *(domain.name for domain in agreed)], rows)}\n\n{_AGREEMENT_NOTE}"
