"""How the tokens are spread over the experts: counts per layer, and two figures of balance."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_moe.models.moe_layers import MoeLayer
from hf_moe.observability.router_hooks import watch_choices


class ExpertLoad:
    """Assignments (token, expert) counted since the last `clear`, per MoE layer in the model's order."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}
        """By the layer's name an int64 tensor of shape (num_experts,); a layer that has not run is absent."""

    def clear(self) -> None:
        self.counts = {}

    def add(self, layer: MoeLayer, index: Tensor) -> None:
        counts = torch.bincount(index.flatten(), minlength=layer.num_experts + 1)[: layer.num_experts].cpu()
        self.counts[layer.name] = self.counts[layer.name] + counts if layer.name in self.counts else counts


@contextmanager
def count_expert_load(model: nn.Module, *, training_only: bool = False) -> Iterator[ExpertLoad]:
    """Count the experts that the routers choose while the block runs.

    Every token that reaches a router counts, padding included; slots without an expert (null experts, dropped tokens:
    index `num_experts`) do not. Recomputation under gradient checkpointing counts twice: shares stay as they are.

    Args:
        training_only: Count only forward passes in training mode (a Trainer evaluates in between).

    Raises:
        ValueError, TypeError: As `watch_choices`.
    """
    load = ExpertLoad()

    def count(layer: MoeLayer, router: nn.Module, index: Tensor) -> None:
        if router.training or not training_only:
            load.add(layer, index)

    with watch_choices(model, count):
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
