"""Balancing terms of one layer, from decisions as `watch_routing` hands them over. Pure functions.

Shape suffixes: T tokens, X experts that the router scores (real, then null), E real experts, K slots per token,
B rows of the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_moe.layers.router_scores import RouterScores
from hf_moe.layers.watch_routing import Routing
from hf_moe.models.routing import RoutingDecision


def routing_choice(event: Routing, num_choices: int) -> Tensor:
    """Ids `[T, K]` in `[0, X]` of what each slot went to; `X` is an unused slot.

    hf_moe's routers tell, also what capacity dropped. Other routers that score null experts (X > E) show a slot of
    theirs as the id `E`, or as any id with the weight 0 (Zaya); which of them it was does not show, nor does it
    matter: their load is pooled.
    """
    if event.choice is not None:
        return event.choice.reshape(-1, event.choice.shape[-1])
    index_TK = event.index.long()
    if num_choices > event.layer.num_experts:
        index_TK = index_TK.masked_fill(event.weights == 0, event.layer.num_experts)
    return index_TK


def assignment_counts(choice_TK: Tensor, num_choices: int, mask_T: Tensor | None) -> Tensor:
    """Assignments `[X]`, int64, of the tokens that are not padding."""
    used = torch.ones_like(choice_TK)
    if mask_T is not None:
        used = used * mask_T[:, None].to(used)
    counts = used.new_zeros(num_choices + 1)  # the last one gathers the unused slots
    return counts.scatter_add(0, choice_TK.flatten(), used.flatten())[:num_choices]


def joined_decision(events: Sequence[Routing], scores: RouterScores) -> tuple[RoutingDecision, Tensor | None]:
    """The decisions of all forwards of one layer in a micro-batch as one, and the mask of its tokens."""
    decisions = [_decision(event, scores) for event in events]
    joined = RoutingDecision(*(torch.cat(parts) for parts in zip(*decisions, strict=True)))
    if all(event.mask is None for event in events):
        return joined, None
    masks = [
        decision.choice.new_ones(len(decision.choice), dtype=torch.bool)
        if event.mask is None
        else event.mask.to(decision.choice.device)
        for event, decision in zip(events, decisions, strict=True)
    ]
    return joined, torch.cat(masks)


def _decision(event: Routing, scores: RouterScores) -> RoutingDecision:
    assert event.logits is not None  # checked when it was added
    logits = event.logits if event.logits.dtype == torch.float64 else event.logits.float()
    choice = routing_choice(event, event.logits.shape[-1])
    return RoutingDecision(logits, scores(logits), choice.to(logits.device))


def sequence_balancing_loss(
    decision: RoutingDecision, num_experts: int, num_rows: int, mask_T: Tensor | None = None
) -> Tensor:
    """`X * sum(f * P)` of each row of the batch on its own, averaged over the rows with their tokens as weights.

    Null experts are pooled, as in `load_balancing_loss`. Source: DeepSeek-V3 (arXiv:2412.19437), equations 17 to 20.

    Raises:
        ValueError: If the tokens are not those of `num_rows` rows of one length.
    """
    num_tokens, num_choices = decision.scores.shape
    if num_tokens % num_rows:
        raise ValueError(
            f"aux_loss_scope='sequence' needs every token of a row in every layer: {num_tokens} tokens of {num_rows} "
            "rows reached a layer. Use 'layer' or 'global_batch'."
        )
    scores_TX = decision.scores
    is_token_T = torch.ones_like(scores_TX[:, 0], dtype=torch.bool) if mask_T is None else mask_T.bool()
    # where, not a product: masked rows may hold NaN or inf
    total_T1 = scores_TX.sum(-1, keepdim=True).clamp_min(torch.finfo(scores_TX.dtype).tiny)
    probability_TX = torch.where(is_token_T[:, None], scores_TX / total_T1, 0.0)
    tokens_B = is_token_T.view(num_rows, -1).sum(-1)
    probability_BX = probability_TX.view(num_rows, -1, num_choices).sum(1) / tokens_B.clamp_min(1)[:, None]

    used_TK = is_token_T[:, None].expand_as(decision.choice).to(scores_TX.dtype)
    counts_BX = scores_TX.new_zeros(num_rows, num_choices + 1).scatter_add(
        1, decision.choice.view(num_rows, -1), used_TK.reshape(num_rows, -1)
    )[:, :num_choices]
    load_BX = counts_BX / counts_BX.sum(-1, keepdim=True).clamp_min(1)
    if num_choices > num_experts:
        load_BX, probability_BX = (_pool_null(share, num_experts) for share in (load_BX, probability_BX))
    loss_B = num_choices * (load_BX * probability_BX).sum(-1)
    return (loss_B * tokens_B).sum() / tokens_B.sum().clamp_min(1)


def _pool_null(share_BX: Tensor, num_experts: int) -> Tensor:
    null = share_BX[:, num_experts:]
    return torch.cat([share_BX[:, :num_experts], null.mean(-1, keepdim=True).expand_as(null)], dim=-1)
