"""The definition of correct: routing, experts and losses as loops that read like their definitions.

Slow on purpose and differentiable through scores and weights. Run it in float64 to judge a fast implementation, or in
the implementation's own dtype to learn what rounding alone costs.

Shape suffixes: T tokens, E experts, Z null experts, X = E + Z candidates of the router, K slots per token, H hidden
size, I expert width. The id E in an index is the sentinel: the slot computes nothing. The id X in a choice marks an
unused slot.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# DeepSeek-V3 guards the sum of sigmoid scores with this; a softmax sum of chosen scores is never zero.
SIGMOID_EPSILON = 1e-20

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RouterSpec:
    """Settings of a router. The fields bear the names of the model configuration's and mean the same."""

    num_experts: int
    num_experts_per_tok: int
    routing: str = "top_k"
    router_scoring: str = "softmax"
    router_top_p: float = 0.9
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    num_null_experts: int = 0
    capacity_factor: float | None = None
    drop_policy: str = "position"


class Route(NamedTuple):
    """A routing decision; index in [0, E] says what is computed, choice in [0, X] what was chosen before dropping."""

    logits_TX: Tensor
    scores_TX: Tensor
    weights_TK: Tensor
    index_TK: Tensor
    choice_TK: Tensor


def route(
    hidden_TH: Tensor,
    weight_XH: Tensor,
    spec: RouterSpec,
    *,
    bias_X: Tensor | None = None,
    noise_TH: Tensor | None = None,
    token_mask_T: Tensor | None = None,
    training: bool = False,
) -> Route:
    """Decide which experts compute which token, in float32 or, for float64 hidden states, in float64.

    Args:
        bias_X: Added to the scores to choose experts, never to weigh them.
        noise_TH: Jitter that multiplies the router's input.
        token_mask_T: bool, False for padding, which takes no capacity.
        training: Whether the capacity limit of `top_k` and `top_p` holds.
    """
    logits_TX = router_logits(hidden_TH if noise_TH is None else hidden_TH * noise_TH, weight_XH)
    scores_TX = logits_TX.softmax(-1) if spec.router_scoring == "softmax" else logits_TX.sigmoid()
    valid_T = torch.ones(len(logits_TX), dtype=torch.bool) if token_mask_T is None else token_mask_T
    choose = {"top_k": _top_k, "top_p": _top_p, "dense": _dense, "expert_choice": _expert_choice}[spec.routing]
    choice_TK = choose(scores_TX, spec, bias_X, valid_T)

    computes_TK = choice_TK < spec.num_experts
    weights_TK = _weights(scores_TX, choice_TK, computes_TK, spec)
    if training and spec.capacity_factor is not None and spec.routing in ("top_k", "top_p"):
        share = spec.capacity_factor * len(choice_TK) * spec.num_experts_per_tok / spec.num_experts
        computes_TK = computes_TK & _fits(choice_TK, weights_TK, math.ceil(share), spec, valid_T)
    weights_TK = torch.where(computes_TK, weights_TK, 0.0)
    index_TK = torch.where(computes_TK, choice_TK, spec.num_experts)
    return Route(logits_TX, scores_TX, weights_TK, index_TK, choice_TK)


def router_logits(hidden_TH: Tensor, weight_XH: Tensor) -> Tensor:
    dtype = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    return hidden_TH.to(dtype) @ weight_XH.to(dtype).T


def _top_k(scores_TX: Tensor, spec: RouterSpec, bias_X: Tensor | None, valid_T: Tensor) -> Tensor:
    """The best candidates of every token, best first, out of its best groups."""
    ranked_by_TX = scores_TX.detach() if bias_X is None else scores_TX.detach() + bias_X
    rows = []
    for ranked_by_X in ranked_by_TX.tolist():
        open_to_token = _experts_of_best_groups(ranked_by_X, spec) if spec.n_group > 1 else range(len(ranked_by_X))
        rows.append(_best_first(open_to_token, ranked_by_X)[: spec.num_experts_per_tok])
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), spec.num_experts_per_tok)


def _experts_of_best_groups(ranked_by_E: list[float], spec: RouterSpec) -> list[int]:
    """A group ranks by its best expert (softmax, DeepSeek-V2) or the sum of its best two (sigmoid, DeepSeek-V3)."""
    size = spec.num_experts // spec.n_group
    counted = 1 if spec.router_scoring == "softmax" else 2
    groups = [range(g * size, (g + 1) * size) for g in range(spec.n_group)]
    group_scores = [sum(sorted((ranked_by_E[e] for e in group), reverse=True)[:counted]) for group in groups]
    best_groups = _best_first(range(spec.n_group), group_scores)[: spec.topk_group]
    return [expert for g in best_groups for expert in groups[g]]


def _top_p(scores_TE: Tensor, spec: RouterSpec, bias_X: Tensor | None, valid_T: Tensor) -> Tensor:
    """The fewest best experts whose scores add up to `router_top_p`, at most `num_experts_per_tok`."""
    unused = scores_TE.shape[1]
    rows = []
    for scores_E in scores_TE.tolist():
        kept: list[int] = []
        reached = 0.0
        for expert in _best_first(range(unused), scores_E)[: spec.num_experts_per_tok]:
            if kept and reached >= spec.router_top_p:
                break
            kept.append(expert)
            reached += scores_E[expert]
        rows.append(kept + [unused] * (spec.num_experts_per_tok - len(kept)))
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), spec.num_experts_per_tok)


def _dense(scores_TE: Tensor, spec: RouterSpec, bias_X: Tensor | None, valid_T: Tensor) -> Tensor:
    """Every expert for every token, in the order of their ids."""
    return torch.arange(spec.num_experts).repeat(len(scores_TE), 1)


def _expert_choice(scores_TE: Tensor, spec: RouterSpec, bias_X: Tensor | None, valid_T: Tensor) -> Tensor:
    """Every expert takes its best tokens, never padding; slot e is expert e or unused (arXiv:2202.09368)."""
    num_tokens, num_experts = scores_TE.shape
    valid_tokens = valid_T.nonzero().flatten().tolist()
    share = num_tokens * spec.num_experts_per_tok * (spec.capacity_factor or 1.0) / num_experts
    choice_TE = torch.full((num_tokens, num_experts), num_experts)
    for expert in range(num_experts):
        for token in _best_first(valid_tokens, scores_TE[:, expert].tolist())[: math.ceil(share)]:
            choice_TE[token, expert] = expert
    return choice_TE


def _best_first(candidates: Sequence[int], scores: Sequence[float]) -> list[int]:
    return sorted(candidates, key=lambda candidate: -scores[candidate])


def _weights(scores_TX: Tensor, choice_TK: Tensor, computes_TK: Tensor, spec: RouterSpec) -> Tensor:
    """The scores of the chosen experts, divided by their sum if the router normalises, times the scaling factor."""
    padded_TX = F.pad(scores_TX, (0, 1))  # an unused slot reads the appended zero
    weights_TK = torch.where(computes_TK, padded_TX.gather(1, choice_TK), 0.0)
    if spec.norm_topk_prob:
        total_T = weights_TK.sum(-1, keepdim=True)
        total_T = total_T + (SIGMOID_EPSILON if spec.router_scoring == "sigmoid" else 0.0)
        nothing_chosen_T = ~computes_TK.any(-1, keepdim=True)
        weights_TK = weights_TK / total_T.masked_fill(nothing_chosen_T, 1.0)
    return weights_TK * spec.routed_scaling_factor


def _fits(choice_TK: Tensor, weights_TK: Tensor, capacity: int, spec: RouterSpec, valid_T: Tensor) -> Tensor:
    """bool [T, K]: the assignments that an expert of limited capacity keeps."""
    num_tokens, slots = choice_TK.shape
    fits_TK = torch.zeros_like(choice_TK, dtype=torch.bool)
    for expert in range(spec.num_experts):
        pairs = [(t, k) for t in range(num_tokens) for k in range(slots) if valid_T[t] and choice_TK[t, k] == expert]
        if spec.drop_policy == "probability":
            pairs.sort(key=lambda pair: -weights_TK[pair].item())
        for pair in pairs[:capacity]:
            fits_TK[pair] = True
    return fits_TK


def experts(
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    act: Activation = F.silu,
) -> Tensor:
    """The weighted sum of a token's experts [T, H]; J = 2I stacks gate over up. Ids from E on are skipped."""
    rows = []
    for hidden_H, index_K, weights_K in zip(hidden_TH, index_TK.tolist(), weights_TK, strict=True):
        out_H = torch.zeros_like(hidden_H)
        for expert, weight in zip(index_K, weights_K, strict=True):
            if expert < len(gate_up_EJH):
                gate_I, up_I = (gate_up_EJH[expert] @ hidden_H).chunk(2)
                out_H = out_H + (weight * (down_EHI[expert] @ (act(gate_I) * up_I))).to(out_H.dtype)
        rows.append(out_H)
    return torch.stack(rows) if rows else torch.zeros_like(hidden_TH)


def mlp(hidden_TH: Tensor, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor, act: Activation = F.silu) -> Tensor:
    return (act(hidden_TH @ gate_IH.T) * (hidden_TH @ up_IH.T)) @ down_HI.T


@dataclass(frozen=True)
class MoeWeights:
    """Parameters of one MoE block: router [X, H], experts [E, 2I, H], [E, H, I]; `shared` is gate, up, down."""

    router: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    shared: tuple[Tensor, Tensor, Tensor] | None = None
    bias: Tensor | None = None


def moe_block(
    hidden_TH: Tensor,
    weights: MoeWeights,
    spec: RouterSpec,
    *,
    act: Activation = F.silu,
    noise_TH: Tensor | None = None,
    token_mask_T: Tensor | None = None,
    training: bool = False,
) -> tuple[Tensor, Route]:
    """Router, experts and shared experts: the block's output [T, H] and the decision behind it."""
    decision = route(
        hidden_TH,
        weights.router,
        spec,
        bias_X=weights.bias,
        noise_TH=noise_TH,
        token_mask_T=token_mask_T,
        training=training,
    )
    out_TH = experts(hidden_TH, decision.index_TK, decision.weights_TK, weights.gate_up_proj, weights.down_proj, act)
    if weights.shared is not None:
        out_TH = out_TH + mlp(hidden_TH, *weights.shared, act)
    return out_TH, decision


def load_balancing_loss(
    routes: Sequence[Route],
    num_experts: int,
    num_null: int = 0,
    token_mask_T: Tensor | None = None,
    shares_LX: Sequence[Tensor] | None = None,
) -> Tensor:
    """Mean over layers of `X * sum_x f_x P_x`: 1 when balanced, about X when one expert takes all.

    f is the share of the valid tokens' assignments that went to a candidate, P its mean normalised score. Null experts
    are pooled: which of them a token takes makes no difference.

    Args:
        shares_LX: f of every layer, where it comes from more than these tokens (a global batch).
    """
    layers = []
    for layer, decision in enumerate(routes):
        num_candidates = num_experts + num_null
        shares_X = _shares(decision.choice_TK, num_candidates, token_mask_T) if shares_LX is None else shares_LX[layer]
        scores_TX = _valid(decision.scores_TX, token_mask_T)
        probability_X = (scores_TX / scores_TX.sum(-1, keepdim=True)).mean(0)
        total = torch.stack([shares_X[e] * probability_X[e] for e in range(num_experts)]).sum()
        if num_null:
            total = total + shares_X[num_experts:].sum() * probability_X[num_experts:].sum() / num_null
        layers.append(num_candidates * total)
    return torch.stack(layers).mean()


def _shares(choice_TK: Tensor, num_candidates: int, token_mask_T: Tensor | None) -> Tensor:
    chosen = [c for row in _valid(choice_TK, token_mask_T).tolist() for c in row if c < num_candidates]
    return torch.tensor([chosen.count(c) / len(chosen) for c in range(num_candidates)], dtype=torch.float64)


def z_loss(routes: Sequence[Route], token_mask_T: Tensor | None = None) -> Tensor:
    """Mean over layers and valid tokens of the squared log-partition function of the router (arXiv:2202.08906)."""
    layers = [_valid(decision.logits_TX, token_mask_T).logsumexp(-1).square().mean() for decision in routes]
    return torch.stack(layers).mean()


def _valid(values_T: Tensor, token_mask_T: Tensor | None) -> Tensor:
    return values_T if token_mask_T is None else values_T[token_mask_T]
