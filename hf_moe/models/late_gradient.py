"""Gradients for tensors that a reentrant gradient checkpoint computes inside and a loss reads outside.

Such a checkpoint (`use_reentrant=True`) runs its part of the model without gradients, and once more with them in the
backward. What a loss read of the first run, a router's logits, then has no gradient. `attach` gives it one, and keeps
what arrives there; `deliver` hands that to the second run. A third tensor, through which the output of the part flows
on, ties the two: autograd then runs the one before the other, in every mode, with any scaling of the loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .outputs import HfMoeModelOutputWithPast
from .routing import RoutingDecision


class LateGradient:
    """The gradient of the tensors that one run of one layer gave away without a graph."""

    def __init__(self) -> None:
        self.is_awaited = False
        self.arrived: tuple[Tensor, ...] | None = None

    def attach(self, through: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outside: both as they are, to be used in their place; the gradient of `tensors` is kept for `deliver`.

        Args:
            through: What the layer's output flows into, and the loss depends on.
            tensors: What the first run gave, without gradients.
        """
        self.is_awaited = True
        through, *attached = _Attach.apply(self, through, *tensors)
        return through, tuple(attached)

    def deliver(self, through: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Inside, in the second run: `through` as it is; its backward also sends the kept gradient into `tensors`."""
        return _Deliver.apply(self, through, *tensors)


def attach_late_gradients(late: Sequence[LateGradient], outputs: HfMoeModelOutputWithPast) -> None:
    """Give gradients to those decisions in `outputs`, one for each of `late`, that were computed without."""
    hidden_states, decisions = outputs.last_hidden_state, []
    for gradient, decision in zip(late, outputs.router_decisions or (), strict=True):
        if not decision.scores.requires_grad:
            hidden_states, (logits, scores) = gradient.attach(hidden_states, decision[:2])
            decision = RoutingDecision(logits, scores, decision.choice)
        decisions.append(decision)
    outputs.last_hidden_state, outputs.router_decisions = hidden_states, tuple(decisions)
    if outputs.router_logits is not None:
        outputs.router_logits = tuple(decision.router_logits for decision in decisions)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, late: LateGradient, through: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.late = late
        return tuple(tensor.view_as(tensor) for tensor in (through, *tensors))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *arrived: Tensor) -> tuple[Any, ...]:
        ctx.late.arrived = arrived
        return None, gradient, *(None for _ in arrived)


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, late: LateGradient, through: Tensor, *tensors: Tensor) -> Tensor:
        ctx.late, ctx.count = late, len(tensors)
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # none: a backward that did not come through the outside, from the output of an early layer
        arrived, ctx.late.arrived = ctx.late.arrived or (None,) * ctx.count, None
        return None, gradient, *arrived
