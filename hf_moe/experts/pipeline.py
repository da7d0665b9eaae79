"""The steps of an MoE layer's experts, over whatever engine multiplies the matrices.

An engine brings `grouped_linear`, one matrix product for each expert, and where it can `experts`, the whole layer as
one fused operation, and `experts_lora`, the same under adapters. The fused one runs if it knows the gate; otherwise
the steps run one by one with the module's own code between the products.

Shape suffixes: T tokens, K slots per token, N = T * K routed rows, E experts, H hidden size, P pre-activation width, I
expert width, R rank, A and B the widths that one projection maps from and to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe.experts.contract import gate_of, has_post_expert_norm, num_expert_ids
from hf_moe.experts.dispatch import CombineRows, GatherRows, sort_by_expert
from hf_moe.kernels.layer_call import ExpertForm, ExpertWeights, LayerCall, LowRank, LowRankPair


@dataclass(frozen=True)
class Engine:
    """What multiplies the matrices.

    Attributes:
        grouped_linear: `(rows_NA, weight, bias, expert_end_E, transposed) -> rows_NB`, differentiable; rows in expert
            order, zeros for rows after the last expert's.
        experts: `(LayerCall) -> out_TH`, differentiable in every floating tensor.
        experts_lora: The same for calls with adapters, differentiable but for the weights and biases: where these are
            trained too, the steps run.
    """

    grouped_linear: Callable[..., Tensor]
    experts: Callable[..., Tensor] | None = None
    experts_lora: Callable[..., Tensor] | None = None


def run_experts(
    engine: Engine,
    experts: Any,
    weights: ExpertWeights,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    low_rank: LowRankPair | None = None,
) -> Tensor:
    """An experts forward of the host's contract.

    Args:
        experts: A module under the host's `use_experts_implementation` decorator.
        weights: Of `experts`, as `read_weights` gives them.
        hidden_states: `[T, H]`, computed in the dtype of the weights (under autocast it differs).
        top_k_index: `[T, K]`, integer.
        top_k_weights: `[T, K]`.
        low_rank: Adapters on the weights, in their dtype. The sum `W + scale * b @ a` is never built.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.

    Raises:
        IndexError: On the CPU, for an expert id out of range. On a GPU a device-side assertion fails.
    """
    hidden_TH, index_TK = hidden_states.to(weights.down.dtype), top_k_index.to(torch.int64)
    # the weights decide the dtype; autocast would change it between the steps
    with torch.autocast(hidden_TH.device.type, enabled=False):
        out_TH = _run(engine, experts, weights, hidden_TH, index_TK, top_k_weights, low_rank)
    return out_TH.to(hidden_states.dtype)


def _run(
    engine: Engine,
    experts: Any,
    weights: ExpertWeights,
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    low_rank: LowRankPair | None,
) -> Tensor:
    num_ids, gate = num_expert_ids(experts, len(weights.down)), gate_of(experts)
    fused = engine.experts
    if low_rank is not None:
        fused = None if _is_trained(weights) else engine.experts_lora
    if fused is None or gate is None or has_post_expert_norm(experts):
        return _run_steps(engine.grouped_linear, experts, weights, hidden_TH, index_TK, weights_TK, num_ids, low_rank)
    layout = (experts.has_gate, experts.is_transposed, not experts.is_concatenated)
    form = ExpertForm(gate.activation, gate.alpha, gate.limit, gate.offset, *layout)
    return fused(LayerCall(hidden_TH, index_TK, weights_TK, weights, num_ids, form, low_rank))


def _is_trained(weights: ExpertWeights) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in weights)


def _run_steps(
    grouped_linear: Callable[..., Tensor],
    experts: Any,
    weights: ExpertWeights,
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    num_ids: int,
    low_rank: LowRankPair | None,
) -> Tensor:
    order_N, expert_end_E = sort_by_expert(index_TK, len(weights.down), num_ids)
    up, down = low_rank or (None, None)

    def project(rows_NA: Tensor, weight: Tensor, bias: Tensor | None, factors: LowRank | None) -> Tensor:
        rows_NB = grouped_linear(rows_NA, weight, bias, expert_end_E, experts.is_transposed)
        return rows_NB if factors is None else rows_NB + _adapt(grouped_linear, rows_NA, factors, expert_end_E)

    rows_NH = GatherRows.apply(hidden_TH, order_N, index_TK.shape[1])
    pre_NP = project(rows_NH, weights.up, weights.up_bias, up)
    act_NI = (experts._apply_gate(pre_NP) if experts.has_gate else experts.act_fn(pre_NP)).to(pre_NP.dtype)
    out_NH = project(act_NI, weights.down, weights.down_bias, down)
    if has_post_expert_norm(experts):
        out_NH = experts.post_expert_norm(out_NH)
    if num_ids > len(weights.down):
        # a norm with a bias makes something of the rows that nobody computes here
        row_N = torch.arange(order_N.shape[0], device=order_N.device)
        out_NH = out_NH.masked_fill((row_N >= expert_end_E[-1]).unsqueeze(-1), 0.0)
    return CombineRows.apply(out_NH, weights_TK, order_N)


def _adapt(grouped_linear: Callable[..., Tensor], rows_NA: Tensor, factors: LowRank, expert_end_E: Tensor) -> Tensor:
    """What an adapter adds to the rows of a projection `[N, B]`."""
    a, b, scale = factors
    if rows_NA.device.type != "cpu":
        # torch's grouped product takes contiguous rows of whole 16 bytes
        missing = -a.shape[1] % 8
        a, b = F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()
    low_NR = grouped_linear(rows_NA, a, None, expert_end_E, False) * scale
    return grouped_linear(low_NR, b, None, expert_end_E, False)
