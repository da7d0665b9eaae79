"""Agreement of two models, or two checkpoints of one: how often they send a token to the same experts."""

from typing import Any

# one import a line: `evaluate` reads these lines to see what the module needs
import datasets
import evaluate

_DESCRIPTION = """
Agreement of two routings of the same tokens in one layer of a Mixture-of-Experts: freezing a router does not freeze
the routing, since the hidden states that it reads move. Every prediction and reference is one token's chosen experts.
"""
_KWARGS = """
Args:
    predictions: shape [tokens, experts per token], integer ids; their order within a token does not count.
    references: the same of the other model, for the same tokens.
Returns:
    same_set: share of the tokens whose set of experts is the same, from 0 to 1.
    overlap: mean share of a token's reference experts that were also chosen, from 0 to 1. Between a checkpoint and the
        final one this is the router saturation of Muennighoff et al. 2024.
Examples:
    >>> metric = evaluate.load(metric_path("routing_agreement"))
    >>> metric.compute(predictions=[[0, 1], [2, 3]], references=[[1, 0], [2, 5]])
    {'same_set': 0.5, 'overlap': 0.75}
"""
_CITATION = """
@article{muennighoff2024olmoe,
  title = {OLMoE: Open Mixture-of-Experts Language Models},
  author = {Muennighoff, Niklas and Soldaini, Luca and Groeneveld, Dirk and others},
  journal = {arXiv preprint arXiv:2409.02060},
  year = {2024},
}
"""


class RoutingAgreement(evaluate.Metric):
    """`overlap` is the router saturation of Muennighoff et al. 2024 (arXiv:2409.02060, section 5.1)."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"predictions": ids, "references": ids}),
            reference_urls=["https://arxiv.org/abs/2409.02060"],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        pairs = [(set(mine), set(other)) for mine, other in zip(predictions, references, strict=True)]
        if not pairs or not all(other for _, other in pairs):
            raise ValueError("every token needs at least one reference expert, and there must be a token.")
        return {
            "same_set": sum(mine == other for mine, other in pairs) / len(pairs),
            "overlap": sum(len(mine & other) / len(other) for mine, other in pairs) / len(pairs),
        }
