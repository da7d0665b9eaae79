"""Make the report's data from a routing trace."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np

from hf_moe.observability.layer_statistics import LayerStatistics
from hf_moe.observability.report import text
from hf_moe.observability.report.data import MOST_TOKENS, ReportData, TokenSample
from hf_moe.observability.token_table import TokenRow, TokenTable

# choices (of a token, in a layer) that the page has room for, and slots of a token that it keeps before more tokens
MOST_CHOICES, FIRST_SLOTS = 1_500_000, 4


class Trace(Protocol):
    """The part of `RoutingTrace` that the report reads."""

    model_facts: dict[str, Any]
    tokens: TokenTable | None

    @property
    def layers(self) -> list[str]: ...
    @property
    def domains(self) -> list[str]: ...
    def statistics(self, layer: str, domain: str | None = None) -> LayerStatistics: ...


def report_data(trace: Trace, title: str | None = None) -> ReportData:
    """Collect everything that the page shows of `trace`, of its tokens as many as fit, evenly from all
    domains.

    Args:
        title: The model's name; its class if not given.

    Raises:
        ValueError: If the trace's file of tokens is damaged.
    """
    layers = tuple(trace.statistics(name) for name in trace.layers)
    by_domain = {domain: tuple(trace.statistics(name, domain) for name in trace.layers) for domain in trace.domains}
    return ReportData(
        title=title or str(trace.model_facts.get("model_class", "A Mixture-of-Experts model")),
        layers=layers,
        facts=_facts(trace.model_facts, layers, trace.domains),
        by_domain=by_domain,
        tokens=None if trace.tokens is None else _sample(trace.tokens, layers, by_domain),
        notes=_notes(trace),
    )


def _facts(known: Mapping[str, Any], layers: Sequence[LayerStatistics], domains: Sequence[str]) -> dict[str, str]:
    facts = {
        "Model": f"{known.get('model_class', '?')} ({known.get('model_type', '?')})",
        "Parameters": _number(known.get("parameters")),
        "Active per token": _number(known.get("active_parameters")),
        "Weights": str(known.get("dtype", "")),
        "MoE layers": text.count(len(layers)),
        "Experts in a layer": _span([layer.num_experts for layer in layers]),
        "Chosen per token": _span([layer.top_k for layer in layers]),
        "Tokens traced": text.count(max((layer.tokens for layer in layers), default=0)),
        "Domains": text.count(len(domains)) if domains else "",
    }
    return {name: value for name, value in facts.items() if value}


def _number(value: Any) -> str:
    return text.short_count(value) if isinstance(value, int | float) else ""


def _span(values: Sequence[int]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return text.count(low) if low == high else f"{text.count(low)} to {text.count(high)}"


def _notes(trace: Trace) -> tuple[str, ...]:
    if trace.tokens is None:
        return ("The trace holds sums only: no single token, no text.",)
    if trace.tokens.is_audit:
        return ("The trace is an audit: it holds neither the tokens' ids nor their text, only a SHA-256 of each row.",)
    return () if trace.tokens.has_text else ("The trace holds the tokens' ids, not their text.",)


def _sample(
    table: TokenTable, layers: Sequence[LayerStatistics], by_domain: Mapping[str, Sequence[LayerStatistics]]
) -> TokenSample:
    sizes: dict[str | None, int] = {
        domain: max((each.tokens for each in found), default=0) for domain, found in by_domain.items()
    }
    choices = sum(min(each.top_k, FIRST_SLOTS) for each in layers)
    room = min(MOST_TOKENS, MOST_CHOICES // max(choices, 1))
    rows = list(_chosen_rows(table, _quotas(sizes | {None: table.num_tokens - sum(sizes.values())}, room)))
    places = {domain: place for place, domain in enumerate(by_domain)}
    lengths = [count for _, count in rows]
    return TokenSample(
        texts=np.repeat([row.row for row, _ in rows], lengths).astype(np.int64),
        domains=np.repeat([places.get(row.domain or "", -1) for row, _ in rows], lengths).astype(np.int64),
        positions=_joined(np.arange(count) for count in lengths),
        pieces=list(chain.from_iterable((row.text or [])[:count] for row, count in rows)) if table.has_text else None,
        token_ids=None
        if table.is_audit
        else _joined(row.token_ids[:count] for row, count in rows if row.token_ids is not None),
        experts=tuple(_column(rows, layer, layers, "experts") for layer in layers),
        weights=tuple(_column(rows, layer, layers, "weights") for layer in layers),
        total=table.num_tokens,
    )


def _quotas(sizes: Mapping[str | None, int], left: int) -> dict[str | None, int]:
    """Tokens to take of each domain: equal parts of `left`; what a small domain leaves, the larger ones get."""
    quotas: dict[str | None, int] = {}
    for position, domain in enumerate(sorted(sizes, key=lambda name: sizes[name])):
        quotas[domain] = min(sizes[domain], left // (len(sizes) - position))
        left -= quotas[domain]
    return quotas


def _chosen_rows(table: TokenTable, quotas: dict[str | None, int]) -> Iterator[tuple[TokenRow, int]]:
    """Rows in order, each with how many of its tokens are taken."""
    if not any(quotas.values()):
        return
    for row in table.rows():
        count = min(len(next(iter(row.experts.values()))), quotas.get(row.domain, 0))
        if count:
            quotas[row.domain] -= count
            yield row, count
        if not any(quotas.values()):
            return


def _column(
    rows: Sequence[tuple[TokenRow, int]], layer: LayerStatistics, layers: Sequence[LayerStatistics], kind: str
) -> np.ndarray:
    """`[N, K]` of one layer, K the largest of all layers: what a layer has less is an empty slot."""
    slots = max(each.top_k for each in layers)
    empty = layer.num_experts if kind == "experts" else 0
    found = [np.asarray(getattr(row, kind)[layer.name][:count], dtype=np.float64) for row, count in rows]
    whole = np.concatenate(found) if found else np.zeros((0, layer.top_k))
    filled = np.pad(whole, ((0, 0), (0, slots - layer.top_k)), constant_values=empty)
    return filled.astype(np.int64) if kind == "experts" else filled


def _joined(parts: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])
