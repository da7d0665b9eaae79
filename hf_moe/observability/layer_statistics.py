"""Sums over the tokens of one MoE layer, and the metrics of balance that they give.

The sums add up over batches, processes and domains.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over the tokens that reached one layer; on the CPU.

    Attributes:
        name: The layer's name without the prefixes of wrappers (`MoeLayer.plain_name`).
        num_experts: Experts that can be chosen, null and shared ones not counted.
        top_k: Slots of a token.
        tokens: Tokens, padding not counted.
        counts: `[E]` int64, assignments (a token, an expert).
        weight_mass: `[E]` float64, sum of the weights of the assignments.
        empty_slots: Slots without an expert: null experts and assignments dropped over capacity.
        dropped: Of these, the dropped ones; None where the router does not distinguish the two.
        scored_tokens: Tokens whose router probabilities were known: those of the next two sums.
        entropy_sum: Sum of the entropies of the tokens' router probabilities, nats.
        margin_sum: Sum of the differences between the two largest router probabilities of each token.
        coactivation: `[E, E]` int64, tokens that chose both experts; the diagonal is `counts`. None where not counted.
    """

    name: str
    num_experts: int
    top_k: int
    tokens: int
    counts: Tensor
    weight_mass: Tensor
    empty_slots: int = 0
    dropped: int | None = None
    scored_tokens: int = 0
    entropy_sum: float = 0.0
    margin_sum: float = 0.0
    coactivation: Tensor | None = None

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        same = ("name", "num_experts", "top_k")
        if any(getattr(self, field) != getattr(other, field) for field in same):
            raise ValueError(
                f"statistics of different layers cannot be added: {self.name!r} with {self.num_experts} experts, "
                f"top {self.top_k}, and {other.name!r} with {other.num_experts}, top {other.top_k}."
            )
        sums: dict[str, Any] = {}
        for field in (field.name for field in fields(self) if field.name not in same):
            mine, its = getattr(self, field), getattr(other, field)
            sums[field] = None if mine is None or its is None else mine + its
        return replace(self, **sums)

    @property
    def load(self) -> Tensor:
        """Share of the assignments that each expert got, float64; zeros if there were none."""
        return self.counts.double() / max(int(self.counts.sum()), 1)

    @property
    def load_cv(self) -> float:
        """Standard deviation of the load over its mean: 0 is balanced, sqrt(E - 1) is one expert for all."""
        load = self.load
        return float(load.std(correction=0) / load.mean()) if load.any() else math.nan

    @property
    def max_violation(self) -> float:
        """`max_violation` of the counts: 0 is balanced, E - 1 is one expert for all."""
        return max_violation(self.counts) if self.counts.any() else math.nan

    @property
    def load_entropy(self) -> float:
        """`load_entropy` of the counts, from 0 (one expert takes all) to 1 (all take the same)."""
        return load_entropy(self.counts) if self.counts.any() else math.nan

    @property
    def dead_experts(self) -> tuple[int, ...]:
        """Ids of the experts that no token chose."""
        return tuple((self.counts == 0).nonzero().flatten().tolist())

    @property
    def busiest_expert(self) -> int:
        return int(self.counts.argmax())

    @property
    def router_entropy(self) -> float:
        """Mean entropy of the router's probabilities, from 0 (certain) to 1 (all experts alike); NaN if unknown."""
        if not self.scored_tokens or self.num_experts == 1:
            return math.nan
        return self.entropy_sum / self.scored_tokens / math.log(self.num_experts)

    @property
    def margin(self) -> float:
        """Mean difference between the two largest router probabilities of a token; NaN if unknown."""
        return self.margin_sum / self.scored_tokens if self.scored_tokens else math.nan

    @property
    def empty_share(self) -> float:
        """Share of all slots that hold no expert."""
        return self.empty_slots / (self.tokens * self.top_k) if self.tokens else math.nan

    @property
    def drop_share(self) -> float:
        """Share of all slots dropped over the experts' capacity; NaN where that is not known."""
        return math.nan if self.dropped is None or not self.tokens else self.dropped / (self.tokens * self.top_k)


def empty_statistics(name: str, num_experts: int, top_k: int, *, coactivation: bool = True) -> LayerStatistics:
    """Statistics of a layer that no token has reached."""
    return LayerStatistics(
        name=name,
        num_experts=num_experts,
        top_k=top_k,
        tokens=0,
        counts=torch.zeros(num_experts, dtype=torch.int64),
        weight_mass=torch.zeros(num_experts, dtype=torch.float64),
        dropped=0,
        coactivation=torch.zeros(num_experts, num_experts, dtype=torch.int64) if coactivation else None,
    )


def jensen_shannon(load: Tensor, other: Tensor) -> float:
    """Jensen-Shannon divergence of two distributions in bits, from 0 (equal) to 1 (nothing in common).

    Source: Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    mean = (load + other) / 2
    entropies = [torch.special.entr(part.double()).sum() for part in (mean, load, other)]
    value = float(entropies[0] - (entropies[1] + entropies[2]) / 2) / math.log(2)
    return min(max(value, 0.0), 1.0)  # rounding


def load_entropy(counts: Tensor) -> float:
    """Entropy of the load over the experts, from 0 (one expert takes all) to 1 (all take the same).

    Args:
        counts: `[E]`, assignments of each expert, not all zero.

    Raises:
        ValueError: If they are all zero.
    """
    if len(counts) == 1:
        return 1.0
    share = _shares(counts)
    return float(torch.special.entr(share).sum() / math.log(len(share)))


def max_violation(counts: Tensor) -> float:
    """Distance of the busiest expert from the mean load, in mean loads: 0 is balanced, E - 1 is one expert for all.

    Args:
        counts: `[E]`, assignments of each expert, not all zero.

    Raises:
        ValueError: If they are all zero.

    Source: Wang et al. 2024 (arXiv:2408.15664), MaxVio.
    """
    return float(_shares(counts).max() * len(counts) - 1)


def _shares(counts: Tensor) -> Tensor:
    total = counts.sum()
    if not total:
        raise ValueError(
            "expert counts are all zero: no token reached the router. Run the model inside count_expert_load."
        )
    return counts.double() / total
