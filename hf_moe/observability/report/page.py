"""Write the report page: plain data in, one HTML file out that needs no network and no other file."""

import base64
import hashlib
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from hf_moe.io.installation import install_command
from hf_moe.io.whole_files import write_text
from hf_moe.observability.health import KINDS, diagnose, told_one_by_one
from hf_moe.observability.layer_statistics import LayerStatistics, jensen_shannon
from hf_moe.observability.report import glossary, text
from hf_moe.observability.report.data import ReportData, pack_coactivation, pack_layers, pack_tokens

SCRIPTS = ("data.js", "charts.js", "sections.js", "tokens.js", "main.js")

_FACT_GROUPS = {
    "Model": ("Model", "Parameters", "Active per token", "Weights"),
    "Experts": ("MoE layers", "Experts in a layer", "Chosen per token"),
    "Text": ("Tokens traced", "Domains"),
}


def write_report(path: Path, data: ReportData) -> None:
    """Write the page of `data`; `path` holds the old or the new page, never half of one.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(data))


def render(data: ReportData) -> str:
    """The page of `data`. The same data give the same page.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    style, script = _asset("style.css"), "\n".join(_asset(name) for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{script}}})();\n'
    labels = text.short_labels([layer.name for layer in data.layers])
    return _template().render(
        title=text.visible(data.title),
        style=_markup(style),
        script=_markup(script),
        # no address is allowed, and no script or style but these two
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; "
        "form-action 'none'",
        facts=_facts(data),
        health=_health(data, labels),
        rows=[_row(layer, label) for layer, label in zip(data.layers, labels, strict=True)],
        columns=glossary.LAYER_TERMS,
        terms=[*glossary.LAYER_TERMS.values(), *glossary.OTHER_TERMS.values()],
        has_domains=len(data.domains) > 1,
        has_tokens=data.tokens is not None and len(data.tokens.texts) > 0,
        traced=any(layer.tokens for layer in data.layers),
        report=_payload(data, labels),
        notes=[text.visible(note, 400) for note in data.notes],
    )


def _payload(data: ReportData, labels: list[str]) -> dict[str, Any]:
    """JSON values for the script."""
    return {
        "labels": labels,
        "names": [text.visible(layer.name) for layer in data.layers],
        "domains": [text.visible(name, 40) for name in data.domains],
        **pack_layers(data),
        "distances": _distances(data),
        "coactivation": pack_coactivation(data.layers),
        "sample": None if data.tokens is None else pack_tokens(data.tokens),
    }


def _facts(data: ReportData) -> list[tuple[str, list[tuple[str, str]]]]:
    """The facts in groups; those of other names come with the model's."""
    known = {name for names in _FACT_GROUPS.values() for name in names}
    groups = []
    for title, names in _FACT_GROUPS.items():
        others = tuple(name for name in data.facts if name not in known) if title == "Model" else ()
        shown = [name for name in (*names, *others) if name in data.facts]
        groups.append((title, [(text.visible(name), text.visible(data.facts[name])) for name in shown]))
    return [group for group in groups if group[1]]


def _health(data: ReportData, labels: list[str]) -> dict[str, Any]:
    """The verdict, and the findings by kind, gravest first."""
    if not any(layer.tokens for layer in data.layers):
        summary = "Nothing to judge: no token was traced."
        return {"verdict": "unknown", "summary": summary, "groups": [], "pattern": "", "note": ""}
    health = diagnose(data.layers)
    places = {layer.name: (place, label) for place, (layer, label) in enumerate(zip(data.layers, labels, strict=True))}
    return {
        "verdict": "healthy" if health.healthy else "unknown" if health.verdict == "unknown" else "ill",
        "summary": health.summary,
        "pattern": health.pattern_words(),
        "note": text.visible(health.note(), 600),
        "groups": [
            {
                "kind": KINDS[kind],
                "where": health.where(len(found)),
                "told": told_one_by_one(len(found)),
                "findings": [(*places[each.layer], text.visible(each.message, 600)) for each in found],
            }
            for kind, found in health.groups.items()
        ],
    }


def _row(layer: LayerStatistics, label: str) -> dict[str, Any]:
    """One line of the table of layers."""
    is_seen = not math.isnan(layer.max_violation)
    return {
        "label": label,
        "name": text.visible(layer.name),
        "values": glossary.layer_row(layer),
        "busiest_expert": f"expert {layer.busiest_expert}" if is_seen else "",
        "has_dead": is_seen and bool(layer.dead_experts),
    }


def _distances(data: ReportData) -> list[list[float]]:
    """Per domain and layer: Jensen-Shannon divergence, bits, of its load from the mean load of all domains."""
    found = []
    for layers in data.by_domain.values():
        row = []
        for position, layer in enumerate(layers):
            every = [each[position].load for each in data.by_domain.values() if each[position].tokens]
            row.append(jensen_shannon(layer.load, torch.stack(every).mean(0)) if layer.tokens else 0.0)
        found.append([round(value, 4) for value in row])
    return found


def _asset(name: str) -> str:
    return files("hf_moe.observability.report").joinpath(name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError(f"the page needs jinja2. Install it with: {install_command('recipes')}") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("template.html.j2"))


def _markup(source: str) -> Any:
    """Files of this package go into the page as they are."""
    from markupsafe import Markup

    return Markup(source)
