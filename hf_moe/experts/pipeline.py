"""The steps of an MoE layer's experts, over whatever engine multiplies the matrices.

An engine brings `grouped_linear`, one matrix product for each expert, and where it can `experts`, the whole layer as
one fused operation. The fused one runs if it knows the gate; otherwise the steps run one by one with the module's own
code between the products.

Shape suffixes: T tokens, K slots per token, N = T * K routed rows, E experts, H hidden size, P pre-activation width, I
expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_moe.experts.contract import ExpertWeights, gate_of, has_post_expert_norm, num_expert_ids
from hf_moe.experts.dispatch import CombineRows, GatherRows, sort_by_expert


@dataclass(frozen=True)
class Engine:
    """What multiplies the matrices.

    Attributes:
        grouped_linear: `(rows_NA, weight, bias, expert_end_E, transposed) -> rows_NB`, differentiable; rows in expert
            order, zeros for rows after the last expert's.
        experts: `(hidden_TH, index_TK, weights_TK, up, up_bias, down, down_bias, num_ids, activation, alpha, limit,
            offset, gated, transposed, interleaved) -> out_TH`, differentiable; see `Gate` for the scalars.
    """

    grouped_linear: Callable[..., Tensor]
    experts: Callable[..., Tensor] | None = None


def run_experts(
    engine: Engine,
    experts: Any,
    weights: ExpertWeights,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """An experts forward of the host's contract.

    Args:
        experts: A module under the host's `use_experts_implementation` decorator.
        weights: Of `experts`, as `read_weights` gives them.
        hidden_states: `[T, H]`, computed in the dtype of the weights (under autocast it differs).
        top_k_index: `[T, K]`, integer.
        top_k_weights: `[T, K]`.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.

    Raises:
        IndexError: On the CPU, for an expert id out of range. On a GPU a device-side assertion fails.
    """
    hidden_TH, index_TK = hidden_states.to(weights.down.dtype), top_k_index.to(torch.int64)
    # the weights decide the dtype; autocast would change it between the steps
    with torch.autocast(hidden_TH.device.type, enabled=False):
        out_TH = _run(engine, experts, weights, hidden_TH, index_TK, top_k_weights)
    return out_TH.to(hidden_states.dtype)


def _run(
    engine: Engine, experts: Any, weights: ExpertWeights, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    num_ids, gate = num_expert_ids(experts, len(weights.down)), gate_of(experts)
    if engine.experts is None or gate is None or has_post_expert_norm(experts):
        return _run_steps(engine.grouped_linear, experts, weights, hidden_TH, index_TK, weights_TK, num_ids)
    return engine.experts(
        hidden_TH,
        index_TK,
        weights_TK,
        *weights,
        num_ids,
        gate.activation,
        gate.alpha,
        gate.limit,
        gate.offset,
        experts.has_gate,
        experts.is_transposed,
        not experts.is_concatenated,
    )


def _run_steps(
    grouped_linear: Callable[..., Tensor],
    experts: Any,
    weights: ExpertWeights,
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    num_ids: int,
) -> Tensor:
    order_N, expert_end_E = sort_by_expert(index_TK, len(weights.down), num_ids)
    rows_NH = GatherRows.apply(hidden_TH, order_N, index_TK.shape[1])
    pre_NP = grouped_linear(rows_NH, weights.up, weights.up_bias, expert_end_E, experts.is_transposed)
    act_NI = (experts._apply_gate(pre_NP) if experts.has_gate else experts.act_fn(pre_NP)).to(pre_NP.dtype)
    out_NH = grouped_linear(act_NI, weights.down, weights.down_bias, expert_end_E, experts.is_transposed)
    if has_post_expert_norm(experts):
        out_NH = experts.post_expert_norm(out_NH)
    if num_ids > len(weights.down):
        # a norm with a bias makes something of the rows that nobody computes here
        row_N = torch.arange(len(order_N), device=order_N.device)
        out_NH = out_NH.masked_fill((row_N >= expert_end_E[-1]).unsqueeze(-1), 0.0)
    return CombineRows.apply(out_NH, weights_TK, order_N)
