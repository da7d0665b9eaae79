"""The parts of a card on training and routing: recipe, time, energy, data, balance, agreement with the base."""

import json
from collections.abc import Sequence
from typing import Any

from hf_moe.hub.cards.emissions_facts import Emissions
from hf_moe.hub.cards.markdown import NOT_MEASURED, NOT_STATED, cell, fenced, image, plain, table
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
_ASSUMED = {True: "", False: ", which codecarbon assumes where it cannot tell the place"}
_FIGURES = {
    "load_entropy": "load entropy",
    "max_violation": "max violation",
    "load_cv": "load CV",
    "router_entropy": "router entropy",
    "margin": "margin",
    "dead_experts": "dead",
    "drop_share": "dropped",
}


def routing_part(found: RoutingFacts, training: TrainingFacts, plots: Sequence[str]) -> str:
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
    told = [f"Health {cell(variant)} training: {cell(verdict)}" for variant, verdict in training.health.items()]
    return "\n\n".join(told) or f"Health: {NOT_MEASURED}."


def _balance(found: RoutingFacts, training: TrainingFacts) -> str:
    if found.layers:
        rows = [(layer, *(_figure(found, figure, layer) for figure in _FIGURES)) for layer in found.layers]
        return f"{table(['layer', *_FIGURES.values()], rows)}\n\n{_BALANCE_NOTE} {_ROUTER_NOTE}"
    if not training.load_entropy:
        return ""
    violations = training.max_violation or (None,) * len(training.load_entropy)
    rows = list(zip(range(len(training.load_entropy)), training.load_entropy, violations, strict=False))
    return f"{table(['layer, before training the adapter', 'load entropy', 'max violation'], rows)}\n\n{_BALANCE_NOTE}"


def _figure(found: RoutingFacts, name: str, layer: str) -> float | int | None:
    value = found.figure(f"{name}/{layer}")
    return value if value is None or name != "dead_experts" else round(value)


def _agreement(training: TrainingFacts) -> str:
    agreed = [domain for domain in training.domains if domain.agreement]
    if not agreed:
        return f"Routing agreement with the base model: {NOT_MEASURED}."
    layers = range(max(len(domain.agreement) for domain in agreed))
    rows = [(i, *(dict(enumerate(domain.agreement)).get(i) for domain in agreed)) for i in layers]
    return f"{table(['layer', *(domain.name for domain in agreed)], rows)}\n\n{_AGREEMENT_NOTE}"


def training_part(found: TrainingFacts, plots: Sequence[str]) -> str:
    """Recipe, command, stages, settings, hardware, time, energy."""
    rows = [
        (stage.title, stage.steps, stage.tokens, _rate(stage.learning_rate), _seconds(stage.seconds), stage.last_loss)
        for stage in found.stages
    ]
    stages = table(["run", "steps", "tokens", "peak learning rate", "seconds", "last loss"], rows)
    settings = ", ".join(f"{name} {_setting(value)}" for name, value in found.settings.items())
    parts = [
        stages if rows else f"Steps, tokens, time: {NOT_MEASURED}.",
        f"Interrupted and continued: {cell(', '.join(found.interrupted))}." if found.interrupted else "",
        f"Recipe: {cell(found.recipe or NOT_STATED)}. Hardware: {cell(found.hardware or NOT_STATED)}.",
        _energy(found.emissions),
        f"Settings: {cell(settings)}." if settings else "",
        fenced(plain(found.command)) if found.command else f"Command: {NOT_STATED}.",
        image(plots, "plots/loss.png", "Training loss and expert load"),
    ]
    return "\n\n".join(part for part in parts if part)


def _energy(found: Emissions | None) -> str:
    if found is None:
        return f"Energy: {NOT_MEASURED}."
    spent = "" if found.seconds is None else f" in {found.seconds:,.0f} seconds"
    told = [
        f"tracking mode {cell(found.mode or NOT_STATED)}",
        *([f"sum of {found.runs} runs"] if found.runs > 1 else []),
        *([cell(found.hardware)] if found.hardware else []),
        *([cell(found.location) + _ASSUMED[found.is_location_known]] if found.location else []),
    ]
    tool = f"codecarbon {cell(found.version)}" if found.version else "codecarbon"
    return (
        f"Energy: {found.energy:.3g} kWh, {found.emissions:.3g} kg CO2eq{spent}, as {tool} estimates it "
        f"({'; '.join(told)})."
    )


def _rate(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _setting(value: Any) -> str:
    return plain(value if isinstance(value, str | int | float) or value is None else json.dumps(value, default=str))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.3g}%"


def data(found: TrainingFacts) -> str:
    """Data sets and domains."""
    if not found.domains:
        return f"Data and domains: {NOT_STATED}."
    columns: dict[str, list[Any]] = {
        "data set": [domain.name for domain in found.domains],
        "what it is": [found.texts.get(domain.name) for domain in found.domains],
        "share of the rows": [_percent(domain.share) for domain in found.domains],
        "documents": [domain.documents for domain in found.domains],
        "tokens": [domain.tokens for domain in found.domains],
    }
    known = {
        name: values
        for name, values in columns.items()
        if name in ("documents", "tokens") or any(value is not None for value in values)
    }
    rows = list(zip(*known.values(), strict=True))
    return f"{table(list(known), rows)}\n\nLicences of the data: {NOT_STATED}."
