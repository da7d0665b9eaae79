"""Rules by which a router's logits become weights, recognised by what the router computed.

Families differ in the scores (softmax, sigmoid, the square root of softplus), in normalising those of the chosen
experts, and in a factor on top; no attribute tells. The logits, ids and weights of one forward do.

Shape suffixes: T tokens, X experts that the router scores, K slots per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    # DeepSeek-V4
    "sqrt_softplus": lambda logits: F.softplus(logits).sqrt(),
    # routers that return scores instead of logits
    "identity": lambda logits: logits,
}


@dataclass(frozen=True)
class RouterScores:
    """`weights = factor * scores(logits)[index]`, the scores of a token's experts first divided by their sum or not.

    Attributes:
        scores: A key of `SCORES`.
        normalized: Whether a token's weights add up to `factor`.
        factor: `routed_scaling_factor` in most configs.
    """

    scores: str
    normalized: bool
    factor: float

    def __call__(self, logits_TX: Tensor) -> Tensor:
        """Scores of all experts `[T, X]`, float32 (float64 for float64 logits), differentiable."""
        return SCORES[self.scores](_precise(logits_TX))

    def probabilities(self, logits_TX: Tensor) -> Tensor:
        """Scores divided by their sum over the experts, `[T, X]`: the `P` of a balancing loss."""
        scores_TX = self(logits_TX)
        return scores_TX / scores_TX.sum(-1, keepdim=True).clamp_min(torch.finfo(scores_TX.dtype).tiny)

    def weights(self, logits_TX: Tensor, index_TK: Tensor) -> Tensor:
        """The weights `[T, K]` that this router gives to the experts `index_TK`; 0 for ids that it does not score."""
        scores_TX = self(logits_TX)
        is_scored = index_TK < scores_TX.shape[-1]
        chosen_TK = scores_TX.gather(-1, index_TK.clamp_max(scores_TX.shape[-1] - 1)) * is_scored
        if self.normalized:
            chosen_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(chosen_TK.dtype).tiny)
        return self.factor * chosen_TK


def recognize_scores(logits_TX: Tensor, index_TK: Tensor, weights_TK: Tensor) -> RouterScores | None:
    """The rule that explains the weights of one forward, or None.

    With one expert per token and normalised weights every rule explains them: softmax then.

    Args:
        logits_TX: What the router returned.
        index_TK: Ids of the chosen experts; slots with ids that the router does not score, or the weight 0, are left
            out of the comparison.
        weights_TK: Their weights.
    """
    logits_TX, weights_TK = _precise(logits_TX.detach()), weights_TK.detach()
    tolerance = 4 * max(float(torch.finfo(weights_TK.dtype).eps), 1e-5)
    for name in SCORES:
        for normalized in (False, True):
            rule = RouterScores(name, normalized, 1.0)
            factor = _factor(rule.weights(logits_TX, index_TK), _precise(weights_TK), tolerance)
            if factor is not None:
                return RouterScores(name, normalized, factor)
    return None


def _factor(expected_TK: Tensor, weights_TK: Tensor, tolerance: float) -> float | None:
    """The one positive factor between the two, or None."""
    used = weights_TK != 0
    expected, weights = expected_TK[used], weights_TK[used]
    if not len(weights) or not bool((expected > 0).all()):
        return None
    ratio = (weights / expected).double()
    factor = float(ratio.median())
    return factor if factor > 0 and bool(((ratio - factor).abs() <= tolerance * factor).all()) else None


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
