"""Balancing losses from the decisions the routers made. Pure functions on torch alone.

Shape suffixes: T tokens, X experts (real and null), K slots per token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .routing import RoutingDecision


def count_assignments(decision: RoutingDecision, mask_T: Tensor | None = None) -> Tensor:
    """Assignments per expert `[X]` of the tokens whose mask is not 0, in the dtype of the scores (exact to 2**24)."""
    num_choices = decision.scores.shape[-1]
    ones = torch.ones_like(decision.choice, dtype=decision.scores.dtype)
    if mask_T is not None:
        ones = ones * mask_T[:, None].to(ones.dtype)
    counts = ones.new_zeros(num_choices + 1)  # the last one gathers the unused slots
    return counts.scatter_add(0, decision.choice.flatten(), ones.flatten())[:num_choices]


def load_balancing_loss(
    decision: RoutingDecision,
    num_experts: int,
    mask_T: Tensor | None = None,
    counts_X: Tensor | None = None,
) -> Tensor:
    """Load balancing loss of one layer: 1 when balanced, the number of experts when one expert takes all.

    `X * sum(f * P)` with `f` the share of the assignments that went to an expert and `P` its mean score (scores
    divided by their sum over the experts). Null experts (ids from `num_experts` on) are pooled: they compute nothing,
    so the load among them need not be even (arXiv:2406.13233).

    Args:
        mask_T: Tokens with 0 (padding) are left out.
        counts_X: Assignments of a larger batch than this one, to take `f` from (global-batch balancing,
            arXiv:2501.11873); those of this decision when not given.

    Source: Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6, for top-k and for any scores.
    """
    scores_TX = decision.scores
    if counts_X is None:
        counts_X = count_assignments(decision, mask_T)
    load_X = (counts_X / counts_X.sum().clamp_min(1)).to(scores_TX.dtype)
    probability_TX = scores_TX / scores_TX.sum(-1, keepdim=True).clamp_min(torch.finfo(scores_TX.dtype).tiny)
    probability_X = _masked_mean(probability_TX, mask_T)
    if scores_TX.shape[-1] > num_experts:
        load_X, probability_X = (_pool_null(share, num_experts) for share in (load_X, probability_X))
    return scores_TX.shape[-1] * (load_X * probability_X).sum()


def balancing_losses(
    decisions: Sequence[RoutingDecision],
    attention_mask: Tensor | None,
    num_null_experts: int,
    step_counts: "GlobalBatchCounts | None" = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Load balancing loss and router z-loss of a model, each a mean over its MoE layers, on the first one's device.

    Args:
        attention_mask: `[B, S]`, 0 for padding, which is left out; a mask of more dimensions does not tell padding.
        step_counts: Balances over the optimizer step instead of the micro-batch, of which this is the part `share`.
    """
    device = decisions[0].scores.device
    masks = [_token_mask(attention_mask, decision) for decision in decisions]
    counts = [count_assignments(*pair) for pair in zip(decisions, masks, strict=True)]
    if step_counts is not None:
        counts = step_counts.update([layer.to(device) for layer in counts], share)
    balance = [
        load_balancing_loss(
            decision, decision.scores.shape[-1] - num_null_experts, mask, layer.to(decision.scores.device)
        )
        for decision, mask, layer in zip(decisions, masks, counts, strict=True)
    ]
    z = [router_z_loss(*pair) for pair in zip(decisions, masks, strict=True)]
    aux_loss, z_loss = (torch.stack([value.to(device) for value in values]).mean() for values in (balance, z))
    return aux_loss, z_loss


def _token_mask(attention_mask: Tensor | None, decision: RoutingDecision) -> Tensor | None:
    """`[T]`: 0 for padding. A cached prefix in the mask has no tokens here."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    length = decision.scores.shape[0] // attention_mask.shape[0]
    return attention_mask[:, -length:].flatten().to(decision.scores.device)


def share_of_step(
    labels: Tensor | None, num_items_in_batch: Tensor | int | None, shift_labels: Tensor | None
) -> Tensor | None:
    """The part of an optimizer step's items that these labels are, counted as the Trainer counts them."""
    targets = shift_labels if shift_labels is not None or labels is None else labels[..., 1:]
    if num_items_in_batch is None or targets is None:
        return None
    items = torch.as_tensor(num_items_in_batch, device=targets.device, dtype=torch.float32).mean()
    return targets.ne(-100).sum() / items.clamp_min(1)


def router_z_loss(decision: RoutingDecision, mask_T: Tensor | None = None) -> Tensor:
    """Mean over the tokens of `logsumexp(logits) ** 2`, which keeps router logits small (arXiv:2202.08906)."""
    return _masked_mean(decision.router_logits.logsumexp(-1).square(), mask_T)


def _pool_null(share_X: Tensor, num_experts: int) -> Tensor:
    null = share_X[num_experts:]
    return torch.cat([share_X[:num_experts], null.mean().expand_as(null)])


def _masked_mean(values: Tensor, mask_T: Tensor | None) -> Tensor:
    """Mean over the first dimension; 0 when every token is masked."""
    if mask_T is None:
        return values.sum(0) / max(values.shape[0], 1)
    # where, not a product: masked rows may hold NaN or inf
    mask_T = mask_T.bool()
    mask = mask_T.view(-1, *[1] * (values.dim() - 1))
    return torch.where(mask, values, 0.0).sum(0) / mask_T.sum().clamp_min(1)


class GlobalBatchCounts:
    """Assignments per layer over all processes and, within an optimizer step, over the micro-batches so far.

    The micro-batches of a step are recognised by their shares of the step's items, which add up to 1. Nothing is read
    back from the device. Source: Qiu et al. 2025 (arXiv:2501.11873).
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._share: Tensor | None = None

    def update(self, counts: Sequence[Tensor], share: Tensor | None) -> list[Tensor]:
        """Add a micro-batch.

        Args:
            counts: Assignments of this process's micro-batch, `[X]` for each layer.
            share: Items of the micro-batch divided by those of the optimizer step over all processes; `None` when
                unknown: every call then is a step of its own.

        Returns:
            The assignments of the step so far, `[X]` for each layer.
        """
        sizes = [layer.numel() for layer in counts]
        known_share = share if share is not None else counts[0].new_ones(())
        packed = torch.cat([*counts, known_share.detach().to(counts[0]).reshape(1)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(packed)
        total, new_share = packed[:-1], packed[-1]
        if share is not None:
            total, new_share = self._accumulate(total, new_share)
        self._counts, self._share = total, new_share
        return list(total.split(sizes))

    def _accumulate(self, total: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        if self._counts is None or self._share is None or self._counts.shape != total.shape:
            return total, share
        counts, seen = self._counts.to(total.device), self._share.to(total.device)
        # float32 shares of one step add up to 1 within rounding
        is_open = seen < 1 - 1e-3
        return torch.where(is_open, counts + total, total), torch.where(is_open, seen + share, share)
