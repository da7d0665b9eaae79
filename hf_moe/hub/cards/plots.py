"""Draw the plots of a card, from the facts that there are. Needs matplotlib where there is something to draw."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_moe.hub.cards.facts import numbers, take
from hf_moe.hub.cards.markdown import plain
from hf_moe.hub.cards.routing_facts import load_trace
from hf_moe.hub.cards.training_facts import TrainingFacts, training_facts

if TYPE_CHECKING:
    from hf_moe.observability.routing_trace import RoutingTrace

MOST_PANELS = 8


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
        drawn.append(folder / "plots" / "expert_load.png")
        _draw_load(drawn[-1], load_trace(Path(trace)))
    elif loads := _loads(training):
        from hf_moe.observability.plots import plot_expert_load

        drawn.append(folder / "plots" / "expert_load.png")
        plot_expert_load(drawn[-1], loads)
    return drawn


def _loads(report: Mapping[str, Any]) -> dict[str, list[torch.Tensor]]:
    """The quickstart's count of tokens by expert, as `plot_expert_load` takes it; empty where it is not whole."""
    found = take(report, "evaluation.expert_load_before", dict) or {}
    layers = {
        name: [numbers({"x": layer}, "x") for layer in each] for name, each in found.items() if isinstance(each, list)
    }
    shapes = {tuple(map(len, each)) for each in layers.values()}
    if (
        len(shapes) != 1
        or not min(shapes)
        or any(None in layer or not layer for each in layers.values() for layer in each)
    ):
        return {}
    return {plain(name): [torch.tensor(layer) for layer in each] for name, each in layers.items()}


def _draw_load(path: Path, trace: "RoutingTrace") -> None:
    """Experts by domain, a panel for each layer; of a deep model the layers by experts, over all domains."""
    from hf_moe.observability.plots import plot_expert_load, plot_layer_load
    from hf_moe.observability.report.text import short_labels

    labels = short_labels(trace.layers)
    if len(trace.layers) > MOST_PANELS:
        return plot_layer_load(path, [trace.statistics(layer) for layer in trace.layers], labels)
    domains: list[str | None] = [*trace.domains] or [None]
    loads = {
        name or "all tokens": [trace.statistics(layer, name).counts for layer in trace.layers] for name in domains
    }
    plot_expert_load(path, loads, labels)


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
    if not whole or not {"before", "after"} <= set(variants):
        return {}
    return {variant: {domain.name: float(domain.bits[variant] or 0) for domain in whole} for variant in variants}
