"""Draw the plots of a card, from the facts that there are. Needs matplotlib where there is something to draw."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_moe.hub.cards.facts import take
from hf_moe.hub.cards.markdown import plain
from hf_moe.hub.cards.routing_facts import load_trace
from hf_moe.hub.cards.training_facts import TrainingFacts, training_facts


def draw_plots(
    folder: Path, training: Mapping[str, Any], trace: str | Path | None, *, is_adapter: bool = True
) -> list[Path]:
    """Draw loss, bits per byte and expert load into `folder/plots`; returns what was drawn.

    Args:
        is_adapter: As of `training_facts`.
    """
    drawn = []
    if curves := _curves(training, is_adapter):
        from hf_moe.observability.plots import plot_loss

        drawn.append(folder / "plots" / "loss.png")
        plot_loss(drawn[-1], curves)
    if bits := _bits(training_facts(training, is_adapter=is_adapter)):
        from hf_moe.observability.plots import plot_bits_per_byte

        drawn.append(folder / "plots" / "bits_per_byte.png")
        plot_bits_per_byte(drawn[-1], bits, new_domain=take(training, "new_domain", str))
    if trace is not None and Path(trace).is_dir():
        from hf_moe.observability.plots import plot_expert_load

        found = load_trace(Path(trace))
        domains: list[str | None] = [*found.domains] or [None]
        loads = {
            name or "all tokens": [found.statistics(layer, name).counts for layer in found.layers] for name in domains
        }
        drawn.append(folder / "plots" / "expert_load.png")
        plot_expert_load(drawn[-1], loads)
    return drawn


def _curves(report: Mapping[str, Any], is_adapter: bool) -> dict[str, list[dict[str, float]]]:
    """Logged losses by the title of the run."""
    logs = {
        plain(report.get("recipe", "training")): take(report, "log", list) or take(report, "log_history", list),
        "base model": take(report, "base.log", list),
        "adapter": take(report, "adapter.log", list) if is_adapter else None,
    }
    keys = ("step", "loss", "moe/max_violation")
    curves = {
        title: [
            {key: value for key in keys if (value := take({"x": record.get(key)}, "x", float)) is not None}
            for record in log or []
            if isinstance(record, dict)
        ]
        for title, log in logs.items()
    }
    whole = {title: [record for record in log if {"step", "loss"} <= record.keys()] for title, log in curves.items()}
    return {title: log for title, log in whole.items() if log}


def _bits(training: TrainingFacts) -> dict[str, dict[str, float]]:
    """Variant -> domain -> bits per byte, of the domains that have all variants."""
    domains = [domain for domain in training.domains if domain.bits]
    variants = list(domains[0].bits) if domains else []
    whole = [domain for domain in domains if all(domain.bits.get(variant) is not None for variant in variants)]
    if not whole or "before" not in variants:
        return {}
    return {variant: {domain.name: float(domain.bits[variant] or 0) for domain in whole} for variant in variants}
