"""Single experts in a benchmark: which ones it uses, and what it loses without the most used ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_moe.evaluation.harness import HfMoeLM
from hf_moe.evaluation.masking import MaskError, mask_experts
from hf_moe.evaluation.paired import paired_differences
from hf_moe.evaluation.results import Sample
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

    def by_layer(self) -> list[dict[str, Any]]:
        """Share of the assignments of each expert, and their balance: one entry a layer, JSON values."""
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


def masked_metrics(
    lm: HfMoeLM,
    layers: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    again: Callable[[int], list[Sample]],
    *,
    count: int,
    limit: int,
) -> list[dict[str, Any]]:
    """One entry for each of the `count` most used experts: the paired differences, masked minus unmasked.

    Args:
        layers: Expert use, as `ExpertUse.by_layer` gives it.
        samples: Of the unmasked run.
        again: Runs the first so many documents once more.
        limit: Documents of each masked run.
    """
    filters = len({sample["filter"] for sample in samples})
    documents = min(limit, len(samples) // filters)
    kept = _first_documents(samples, documents)
    shares = {layer["layer"]: layer["share"] for layer in layers}
    entries = []
    for name, expert in most_used(layers, count):
        with mask_experts(lm.model, {name: [expert]}):
            masked = again(documents)
        differences = paired_differences(kept, masked)
        entries.append(
            {
                "layer": name,
                "expert": expert,
                "share": shares[name][expert],
                "documents": documents,
                "metrics": {key: difference.to_dict() for key, difference in differences.items()},
            }
        )
    return entries


def _first_documents(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first `count` documents under each filter."""
    seen: dict[str, int] = {}
    kept = []
    for sample in samples:
        seen[sample["filter"]] = seen.get(sample["filter"], 0) + 1
        if seen[sample["filter"]] <= count:
            kept.append(sample)
    return kept


@torch.no_grad()
def mask_refusal(lm: HfMoeLM) -> str | None:
    """Mask one expert in every layer on a short row: the reason why this model refuses it, or None."""
    try:
        with mask_experts(lm.model, {layer.name: [0] for layer in moe_layers(lm.model) if layer.num_experts > 1}):
            lm.model(input_ids=torch.ones(1, 4, dtype=torch.long, device=lm.device), use_cache=False)
    except (MaskError, ValueError) as error:
        return str(error)
    return None
