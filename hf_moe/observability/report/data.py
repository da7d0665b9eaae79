"""Plain data of the report page, and their packed form for the page's script.

They need no trace, so that any source of statistics can have a page. Arrays are packed as short text: base64 of gzip
of little-endian numbers of the smallest type that holds them.
"""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_moe.observability.layer_statistics import LayerStatistics
from hf_moe.observability.report.text import visible_token

MOST_TOKENS = 20_000
# characters of base64; with the rest of the page below 5 MB
TOKEN_BUDGET, COACTIVATION_BUDGET = 2_500_000, 1_400_000
_UNSIGNED = (("u1", 2**8), ("u2", 2**16), ("u4", 2**32))


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
        facts: Label -> value, what is known of the model and of the text, in words.
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


def pack(values: Any) -> dict[str, str]:
    """Pack an array; `type` is a numpy dtype without its byte order. Whole numbers of 2^32 and more become float64."""
    array = np.asarray(values)
    kind = "f8"
    if np.issubdtype(array.dtype, np.integer):
        largest = int(array.max(initial=0))
        kind = next((name for name, end in _UNSIGNED if largest < end), "f8")
    return {"type": kind, "data": _squeeze(array.astype(f"<{kind}").tobytes())}


def _squeeze(data: bytes) -> str:
    # mtime: the same report is the same bytes
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def pack_layers(data: ReportData) -> dict[str, Any]:
    """Pack counts and weights of all layers, one after the other."""
    return {
        "experts": [layer.num_experts for layer in data.layers],
        "topK": [layer.top_k for layer in data.layers],
        "tokens": [layer.tokens for layer in data.layers],
        "counts": pack(_joined([layer.counts.numpy() for layer in data.layers])),
        "mass": pack(_joined([layer.weight_mass.numpy() for layer in data.layers]).astype(float)),
        "domainCounts": [
            pack(_joined([each.counts.numpy() for each in layers])) for layers in data.by_domain.values()
        ],
        "domainTokens": [[each.tokens for each in layers] for layers in data.by_domain.values()],
    }


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def pack_coactivation(layers: Sequence[LayerStatistics], budget: int = COACTIVATION_BUDGET) -> list[Any]:
    """Pack per layer the pairs `i < j`, row by row.

    None for a layer that did not count them or does not fit the budget; where not all fit, layers at even distances
    stay.
    """
    packed = [None if layer.coactivation is None else pack(_pairs(layer)) for layer in layers]
    sizes = [len(each["data"]) if each else 0 for each in packed]
    step = -(-sum(sizes) // budget) if sum(sizes) > budget else 1
    return [each if position % step == 0 else None for position, each in enumerate(packed)]


def _pairs(layer: LayerStatistics) -> np.ndarray:
    assert layer.coactivation is not None
    return layer.coactivation.numpy()[np.triu_indices(layer.num_experts, 1)]


def pack_tokens(sample: TokenSample, budget: int = TOKEN_BUDGET) -> dict[str, Any]:
    """Pack each different text once, and the tokens' experts and weights slot by slot, strongest first.

    Slots that do not fit the budget are left out. Weights are rounded to 255ths of the layer's largest.
    """
    kept = sample.first(MOST_TOKENS)
    while True:
        packed = _tokens(kept, budget)
        if packed["slots"] or len(kept.texts) < 2:
            return packed
        kept = kept.first(len(kept.texts) // 2)


def _tokens(sample: TokenSample, budget: int) -> dict[str, Any]:
    kind, pieces = _pieces(sample)
    distinct = {piece: position for position, piece in enumerate(dict.fromkeys(pieces))}
    packed: dict[str, Any] = {
        "total": sample.total,
        "shows": kind,
        "texts": pack(sample.texts.astype(np.int64)),
        "domains": pack(sample.domains.astype(np.int64) + 1),
        "pieces": {"type": "json", "data": _squeeze(json.dumps(list(distinct)).encode())},
        "piece": pack(np.array([distinct[piece] for piece in pieces], dtype=np.int64)),
    }
    used = sum(len(each["data"]) for each in packed.values() if isinstance(each, dict))
    scales, slots = _slots(sample)
    packed["scales"] = scales
    packed["slotsInTrace"] = len(slots)
    packed["slots"] = []
    for experts, weights in slots:
        slot = {"experts": pack(experts), "weights": pack(weights)}
        used += len(slot["experts"]["data"]) + len(slot["weights"]["data"])
        if used > budget:
            break
        packed["slots"].append(slot)
    return packed


def _pieces(sample: TokenSample) -> tuple[str, list[str]]:
    """Kind and list of what represents each token: its text, else its id, else its place."""
    if sample.pieces is not None:
        return "text", list(map(visible_token, sample.pieces))
    if sample.token_ids is not None:
        return "ids", [f"#{each}" for each in sample.token_ids.tolist()]
    return "places", [str(each) for each in sample.positions.tolist()]


def _slots(sample: TokenSample) -> tuple[list[float], list[tuple[np.ndarray, np.ndarray]]]:
    """Per layer the largest weight; per slot, strongest first, `[layers * N]` experts and weights in 255ths of it."""
    if not sample.experts:
        return [], []
    weights = np.nan_to_num(np.stack(sample.weights).astype(np.float64)).clip(min=0)
    order = np.argsort(-weights, axis=-1, kind="stable")
    experts = np.take_along_axis(np.stack(sample.experts).astype(np.int64), order, axis=-1)
    weights = np.take_along_axis(weights, order, axis=-1)
    scales = weights.max(axis=(1, 2), initial=0.0)
    rounded = np.round(weights / np.where(scales, scales, 1)[:, None, None] * 255).astype(np.int64)
    slots = [(experts[..., slot].ravel(), rounded[..., slot].ravel()) for slot in range(experts.shape[-1])]
    return scales.tolist(), slots
