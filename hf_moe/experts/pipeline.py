"""The steps of an MoE layer's experts, over whatever operators and whatever storage.

A backend brings operators: `grouped_linear`, one matrix product for each expert of a dense stack, and where it can the
whole layer as one fused operation for weights of some format, with or without adapters over them. A fused one runs if
it knows the activation; otherwise the steps run one by one with the module's own code between the products, and where
the weights are no dense tensors the storage itself multiplies by them.

Shape suffixes: T tokens, K slots per token, N = T * K routed rows, E experts, H hidden size, P pre-activation width, I
expert width, R rank, A and B the widths that one projection maps from and to.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe.experts.contract import activation_of, has_post_expert_norm, num_expert_ids
from hf_moe.experts.dispatch import CombineRows, GatherRows, sort_by_expert
from hf_moe.kernels.layer_call import ExpertForm, ExpertWeights, LayerCall, LowRank, LowRankPair
from hf_moe.layers.storage import ExpertStorage, Plan, Projection

# rows times the matrices of a projection
Product = Callable[[Tensor, Projection, Plan], Tensor]


@dataclass(frozen=True)
class Operators:
    """Operators of a backend.

    Attributes:
        grouped_linear: `(rows_NA, weight, bias, expert_end_E, transposed) -> rows_NB`, differentiable; rows in expert
            order, zeros for rows after the last expert's. For dense weights and for the factors of adapters.
        fused: The whole layer, `LayerCall -> out_TH`, by the format of the storage and whether adapters come with the
            call; only where the storage has `operands()`, which the LayerCall then carries. Differentiable, under
            adapters but for the weights and biases: where these are trained too, the steps run.
    """

    grouped_linear: Callable[..., Tensor]
    fused: Mapping[tuple[str, bool], Callable[..., Tensor]] = field(default_factory=dict)


def run_experts(
    operators: Operators,
    experts: Any,
    storage: ExpertStorage,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    low_rank: LowRankPair | None = None,
) -> Tensor:
    """An experts forward of transformers' contract.

    Args:
        experts: A module under transformers' `use_experts_implementation` decorator.
        storage: Of its weights.
        hidden_states: `[T, H]`, computed in the dtype of the weights (under autocast it differs).
        top_k_index: `[T, K]`, integer.
        top_k_weights: `[T, K]`.
        low_rank: Adapters on the weights, in their dtype. The sum `W + scale * b @ a` is never built.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.

    Raises:
        IndexError: On the CPU, for an expert id out of range. On a GPU a device-side assertion fails or, for few
            tokens without gradients, the token's result is NaN.
    """
    hidden_TH, index_TK = hidden_states.to(storage.dtype), top_k_index.to(torch.int64)
    device = hidden_TH.device.type
    # the weights decide the dtype; autocast, which the meta device has not, would change it between the steps
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        out_TH = _run(operators, experts, storage, hidden_TH, index_TK, top_k_weights, low_rank)
    return out_TH.to(hidden_states.dtype)


def _run(
    operators: Operators,
    experts: Any,
    storage: ExpertStorage,
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    low_rank: LowRankPair | None,
) -> Tensor:
    num_ids = num_expert_ids(experts, storage.num_experts)
    fused = operators.fused.get((storage.format, low_rank is not None))
    if fused is not None and (operands := storage.operands()) is not None:
        form = _fused_form(experts)
        if form is not None and (low_rank is None or not _is_trained(storage.tensors())):
            return fused(LayerCall(hidden_TH, index_TK, weights_TK, operands, num_ids, form, low_rank))
    return _run_steps(operators, experts, storage, hidden_TH, index_TK, weights_TK, num_ids, low_rank)


def _fused_form(experts: Any) -> ExpertForm | None:
    """Form of the experts in words of fused operators; None if these lack words for it."""
    activation = activation_of(experts)
    if activation is None or has_post_expert_norm(experts):
        return None
    return ExpertForm(
        activation.activation,
        activation.alpha,
        activation.limit,
        activation.offset,
        experts.has_gate,
        experts.is_transposed,
        not experts.is_concatenated,
    )


def _is_trained(weights: ExpertWeights | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in weights or ())


def _product(operators: Operators, storage: ExpertStorage, transposed: bool) -> Product:
    """Product of rows and weights: the backend where they are dense tensors, else their storage."""
    weights = storage.tensors()
    if weights is None:
        return storage.linear

    def product(rows_NA: Tensor, projection: Projection, plan: Plan) -> Tensor:
        weight, bias = weights[:2] if projection == "up" else weights[2:4]
        return operators.grouped_linear(rows_NA, weight, bias, plan.expert_end_E, transposed)

    return product


def _run_steps(
    operators: Operators,
    experts: Any,
    storage: ExpertStorage,
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    num_ids: int,
    low_rank: LowRankPair | None,
) -> Tensor:
    plan = Plan(*sort_by_expert(index_TK, storage.num_experts, num_ids))
    storage.prefetch(plan)
    multiply = _product(operators, storage, experts.is_transposed)
    up, down = low_rank or (None, None)

    def project(rows_NA: Tensor, projection: Projection, factors: LowRank | None) -> Tensor:
        rows_NB = multiply(rows_NA, projection, plan)
        if factors is None:
            return rows_NB
        return rows_NB + _adapt(operators.grouped_linear, rows_NA, factors, plan.expert_end_E)

    rows_NH = GatherRows.apply(hidden_TH, plan.order_N, index_TK.shape[1])
    pre_NP = project(rows_NH, "up", up)
    act_NI = (experts._apply_gate(pre_NP) if experts.has_gate else experts.act_fn(pre_NP)).to(pre_NP.dtype)
    out_NH = project(act_NI, "down", down)
    if has_post_expert_norm(experts):
        out_NH = experts.post_expert_norm(out_NH)
    if num_ids > storage.num_experts:
        # a norm with a bias makes something of the rows that nobody computes here
        row_N = torch.arange(plan.order_N.shape[0], device=plan.order_N.device)
        out_NH = out_NH.masked_fill((row_N >= plan.expert_end_E[-1]).unsqueeze(-1), 0.0)
    return CombineRows.apply(out_NH, weights_TK, plan.order_N)


def _adapt(grouped_linear: Callable[..., Tensor], rows_NA: Tensor, factors: LowRank, expert_end_E: Tensor) -> Tensor:
    """Sum that an adapter adds to the rows of a projection `[N, B]`."""
    a, b, scale = factors
    if rows_NA.device.type != "cpu":
        # torch's grouped product takes contiguous rows of whole 16 bytes
        missing = -a.shape[1] % 8
        a, b = F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()
    low_NR = grouped_linear(rows_NA, a, None, expert_end_E, False) * scale
    return grouped_linear(low_NR, b, None, expert_end_E, False)
