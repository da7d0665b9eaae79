"""Routing: which experts a token goes to, and with what weight. Pure functions on tensors.

Shape suffixes: T tokens, E experts, X = E + null experts, K slots per token, N = T*K assignments, C capacity.

A slot that a token does not use holds the id `E` (in `top_k_index`) and the weight 0: the id that the expert backends
of transformers skip. In `choice`, before null experts and dropped assignments become unused, it holds the id `X`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .configuration_hf_moe import HfMoeConfig


class RoutingDecision(NamedTuple):
    """The choice of a router, for the balancing losses: they take it and never choose again.

    Attributes:
        router_logits: `[T, X]`, float32.
        scores: `[T, X]`, float32, softmax or sigmoid of the logits.
        choice: `[T, K]`, int64 ids in `[0, X]`, before capacity drops any; `X` is an unused slot.
    """

    router_logits: Tensor
    scores: Tensor
    choice: Tensor


class RouterOutput(NamedTuple):
    """Output of a router; the first three are the contract of transformers.

    Attributes:
        router_logits: `[T, X]`, float32.
        top_k_weights: `[T, K]`, float32, 0 in unused slots.
        top_k_index: `[T, K]`, int64 ids in `[0, E]`; `E` is an unused slot.
        decision: What the balancing losses take.
    """

    router_logits: Tensor
    top_k_weights: Tensor
    top_k_index: Tensor
    decision: RoutingDecision


def route(
    router_logits: Tensor, config: HfMoeConfig, bias_X: Tensor | None, training: bool, token_mask_T: Tensor | None
) -> RouterOutput:
    """Score, choose, weigh, and in training drop what is over the capacity, as `config` says.

    Args:
        router_logits: `[T, X]`, float32 or float64.
        bias_X: Added to the scores for the choice alone.
        token_mask_T: False for padding, which takes no capacity and is chosen by no expert.
    """
    num_experts = router_logits.shape[-1] - config.num_null_experts
    is_softmax = config.router_scoring == "softmax"
    scores = router_logits.softmax(-1) if is_softmax else router_logits.sigmoid()
    # the choice itself has no gradient, the weights have
    choice = _choose(scores.detach(), config, bias_X, token_mask_T)
    weights, index = slot_weights(
        scores,
        choice,
        num_experts,
        # all the probabilities add up to 1 already
        normalize=config.norm_topk_prob and not (config.routing == "dense" and is_softmax),
        scale=config.routed_scaling_factor,
        epsilon=0.0 if is_softmax else 1e-20,
    )
    if training and config.capacity_factor is not None and config.routing != "expert_choice":
        capacity = expert_capacity(scores.shape[0], num_experts, config)
        weights, index = drop_over_capacity(weights, index, num_experts, capacity, config.drop_policy, token_mask_T)
    return RouterOutput(router_logits, weights, index, RoutingDecision(router_logits, scores, choice))


def _choose(scores_TX: Tensor, config: HfMoeConfig, bias_X: Tensor | None, token_mask_T: Tensor | None) -> Tensor:
    """Ids `[T, K]` in `[0, X]`."""
    if config.routing == "dense":
        return choose_all(scores_TX)
    if config.routing == "top_p":
        return choose_top_p(scores_TX, config.num_experts_per_tok, config.router_top_p)
    if config.routing == "expert_choice":
        num_tokens, num_experts = scores_TX.shape  # without null experts
        return choose_tokens(
            scores_TX, min(num_tokens, expert_capacity(num_tokens, num_experts, config)), token_mask_T
        )
    return choose_top_k(
        scores_TX,
        config.num_experts_per_tok,
        bias_X,
        config.n_group,
        config.topk_group,
        best_per_group=2 if config.router_scoring == "sigmoid" else 1,
    )


def expert_capacity(num_tokens: int, num_experts: int, config: HfMoeConfig) -> int:
    """Assignments that an expert may take of `num_tokens` tokens, whose slots are spread over `num_experts`."""
    factor = 1.0 if config.capacity_factor is None else config.capacity_factor
    return math.ceil(factor * num_tokens * config.num_experts_per_tok / num_experts)


def choose_top_k(
    scores_TX: Tensor,
    num_slots: int,
    bias_X: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    best_per_group: int = 1,
) -> Tensor:
    """The `num_slots` experts with the highest score of each token, best first: ids `[T, K]`.

    Args:
        bias_X: Added to the scores for the choice alone (loss-free balancing, arXiv:2408.15664).
        n_group: Groups of consecutive experts; only the best `topk_group` of them are open to a token.
        best_per_group: Scores of a group that are summed to rank it: 1 in DeepSeek-V2, 2 in DeepSeek-V3.
    """
    if bias_X is not None:
        scores_TX = scores_TX + bias_X
    if n_group > 1:
        scores_TX = _close_groups(scores_TX, n_group, topk_group, best_per_group)
    return torch.topk(scores_TX, num_slots, dim=-1).indices


def _close_groups(scores_TX: Tensor, n_group: int, topk_group: int, best_per_group: int) -> Tensor:
    grouped = scores_TX.unflatten(-1, (n_group, -1))
    rank = grouped.topk(best_per_group, dim=-1).values.sum(-1)
    best = rank.topk(topk_group, dim=-1).indices
    is_open = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best, True)
    return grouped.masked_fill(~is_open[..., None], -torch.inf).flatten(-2)


def choose_top_p(scores_TE: Tensor, num_slots: int, threshold: float) -> Tensor:
    """The fewest experts, best first, whose scores add up to `threshold`, at most `num_slots`: ids `[T, K]`.

    Source: Huang et al. 2024 (arXiv:2403.07652).
    """
    best_TK, choice_TK = torch.topk(scores_TE, num_slots, dim=-1)
    reached_before_TK = torch.nn.functional.pad(best_TK.cumsum(-1)[:, :-1], (1, 0))
    return choice_TK.masked_fill(reached_before_TK >= threshold, scores_TE.shape[-1])


def choose_all(scores_TE: Tensor) -> Tensor:
    """Every expert for every token: ids `[T, E]`."""
    num_tokens, num_experts = scores_TE.shape
    return torch.arange(num_experts, device=scores_TE.device).expand(num_tokens, num_experts)


def choose_tokens(scores_TE: Tensor, num_tokens_per_expert: int, token_mask_T: Tensor | None = None) -> Tensor:
    """Every expert takes the tokens that score highest with it: ids `[T, E]`, `E` where it does not take the token.

    Tokens whose mask is False are never taken. Source: Zhou et al. 2022 (arXiv:2202.09368).
    """
    num_experts = scores_TE.shape[-1]
    if token_mask_T is not None:
        scores_TE = scores_TE.masked_fill(~token_mask_T[:, None], -torch.inf)
    taken_CE = scores_TE.topk(num_tokens_per_expert, dim=0).indices
    is_taken_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(0, taken_CE, True)
    if token_mask_T is not None:
        is_taken_TE = is_taken_TE & token_mask_T[:, None]
    return choose_all(scores_TE).masked_fill(~is_taken_TE, num_experts)


def slot_weights(
    scores_TX: Tensor, choice_TK: Tensor, num_experts: int, normalize: bool, scale: float, epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weights and ids of the chosen experts.

    Args:
        choice_TK: Ids in `[0, X]`; those from `num_experts` on (null experts, unused slots) get weight 0.
        normalize: Divide a token's weights by their sum; a token without a real expert keeps zeros.
        epsilon: Added to that sum (1e-20 in DeepSeek-V3).

    Returns:
        `weights_TK` in the dtype of the scores, and `index_TK`, ids in `[0, num_experts]`.
    """
    weights_TK = scores_TX.gather(-1, choice_TK.clamp(max=scores_TX.shape[-1] - 1))
    weights_TK = weights_TK.masked_fill(choice_TK >= num_experts, 0.0)
    if normalize:
        total_T1 = weights_TK.sum(dim=-1, keepdim=True) + epsilon
        weights_TK = weights_TK / total_T1.masked_fill(total_T1 == 0, 1.0)
    return weights_TK * scale, choice_TK.clamp(max=num_experts)


def drop_over_capacity(
    weights_TK: Tensor,
    index_TK: Tensor,
    num_experts: int,
    capacity: int,
    policy: str,
    token_mask_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Leave every expert at most `capacity` assignments; the others become unused slots, weights are not renormalised.

    Args:
        policy: `"position"` keeps an expert's first assignments, `"probability"` those with the largest weight.
        token_mask_T: Tokens with False take no capacity and go to no expert.

    Source: Lepikhin et al. 2020 (arXiv:2006.16668), Fedus et al. 2021 (arXiv:2101.03961).
    """
    if token_mask_T is not None:
        index_TK = index_TK.masked_fill(~token_mask_T[:, None], num_experts)
    index_N = index_TK.flatten()
    if policy == "probability":
        priority_N = weights_TK.detach().flatten().argsort(descending=True, stable=True)
    else:
        priority_N = torch.arange(index_N.numel(), device=index_N.device)
    sorted_N, order_N = index_N[priority_N].sort(stable=True)
    first_N = torch.searchsorted(sorted_N, sorted_N)
    rank_N = torch.empty_like(index_N)
    rank_N[priority_N[order_N]] = torch.arange(index_N.numel(), device=index_N.device) - first_N
    is_unused_TK = (rank_N >= capacity).view_as(index_TK) | (index_TK == num_experts)
    return weights_TK.masked_fill(is_unused_TK, 0.0), index_TK.masked_fill(is_unused_TK, num_experts)


def pack_assignments(weights_TE: Tensor, index_TE: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` used slots of a decision, in token order, as rows of one slot each.

    `count` is known beforehand, so shapes stay static: `token [count]`, `weight [count, 1]`, `index [count, 1]`. Where
    fewer slots are used, the rest are unused ones (weight 0).
    """
    num_slots = index_TE.shape[-1]
    is_unused_N = (index_TE == num_slots).flatten()
    slot = is_unused_N.to(torch.uint8).argsort(stable=True)[:count]
    return slot // num_slots, weights_TE.flatten()[slot, None], index_TE.flatten()[slot, None]
