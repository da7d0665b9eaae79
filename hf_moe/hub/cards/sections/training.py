"""The parts of a card on training (recipe, stages, time, energy) and on its data."""

import json
from collections.abc import Sequence
from typing import Any

from hf_moe.hub.cards.emissions_facts import Emissions
from hf_moe.hub.cards.markdown import NOT_MEASURED, NOT_STATED, cell, details, fenced, image, plain, table
from hf_moe.hub.cards.training_facts import TrainingFacts

_ASSUMED = {True: "", False: ", which codecarbon assumes where it cannot tell the place"}


def training_section(found: TrainingFacts, plots: Sequence[str]) -> str:
    """Recipe, command, stages, settings, hardware, time, energy."""
    rows = [
        (stage.title, stage.steps, stage.tokens, _rate(stage.learning_rate), _seconds(stage.seconds), stage.last_loss)
        for stage in found.stages
    ]
    stages = table(["run", "steps", "tokens", "peak learning rate", "seconds", "last loss"], rows)
    settings = [(name, _setting(value)) for name, value in found.settings.items()]
    parts = [
        stages if rows else f"Steps, tokens, time: {NOT_MEASURED}.",
        f"The run was interrupted and continued: {cell(', '.join(found.interrupted))}." if found.interrupted else "",
        f"Method: {cell(found.recipe or NOT_STATED)}. Hardware: {cell(found.hardware or NOT_STATED)}.",
        _energy(found.emissions),
        image(plots, "plots/loss.png", "Training loss, and the load of the busiest expert"),
        fenced(plain(found.command)) if found.command else f"Command: {NOT_STATED}.",
        details("All settings", table(["setting", "value"], settings)) if settings else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _energy(found: Emissions | None) -> str:
    if found is None:
        return f"Energy: {NOT_MEASURED}."
    spent = "" if found.seconds is None else f" in {found.seconds:,.0f} seconds"
    details = [
        f"tracking mode {cell(found.mode or NOT_STATED)}",
        *([f"sum of {found.runs} runs"] if found.runs > 1 else []),
        *([cell(found.hardware)] if found.hardware else []),
        *([cell(found.location) + _ASSUMED[found.is_location_known]] if found.location else []),
    ]
    tool = f"codecarbon {cell(found.version)}" if found.version else "codecarbon"
    return (
        f"Energy: {found.energy:.3g} kWh, {found.emissions:.3g} kg CO2eq{spent}, as {tool} estimates it "
        f"({'; '.join(details)})."
    )


def _rate(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _setting(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return plain(value if isinstance(value, str | int | float) else json.dumps(value, default=str))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.3g}%"


def data_section(found: TrainingFacts) -> str:
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
