"""A comparison as one HTML page that needs no network, no script and no other file. Names are hostile input."""

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from hf_moe.comparison.models import ModelComparison
from hf_moe.comparison.routing import LayerComparison
from hf_moe.comparison.table import ABSENT, experts, number, percent, share
from hf_moe.io.installation import install_command
from hf_moe.io.whole_files import write_text
from hf_moe.observability.report.glossary import COMPARISON_TERMS, LAYER_TERMS
from hf_moe.observability.report.text import short_count, short_labels, visible
from hf_moe.observability.thresholds import CheckResult, Verdict, format_value

# edges of the colour steps: ratios of an expert's new load to its old one
LOAD_STEPS = (0.25, 0.5, 0.71, 0.91, 1.1, 1.41, 2.0, 4.0)
# terms of one model that the page uses too
COMMON_TERMS = ("dead", "busiest", "router_entropy", "margin")


def write_page(path: Path, comparison: ModelComparison, verdict: Verdict | None = None) -> None:
    """Write the page; `path` holds the old or the new page, never half of one.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    write_text(path, render(comparison, verdict))


def render(comparison: ModelComparison, verdict: Verdict | None = None) -> str:
    """The page. The same comparison gives the same page.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    from markupsafe import Markup

    # files of this package go into the page as they are
    style = _asset("hf_moe.observability.report", "style.css") + _asset("hf_moe.comparison", "page.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    layers, largest = comparison.routing.layers, _largest_drift(comparison)
    labels = short_labels([layer.name for layer in layers])
    return _template().render(
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        base=visible(comparison.names[0]),
        new=visible(comparison.names[1]),
        facts=_facts(comparison),
        summary=_summary(comparison, {one.name: label for one, label in zip(layers, labels, strict=True)}),
        verdict=None if verdict is None else _verdict(verdict),
        domains=_domains(comparison),
        has_latency=bool(comparison.base.latency and comparison.new.latency),
        change_scale=_change_scale(comparison),
        terms=[*COMPARISON_TERMS.values(), *(LAYER_TERMS[key] for key in COMMON_TERMS)],
        columns=COMPARISON_TERMS,
        layer_columns=LAYER_TERMS,
        layers=[_layer(comparison, position, label, largest) for position, label in enumerate(labels)],
        drift_ticks=_drift_ticks(largest),
        window=f"{comparison.base.window:,}",
        has_loads=all(layer.has_same_experts for layer in comparison.routing.layers),
        has_drift=any(drift.experts is not None or drift.router is not None for drift in comparison.drift),
        drift_is_exact=comparison.drift_is_exact,
        left_out=[visible(reason, 1000) for reason in comparison.left_out],
    )


def _facts(comparison: ModelComparison) -> list[tuple[str, str, str, bool]]:
    """Rows of the table of models: name, both values, and whether they differ."""
    sides = [side.trace.model_facts for side in (comparison.base, comparison.new)]
    rows = []
    for name, key, show in (
        ("model type", "model_type", str),
        ("parameters", "parameters", short_count),
        ("active for a token", "active_parameters", _known_count),
        ("dtype of the experts", "dtype", str),
        ("MoE layers", "layers", str),
        ("experts in a layer", "experts", str),
        ("experts for a token", "top_k", str),
    ):
        values = [visible(show(side[key])) for side in sides]
        rows.append((name, values[0], values[1], values[0] != values[1]))
    return rows


def _known_count(value: int | None) -> str:
    return "not known" if value is None else short_count(value)


def _summary(comparison: ModelComparison, labels: dict[str, str]) -> list[str]:
    """The comparison in plain sentences."""
    metrics = comparison.metrics()
    sentences = [_bits_sentence(comparison)]
    mean, worst = metrics["agreement.mean"], metrics["agreement.min"]
    if mean.value is not None and worst.value is not None:
        sentences.append(
            f"{mean.value:.0%} of the tokens go to exactly the same experts; in {labels[worst.note]}, where most "
            f"changes, {worst.value:.0%} do."
        )
    shift = metrics["load_shift.max"]
    if shift.value is not None:
        layer = next(one for one in comparison.routing.layers if one.name == shift.note)
        chance = layer.load_shift_by_chance or 0.0
        sentences.append(
            f"The load of the experts moves by at most {shift.value:.4f} bits in {labels[shift.note]} (noise: "
            f"{_noise(chance)}); 0 is no change, 1 other experts altogether."
        )
    sentences.append(_dead_sentence(comparison))
    router, inner = (metrics[f"weight_drift.{part}.max"].value for part in ("router", "experts"))
    if router is not None and inner is not None:
        routers = "The routers have not changed" if router == 0 else f"Routers change by up to {percent(router)}"
        sentences.append(f"{routers}; experts by up to {percent(inner)} (norm of the change over the base's norm).")
    return sentences


def _noise(value: float) -> str:
    """At least four digits, and the first that is not 0."""
    digits = max(4, -math.floor(math.log10(value))) if value > 0 else 4
    return f"{value:.{digits}f}"


def _bits_sentence(comparison: ModelComparison) -> str:
    change, metrics = comparison.bits_change(), comparison.metrics()
    worst = metrics["bits_per_byte.worst_domain"]
    if not math.isfinite(change):
        return "A model's predictions are not finite: its bits per byte are not known."
    how = "fall" if change < 0 else "rise" if change > 0 else "stay"
    amount = f" by {abs(change):.4f}" if change else ""
    tail = f" (worst domain: {visible(worst.note)}, {worst.value:+.4f})" if len(comparison.base.bits) > 1 else ""
    return f"Bits per byte {how}{amount} over all text{tail}; lower is better."


def _dead_sentence(comparison: ModelComparison) -> str:
    metrics = comparison.metrics()
    dead, newly = metrics["dead_experts"].value or 0, metrics["newly_dead_experts"].value
    if newly is None:
        return f"The new model has {dead:.0f} experts that no token chose."
    revived = metrics["revived_experts"].value or 0
    if not dead and not revived:
        return "Every expert is in use in both models."
    return f"Dead experts of the new model: {dead:.0f}, newly dead: {newly:.0f}; came back to life: {revived:.0f}."


def _verdict(verdict: Verdict) -> dict[str, Any]:
    failed = len(verdict.failures)
    return {
        "passed": verdict.passed,
        "title": "Thresholds passed" if verdict.passed else "Thresholds failed",
        "counts": f"{len(verdict.results) - failed} of {len(verdict.results)} checks hold.",
        "source": visible(Path(verdict.source).name),
        "checks": [_check(result) for result in verdict.results],
    }


def _check(result: CheckResult) -> dict[str, Any]:
    value = result.measured.value
    return {
        "line": result.check.line,
        "text": visible(result.check.text),
        "measured": "not measured" if value is None else format_value(result.check.metric, value),
        "note": visible(result.measured.note, 400),
        "passed": result.passed,
    }


def _domains(comparison: ModelComparison) -> list[dict[str, Any]]:
    end = _change_scale(comparison)
    found = []
    for name, record in comparison.to_dict()["domains"].items():
        before, after = record["bits_per_byte"]
        change = comparison.bits_change(name)
        is_known = math.isfinite(change)
        ratio = comparison.latency_ratio(name)
        found.append(
            {
                "name": visible(name),
                "size": f"{record['bytes'] / 1000:,.0f} kB",
                "base": number(before, 4),
                "new": number(after, 4),
                "change": f"{change:+.4f}" if is_known else ABSENT,
                "is_worse": not change <= 0,
                "bar": _bar(change / end) if is_known else None,
                "milliseconds": [number(value, 1) for value in record["milliseconds_per_1k_tokens"]],
                "ratio": ABSENT if ratio is None else f"{ratio:.2f}×",
                "agreement": share(record.get("agreement.mean")),
                "shift": number(record.get("load_shift.mean"), 4),
            }
        )
    return found


def _change_scale(comparison: ModelComparison) -> float:
    """A round number that no domain's change of bits per byte exceeds."""
    changes = [abs(comparison.bits_change(name)) for name in comparison.to_dict()["domains"]]
    largest = max((change for change in changes if math.isfinite(change)), default=0.0) or 0.01
    unit = 10 ** math.floor(math.log10(largest))
    return unit * next(step for step in (1, 2, 3, 4, 5, 6, 8, 10) if unit * step >= largest * (1 - 1e-9))


def _bar(part: float) -> dict[str, float]:
    """Start and width, in percent of an axis from -1 to 1, of a bar from 0 to `part`."""
    return {"start": 50 + 50 * min(part, 0.0), "width": 50 * abs(part)}


def _layer(comparison: ModelComparison, position: int, label: str, largest: float) -> dict[str, Any]:
    layer = comparison.routing.layers[position]
    drift = comparison.drift[position] if comparison.drift else None
    by_domain = [
        (visible(name), part.layers[position].agreement)
        for name, part in comparison.by_domain.items()
        if position < len(part.layers)
    ]
    return {
        "label": visible(label),
        "name": visible(layer.name),
        "agreement": share(layer.agreement),
        "step": _sixth(layer.agreement),
        "overlap": share(layer.overlap),
        "by_domain": [(name, share(value), _sixth(value)) for name, value in by_domain],
        "shift": number(layer.load_shift, 4),
        "chance": number(layer.load_shift_by_chance, 4),
        "dead": f"{len(layer.base.dead_experts)} → {len(layer.new.dead_experts)}",
        "is_dying": bool(layer.newly_dead),
        "newly_dead": experts(layer.newly_dead),
        "revived": experts(layer.revived),
        "busiest": f"{1 + layer.base.max_violation:.1f}× → {1 + layer.new.max_violation:.1f}×",
        "entropy": ABSENT if layer.entropy_change is None else f"{layer.entropy_change:+.4f}",
        "margin": ABSENT if layer.margin_change is None else f"{layer.margin_change:+.4f}",
        "loads": _loads(layer) if layer.has_same_experts else [],
        "router_drift": ABSENT if drift is None or drift.router is None else percent(drift.router),
        "experts_drift": ABSENT if drift is None or drift.experts is None else percent(drift.experts),
        "drifts": [] if drift is None or drift.by_expert is None else _drifts(drift.by_expert.tolist(), largest),
    }


def _loads(layer: LayerComparison) -> list[dict[str, Any]]:
    """Change of each expert's share of the assignments: a step of the colour scale, and words."""
    found = []
    even = layer.base.num_experts
    for expert, (before, after) in enumerate(zip(layer.base.load.tolist(), layer.new.load.tolist(), strict=True)):
        words = f"expert {expert}: {even * before:.2f}× → {even * after:.2f}× the even load"
        state = "dead in both" if not before and not after else "newly dead" if not after else ""
        state = state or ("revived" if not before else "")
        step = 4 if not before and not after else _step(after / before if before else math.inf)
        found.append({"step": step, "words": f"{words}{', ' if state else ''}{state}", "is_dead": not after})
    return found


def _step(ratio: float) -> int:
    """0 to 8; 4 is unchanged."""
    return sum(ratio >= edge for edge in LOAD_STEPS)


def _largest_drift(comparison: ModelComparison) -> float:
    return max(
        (float(drift.by_expert.max()) for drift in comparison.drift if drift.by_expert is not None), default=0.0
    )


def _drift_ticks(largest: float) -> list[str]:
    """Where each of the six steps of `_drifts` begins, in words."""
    return ["0%", "> 0%", *(percent(part * largest / 5) for part in range(1, 5))]


def _drifts(values: Sequence[float], largest: float) -> list[dict[str, Any]]:
    """A step from 0 (unchanged) to 5 (near the largest) and words."""
    edges = [1e-9, *(part * largest / 5 for part in range(1, 5))]
    return [
        {"step": sum(value >= edge for edge in edges), "words": f"expert {expert}: {percent(value)}", "is_dead": False}
        for expert, value in enumerate(values)
    ]


def _sixth(value: float | None) -> int:
    """Colour step of a share, 0 to 5; the dark end is all tokens alike."""
    return 0 if value is None else min(int(value * 6), 5)


def _asset(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError(f"the page needs jinja2. Install it with: {install_command('recipes')}") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("hf_moe.comparison", "page.html.j2"))
