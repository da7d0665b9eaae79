"""What the report page shows, as plain data: it needs no trace, so that any source of statistics can have a page."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hf_moe.observability.layer_statistics import LayerStatistics


@dataclass(frozen=True)
class TokenSample:
    """Tokens in reading order, and what each layer decided for them. N tokens, K slots; one K for all layers.

    Attributes:
        texts: `[N]` int, number of the text (a row of the batch) that the token is from; a text's tokens are together.
        domains: `[N]` int, position in `ReportData.domains`; -1 for none.
        positions: `[N]` int, the tokens' places in their texts.
        pieces: `[N]` the tokens' text, of any content; None where the trace keeps no text.
        token_ids: `[N]` int, the tokens' ids; None where the trace keeps none.
        experts: One `[N, K]` int array a layer, in the order of `ReportData.layers`. The layer's `num_experts` marks
            a slot without an expert.
        weights: One `[N, K]` float array a layer.
        total: Tokens in the trace: N of them are here.
    """

    texts: np.ndarray
    domains: np.ndarray
    positions: np.ndarray
    pieces: list[str] | None
    token_ids: np.ndarray | None
    experts: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    total: int

    def first(self, count: int) -> "TokenSample":
        """The first `count` tokens."""
        return TokenSample(
            texts=self.texts[:count],
            domains=self.domains[:count],
            positions=self.positions[:count],
            pieces=None if self.pieces is None else self.pieces[:count],
            token_ids=None if self.token_ids is None else self.token_ids[:count],
            experts=tuple(experts[:count] for experts in self.experts),
            weights=tuple(weights[:count] for weights in self.weights),
            total=self.total,
        )


@dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    Attributes:
        title: What the page is about: the model's name.
        layers: Statistics over all text, in the model's order; may be empty.
        facts: Label -> value, what is known of the model and of the text, in words for people.
        by_domain: Domain -> statistics of the same layers over that domain.
        tokens: None where the trace has counts only.
        notes: Sentences for the end of the page, such as that no text was stored.
    """

    title: str
    layers: tuple[LayerStatistics, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    by_domain: Mapping[str, tuple[LayerStatistics, ...]] = field(default_factory=dict)
    tokens: TokenSample | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        for domain, layers in self.by_domain.items():
            if [layer.name for layer in layers] != names:
                raise ValueError(
                    f"domain {domain!r} must have statistics of the same layers as the whole, in the same order."
                )
        if self.tokens is not None and len(self.tokens.experts) != len(names):
            raise ValueError(f"tokens must have experts of all {len(names)} layers, got {len(self.tokens.experts)}.")

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.by_domain)
