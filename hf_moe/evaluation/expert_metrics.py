"""What a benchmark says about single experts: which it uses, and what is lost without the most used ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_moe.evaluation.harness import HfMoeLM
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.layers.watch_routing import Routing, watch_routing
from hf_moe.observability.layer_statistics import load_entropy, max_violation


class ExpertUse:
    """Assignments (token, expert) by MoE layer, padding left out: int64 tensors of shape (num_experts,)."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}
        self.top_k: dict[str, int] = {}

    def add(self, routing: Routing, mask: Tensor | None) -> None:
        """Count one forward of one layer.

        Args:
            mask: `[T]` bool, False for padding; None counts every token.
        """
        index = routing.index if mask is None else routing.index[mask]
        layer = routing.layer
        counts = torch.bincount(index.flatten(), minlength=layer.num_experts + 1)[: layer.num_experts].cpu()
        self.counts[layer.name] = self.counts[layer.name] + counts if layer.name in self.counts else counts
        self.top_k[layer.name] = layer.top_k

    def figures(self) -> list[dict[str, Any]]:
        """By layer: share of the assignments of each expert, and their balance."""
        return [
            {
                "layer": name,
                "experts_per_token": self.top_k[name],
                "share": (counts.double() / counts.sum()).tolist(),
                "entropy": load_entropy(counts),
                "max_violation": max_violation(counts),
                "unused": int((counts == 0).sum()),
            }
            for name, counts in self.counts.items()
            if counts.sum()
        ]


@contextmanager
def count_expert_use(lm: HfMoeLM) -> Iterator[ExpertUse]:
    """Count what the model's routers choose for the tokens of requests while the block runs.

    Nothing is counted for a model without MoE layers.
    """
    use = ExpertUse()

    def count(routing: Routing) -> None:
        mask = routing.mask
        if mask is None and lm.input_mask is not None and lm.input_mask.numel() == len(routing.index):
            mask = lm.input_mask.flatten()
        use.add(routing, mask)

    if not moe_layers(lm.model):
        yield use
        return
    with watch_routing(lm.model, count):
        yield use


def most_used(layers: Sequence[Mapping[str, Any]], count: int) -> list[tuple[str, int]]:
    """The `count` experts with the largest share of their layer, as (layer, expert), largest first."""
    ranked = [
        (share, layer["layer"], expert) for layer in layers for expert, share in enumerate(layer["share"]) if share
    ]
    # stable: of equal shares the earlier layer and expert
    return [(name, expert) for _, name, expert in sorted(ranked, key=lambda entry: -entry[0])[:count]]
