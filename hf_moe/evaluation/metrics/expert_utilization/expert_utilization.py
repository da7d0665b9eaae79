"""Utilization of the experts of a layer: how evenly the tokens of a text are spread over them."""

from typing import Any

# one import a line: `evaluate` reads these lines to see what the module needs
import datasets
import evaluate
import torch

from hf_moe.observability.layer_statistics import load_entropy, max_violation

_DESCRIPTION = """
Spread of the assignments (token, expert) over the experts of one layer of a Mixture-of-Experts.
Every prediction is one token: the ids of the experts that the router chose for it.
"""
_KWARGS = """
Args:
    predictions: shape [tokens, experts per token], integer ids in [0, num_experts]; the id num_experts marks a slot
        without an expert and does not count. Rows may differ in length.
    num_experts: experts that the router chooses among.
Returns:
    shares: list of num_experts floats, each expert's share of the assignments; they add up to 1.
    entropy: entropy of the shares over log(num_experts), from 0 (one expert takes all) to 1 (all take the same).
    max_violation: how far the busiest expert is above the mean, from 0 (balanced) to num_experts - 1.
    unused: number of experts that no token chose.
Examples:
    >>> metric = evaluate.load(metric_path("expert_utilization"))
    >>> metric.compute(predictions=[[0, 1], [0, 2]], num_experts=4)["shares"]
    [0.5, 0.25, 0.25, 0.0]
"""
_CITATION = """
@article{wang2024auxiliary,
  title = {Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts},
  author = {Wang, Lean and Gao, Huazuo and Zhao, Chenggang and Sun, Xu and Dai, Damai},
  journal = {arXiv preprint arXiv:2408.15664},
  year = {2024},
}
"""


class ExpertUtilization(evaluate.Metric):
    """`max_violation` is the MaxVio of Wang et al. 2024 (arXiv:2408.15664)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            reference_urls=["https://arxiv.org/abs/2408.15664"],
        )

    def _compute(self, predictions: Any, num_experts: int) -> dict[str, Any]:
        index = torch.tensor([expert for token in predictions for expert in token], dtype=torch.int64)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) <= num_experts:
            wrong = int(index.min()) if index.min() < 0 else int(index.max())
            raise ValueError(f"expert ids must lie in [0, {num_experts}] ({num_experts}: no expert), got {wrong}.")
        counts = torch.bincount(index, minlength=num_experts + 1)[:num_experts]
        if not counts.sum():
            raise ValueError("no token was assigned to an expert: there is nothing to measure. Give chosen ids.")
        return {
            "shares": (counts.double() / counts.sum()).tolist(),
            "entropy": load_entropy(counts),
            "max_violation": max_violation(counts),
            "unused": int((counts == 0).sum()),
        }
