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
from hf_moe.observability.health import Finding, Health, diagnose
from hf_moe.observability.layer_statistics import LayerStatistics, jensen_shannon
from hf_moe.observability.report import text
from hf_moe.observability.report.data import ReportData, pack_coactivation, pack_layers, pack_tokens

SCRIPTS = ("data.js", "charts.js", "sections.js", "tokens.js", "main.js")

_KINDS = {
    "invalid": (
        "Router weights are not finite",
        "Go back to the last checkpoint whose weights are finite; clip gradients or lower the learning rate.",
    ),
    "collapsed": (
        "Collapsed",
        "Go back to a checkpoint before the collapse and train with a balancing loss per layer or a bias update.",
    ),
    "one_takes_most": (
        "One expert takes most tokens",
        "Strengthen the balancing of these layers; with a bias update, lower its rate.",
    ),
    "collapsing": (
        "Collapsing",
        "Strengthen the balancing now, or lower the router's learning rate: a collapse is hard to undo.",
    ),
    "dead_experts": (
        "Dead experts",
        "Trace more and more varied text first. Experts that stay dead cost memory and add nothing: train on with "
        "balancing, or prune them.",
    ),
    "no_gradient": (
        "The router learns nothing",
        "Set norm_topk_prob=False, or choose more than one expert per token.",
    ),
    "dropping": ("Dropped assignments", "Raise capacity_factor, or balance the load."),
    "unknown": ("Too few tokens to judge", "Trace more text."),
}
_PATTERNS = {
    "same_expert": "All layers collapsed onto the expert of the same number.",
    "own_expert": "Every layer collapsed onto an expert of its own. Pooled over the layers this looks balanced, so a "
    "balancing loss that pools them sees nothing.",
    "some_layers": "Some layers collapsed, others did not.",
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
        facts=[(text.visible(name), text.visible(value)) for name, value in data.facts.items()],
        health=_health(data, labels),
        rows=[_row(layer, label) for layer, label in zip(data.layers, labels, strict=True)],
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


def _health(data: ReportData, labels: list[str]) -> dict[str, Any]:
    """The verdict, and the findings by kind, gravest first."""
    if not any(layer.tokens for layer in data.layers):
        return {
            "verdict": "unknown",
            "summary": "Nothing to judge: no token was traced.",
            "groups": [],
            "pattern": "",
            "note": "",
        }
    health = diagnose(data.layers)
    names = {layer.name: label for layer, label in zip(data.layers, labels, strict=True)}
    positions = {layer.name: position for position, layer in enumerate(data.layers)}
    groups: dict[str, list[Finding]] = {}
    for finding in health.findings:
        groups.setdefault(finding.kind, []).append(finding)
    return {
        "verdict": "healthy" if health.healthy else "unknown" if health.verdict == "unknown" else "ill",
        "summary": _summary(health),
        "pattern": _PATTERNS.get(health.pattern or "", ""),
        "note": text.visible(health.note(names), 600),
        "groups": [
            {
                "title": _KINDS[kind][0],
                "advice": _KINDS[kind][1],
                "findings": [
                    (positions[each.layer], names[each.layer], text.visible(each.message, 600)) for each in found
                ],
            }
            for kind, found in groups.items()
        ],
    }


def _summary(health: Health) -> str:
    return str(health).partition("\n")[0]


def _row(layer: LayerStatistics, label: str) -> dict[str, str]:
    """One line of the table of layers."""
    violation = layer.max_violation
    return {
        "label": label,
        "name": text.visible(layer.name),
        "experts": text.count(layer.num_experts),
        "top_k": text.count(layer.top_k),
        "tokens": text.short_count(layer.tokens),
        "busiest": text.times(1 + violation),
        "busiest_expert": "" if math.isnan(violation) else f"expert {layer.busiest_expert}",
        "load_cv": text.decimal(layer.load_cv),
        "load_entropy": text.decimal(layer.load_entropy),
        "dead": text.count(len(layer.dead_experts)) if layer.tokens else "–",
        "router_entropy": text.decimal(layer.router_entropy),
        "margin": text.decimal(layer.margin),
        "empty": text.percent(layer.empty_share),
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
