"""How the tokens are spread over the experts: counts per layer, and two figures of balance."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_moe.layers.watch_routing import Routing, watch_routing


class ExpertLoad:
    """Assignments (token, expert) counted since the last `clear`, per MoE layer in the model's order."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    @property
    def counts(self) -> dict[str, Tensor]:
        """By the layer's name an int64 tensor of shape (num_experts,); a layer that has not run is absent."""
        return {name: counts[:-1].cpu() for name, counts in self._counts.items()}

    def clear(self) -> None:
        self._counts = {}

    def add(self, routing: Routing) -> None:
        """Count a decision, on the model's device."""
        layer, index = routing.layer, routing.index.detach().clamp(max=routing.layer.num_experts)
        if routing.mask is not None:
            index = index.masked_fill(~routing.mask.to(index.device)[:, None], layer.num_experts)
        # the last entry gathers padding and slots without an expert
        counts = self._counts.get(layer.name, index.new_zeros(layer.num_experts + 1, dtype=torch.int64))
        index_N = index.flatten().long()
        self._counts[layer.name] = counts.scatter_add(0, index_N, torch.ones_like(index_N))


@contextmanager
def count_expert_load(model: nn.Module) -> Iterator[ExpertLoad]:
    """Count the experts that the routers choose while the block runs. `record_routing` tells more.

    Padding (a 2-D attention mask), slots without an expert (null experts, dropped tokens) and the recomputation of
    gradient checkpointing are not counted.

    Raises:
        ValueError, TypeError: As `watch_routing`.
    """
    load = ExpertLoad()

    def count(routing: Routing) -> None:
        if not routing.is_recomputation:
            load.add(routing)

    with watch_routing(model, count):
        yield load


def load_entropy(counts: Tensor) -> float:
    """Entropy of the load over the experts, from 0 (one expert takes all) to 1 (all take the same).

    Args:
        counts: Shape (num_experts,), not all zero.
    """
    if len(counts) == 1:
        return 1.0
    share = _shares(counts)
    return float(torch.special.entr(share).sum() / math.log(len(share)))


def max_violation(counts: Tensor) -> float:
    """How far the most loaded expert is above the mean load: 0 is balanced, `num_experts` - 1 is one expert for all.

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
