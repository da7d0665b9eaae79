"""What a benchmark loses without each of its most used experts, document by document."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hf_moe.evaluation.expert_metrics import most_used
from hf_moe.evaluation.harness import HfMoeLM
from hf_moe.evaluation.masking import MaskError, mask_experts
from hf_moe.evaluation.paired import paired_differences
from hf_moe.evaluation.samples import Sample
from hf_moe.layers.moe_layers import moe_layers


def masked_figures(
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
        layers: Expert use, as `ExpertUse.figures` gives it.
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
def refusal(lm: HfMoeLM) -> str | None:
    """Why this model's experts cannot be masked, or None: found out by masking one in every layer of a short row."""
    try:
        with mask_experts(lm.model, {layer.name: [0] for layer in moe_layers(lm.model) if layer.num_experts > 1}):
            lm.model(input_ids=torch.ones(1, 4, dtype=torch.long, device=lm.device), use_cache=False)
    except (MaskError, ValueError) as error:
        return str(error)
    return None
