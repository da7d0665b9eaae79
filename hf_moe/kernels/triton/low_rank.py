"""Experts under low-rank adapters: `B(Ax)` for each expert's rows, without building `W + BA`.

Saved for backward is also the [N, R] product of the rows with the up projection's first factor.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), R rank.
"""

from typing import NamedTuple

from torch import Tensor

from ..layer_call import LayerCall, LowRank, LowRankPair
from ..layer_op import AdapterWants, LayerOp, gradients_like, require_factors
from . import layer
from .backward_activation import launch_backward_activation
from .grouped_linear import LowRankTerm, launch_grouped_linear
from .layer import gpu_op, hidden_gradient, project_down, require_layer, weight_gradient
from .routing import RowOrder, sort_rows
from .up import launch_up


class Kept(NamedTuple):
    """The tensors that backward needs beside the arguments; `up_low_NR` is empty without an adapter there."""

    pre_NP: Tensor
    up_low_NR: Tensor
    order_N: Tensor
    expert_end_E: Tensor
    tile_maps_X: Tensor


def triton_experts_lora(call: LayerCall) -> Tensor:
    """Compute `triton_experts` with weights `W + scale * b @ a`, without these sums or their gradients.

    Differentiable in hidden states, routing weights and factors.

    Raises:
        ValueError: If shapes or dtypes do not fit, or the gradient of a base weight or bias would be needed.
        IndexError, RuntimeError: As `triton_experts`.
    """
    require_layer(call)
    require_factors(call)
    if call.low_rank is not None:
        # PEFT's b, whose experts lie side by side, would be read element by element in every product and again in
        # backward; gradients flow back through the copy
        call = call._replace(low_rank=call.low_rank.contiguous())
    return _experts(call)


def _kept_like(call: LayerCall, keep: bool) -> Kept:
    pre_NP, *order = layer.kept_like(call, keep)
    factors = _adapters(call).up
    up_low_NR = pre_NP.new_empty((pre_NP.shape[0], factors.a.shape[1]) if keep and factors is not None else 0)
    return Kept(pre_NP, up_low_NR, *order)


def _adapters(call: LayerCall) -> LowRankPair:
    return call.low_rank or LowRankPair(None, None)


def _through_a(rows: Tensor, factors: LowRank | None, order: RowOrder, top_k: int, gather: bool = False):
    """The term `scale * (rows @ a[e]^T) @ b[e]^T` of a projection."""
    if factors is None:
        return None
    a, b, scale = factors
    rows_NR = launch_grouped_linear(rows, a, order, top_k=top_k, transposed=False, gather=gather, scale=scale)
    return LowRankTerm(rows_NR, b)


def _through_b(grad_rows: Tensor, factors: LowRank | None, order: RowOrder, top_k: int, gather: bool = False):
    """The term `scale * (grad_rows @ b[e]) @ a[e]` of the gradient of a projection's rows."""
    if factors is None:
        return None
    a, b, scale = factors
    rows_NR = launch_grouped_linear(grad_rows, b, order, top_k=top_k, transposed=True, gather=gather, scale=scale)
    return LowRankTerm(rows_NR, a.transpose(1, 2))


def _forward(call: LayerCall, keep: bool) -> tuple[Tensor, Kept]:
    hidden_TH, index_TK, _, experts, num_ids, form, _ = call
    top_k, adapters = call.top_k, _adapters(call)
    order = sort_rows(index_TK, call.num_experts, num_ids)
    term = _through_a(hidden_TH, adapters.up, order, top_k, gather=True)
    act_NI, pre_NP = launch_up(
        hidden_TH,
        experts.up,
        order,
        form,
        top_k=top_k,
        bias=experts.up_bias,
        store_pre=keep,
        term=term,
        scale=experts.up_scale,
    )
    out_TH = project_down(act_NI, call, order, _through_a(act_NI, adapters.down, order, top_k))
    if pre_NP is None:
        return out_TH, _kept_like(call, keep)
    return out_TH, Kept(pre_NP, hidden_TH.new_empty(0) if term is None else term.rows_NR, *order)


def _backward(grad_out_TH: Tensor, call: LayerCall, kept: Kept, wants: AdapterWants) -> list[Tensor]:
    if not kept.pre_NP.shape[0]:
        return [gradient.zero_() for gradient in gradients_like(call, wants)]
    order, top_k = RowOrder(kept.order_N, kept.expert_end_E, kept.tile_maps_X), call.top_k
    up, down = _adapters(call)
    term = _through_b(grad_out_TH, down, order, top_k, gather=True)
    grad_pre_NP, weighted_act_NI, grad_weights_TK = launch_backward_activation(
        grad_out_TH, call.experts.down, kept.pre_NP, order, call.weights_TK, call.form,
        scale=call.experts.down_scale, down_bias=call.experts.down_bias, term=term,
        need_act=wants.down_a or wants.down_b, need_grad_weights=wants.weights,
    )  # fmt: skip
    up_term = _through_b(grad_pre_NP, up, order, top_k) if wants.hidden or wants.up_a else None
    gradients = []
    if wants.hidden:
        gradients.append(hidden_gradient(grad_pre_NP, call, order, up_term))
    if grad_weights_TK is not None:
        gradients.append(grad_weights_TK.to(call.weights_TK.dtype))
    if wants.up_a and up_term is not None:
        gradients.append(weight_gradient(up_term.rows_NR, call.hidden_TH, order, top_k, "in"))
    if wants.up_b:
        gradients.append(weight_gradient(grad_pre_NP, kept.up_low_NR, order, top_k))
    if weighted_act_NI is not None and wants.down_a and term is not None:
        gradients.append(weight_gradient(term.rows_NR, weighted_act_NI, order, top_k))
    if weighted_act_NI is not None and wants.down_b:
        weighted = _through_a(weighted_act_NI, down, order, top_k)
        gradients.append(weight_gradient(grad_out_TH, weighted.rows_NR, order, top_k, "out"))
    return gradients


_experts = LayerOp(
    "hf_moe::triton_experts_lora",
    gpu_op,
    Kept,
    forward=_forward,
    backward=_backward,
    kept_like=_kept_like,
    adapted=True,
)
