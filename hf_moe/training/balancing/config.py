"""Terms to balance by, and their weights."""

import math
from dataclasses import dataclass

from hf_moe.layers.router_scores import SCORES

SCOPES = ("layer", "global_batch", "sequence")


@dataclass(frozen=True)
class BalancingConfig:
    """The balancing terms of a training run; a term whose weight is 0 is off. Each layer is balanced on its own.

    Attributes:
        aux_loss_coef: Weight of the load balancing loss, the mean over the layers of `X * sum(f * P)`: 1 is balanced.
            Usual: 0.001 to 0.02; 0.0001 beside a bias update (arXiv:2412.19437).
        aux_loss_scope: Whose load `f` is. `"global_batch"`: that of the optimizer step over all processes
            (arXiv:2501.11873); of the micro-batches up to this one, since later ones have not run. `"layer"`: of the
            micro-batch alone. `"sequence"`: of each row of the batch alone, probabilities too (DeepSeek-V3,
            arXiv:2412.19437, equations 17 to 20); the mean over the rows weighs them by their tokens.
        z_loss_coef: Weight of the mean of `logsumexp(logits) ** 2` over tokens and layers (arXiv:2202.08906). Usual:
            0.001.
        bias_update_rate: After each optimizer step the correction bias of each expert goes up by this where the expert
            had less than the mean load of the step over all processes, and down where it had more: no loss, no
            gradient (arXiv:2408.15664). Usual: 0.001.
        scores: What turns router logits into the scores that `P` is made of; None recognises it in the first forward.
            Name it where the family's rule is not recognised.

    Raises:
        ValueError: For a value out of range, or if nothing is asked for.
    """

    aux_loss_coef: float = 0.0
    aux_loss_scope: str = "global_batch"
    z_loss_coef: float = 0.0
    bias_update_rate: float = 0.0
    scores: str | None = None

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("aux_loss_coef", "z_loss_coef", "bias_update_rate")}
        for name, value in weights.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}. 0 turns it off.")
        if not any(weights.values()):
            raise ValueError(f"BalancingConfig asks for nothing: give one of {', '.join(weights)} a value above 0.")
        if self.aux_loss_scope not in SCOPES:
            raise ValueError(f"aux_loss_scope must be one of {', '.join(SCOPES)}, got {self.aux_loss_scope!r}.")
        if self.scores is not None and self.scores not in SCORES:
            raise ValueError(f"scores must be None or one of {', '.join(SCORES)}, got {self.scores!r}.")

    @property
    def has_loss(self) -> bool:
        """True if a term enters the training loss."""
        return self.aux_loss_coef > 0 or self.z_loss_coef > 0
