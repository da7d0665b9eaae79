"""Differentiable Triton ops: one layer of experts with dense or fp8 weights, and one linear map per expert.

Saved for backward are the arguments, the order of the rows and the pre-activation; activations, expert outputs and
permuted copies are recomputed or never exist.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), A and B input and output width of a linear map.
"""

import torch
from torch import Tensor

from ..layer_call import LayerCall
from ..layer_op import LayerOp, Wants, gradients_like
from ..linear_op import LinearWants, define_linear_op
from .backward_activation import launch_backward_activation
from .decode import launch_decode
from .grouped_linear import launch_grouped_linear
from .layer import (
    Kept,
    bias_gradient,
    gpu_op,
    hidden_gradient,
    kept_like,
    project_down,
    require_layer,
    require_one_dtype,
    require_width,
    weight_gradient,
)
from .low_rank import triton_experts_lora
from .routing import RowOrder, rows_in_order, sort_rows
from .up import launch_up

__all__ = ["triton_experts", "triton_experts_lora", "triton_grouped_linear"]

# Up to one row an expert on average, two launches without a sort win; decode.py says why. Not yet tuned on a GPU.
DECODE_ROWS_PER_EXPERT = 1


def triton_experts(call: LayerCall) -> Tensor:
    """Compute the weighted sum of every token's experts [T, H], in the dtype of the hidden states.

    Differentiable in hidden states, routing weights, biases and dense expert weights.

    An id out of range makes its token NaN. It is an error besides, except where rows are few and nothing is kept for
    backward (`decode.py`), and on builds of torch without assertions on the device (ROCm's default).

    Before CUDA graphs are captured, every batch size runs once: that compiles and loads all that a capture launches,
    whatever the tensors hold. HF_MOE_AUTOTUNE=1 times tiles in that first run.

    Raises:
        ValueError: If shapes or dtypes do not fit.
        IndexError: For an id out of range under the interpreter; on a GPU an asynchronous device assertion.
        RuntimeError: For CPU tensors, unless Triton's interpreter is on.
    """
    require_layer(call)
    return _experts(call)


def _forward(call: LayerCall, keep: bool) -> tuple[Tensor, Kept]:
    hidden_TH, index_TK, _, experts, num_ids, form, _ = call
    if not keep and 0 < index_TK.numel() <= DECODE_ROWS_PER_EXPERT * call.num_experts:
        return launch_decode(call), kept_like(call, keep)
    order = sort_rows(index_TK, call.num_experts, num_ids)
    act_NI, pre_NP = launch_up(
        hidden_TH,
        experts.up,
        order,
        form,
        top_k=call.top_k,
        bias=experts.up_bias,
        store_pre=keep,
        scale=experts.up_scale,
    )
    out_TH = project_down(act_NI, call, order)
    return out_TH, kept_like(call, keep) if pre_NP is None else Kept(pre_NP, *order)


def _backward(grad_out_TH: Tensor, call: LayerCall, kept: Kept, wants: Wants) -> list[Tensor]:
    if not kept.pre_NP.shape[0]:
        return [gradient.zero_() for gradient in gradients_like(call, wants)]
    order, top_k, transposed = kept.order, call.top_k, call.form.transposed
    grad_pre_NP, weighted_act_NI, grad_weights_TK = launch_backward_activation(
        grad_out_TH, call.experts.down, kept.pre_NP, order, call.weights_TK, call.form,
        scale=call.experts.down_scale, down_bias=call.experts.down_bias, need_act=wants.down_weight,
        need_grad_weights=wants.weights,
    )  # fmt: skip
    gradients = []
    if wants.hidden:
        gradients.append(hidden_gradient(grad_pre_NP, call, order))
    if grad_weights_TK is not None:
        gradients.append(grad_weights_TK.to(call.weights_TK.dtype))
    if wants.up_weight:
        gradients.append(weight_gradient(grad_pre_NP, call.hidden_TH, order, top_k, "in", transposed))
    if wants.up_bias:
        gradients.append(bias_gradient(grad_pre_NP, order, top_k))
    if weighted_act_NI is not None:
        gradients.append(weight_gradient(grad_out_TH, weighted_act_NI, order, top_k, "out", transposed))
    if wants.down_bias:
        gradients.append(bias_gradient(grad_out_TH, order, top_k, call.weights_TK))
    return gradients


_experts = LayerOp("hf_moe::triton_experts", gpu_op, Kept, forward=_forward, backward=_backward, kept_like=kept_like)


def triton_grouped_linear(
    rows_NA: Tensor, weight: Tensor, bias: Tensor | None, expert_end_E: Tensor, transposed: bool
) -> Tensor:
    """Compute `row @ weight[e]^T + bias[e]` [N, B] for rows in expert order; zeros past the last expert's end.

    Args:
        weight: [E, B, A], or [E, A, B] if `transposed`; any strides.
        bias: [E, B].
        expert_end_E: int32, cumulative rows per expert, at most N.

    Raises:
        ValueError: If shapes or dtypes do not fit.
        RuntimeError: For CPU tensors, unless Triton's interpreter is on.
    """
    require_one_dtype(rows=rows_NA, weight=weight, bias=bias)
    num_experts, B, A = weight.permute((0, 2, 1) if transposed else (0, 1, 2)).shape
    bias_fits = bias is None or bias.shape == (num_experts, B)
    if rows_NA.shape[1] != A or not bias_fits or expert_end_E.shape != (num_experts,):
        shapes = [tuple(tensor.shape) for tensor in (rows_NA, weight, expert_end_E)]
        raise ValueError(
            f"rows, weight and expert_end of shapes {shapes} with transposed={transposed} do not fit: [N, A], "
            "[E, B, A] (transposed [E, A, B]) and [E] are needed, and [E, B] for a bias."
        )
    require_width(inner_width=A, outer_width=B)
    if expert_end_E.dtype != torch.int32:
        raise ValueError(f"expert_end must be int32, got {expert_end_E.dtype}: convert it with .int().")
    return _grouped_linear(rows_NA, weight, bias, expert_end_E, transposed)


def _rows_in_place(rows_NA: Tensor, expert_end_E: Tensor) -> RowOrder:
    """The order of rows that are in expert order already: launchers without gather or scatter read its ends only."""
    return rows_in_order(rows_NA.new_empty(rows_NA.shape[0], dtype=torch.int32), expert_end_E)


def _linear(rows_NA, weight, bias, expert_end_E, transposed):
    order = _rows_in_place(rows_NA, expert_end_E)
    return launch_grouped_linear(rows_NA, weight, order, top_k=1, transposed=transposed, bias=bias)


def _linear_backward(grad_out_NB, rows_NA, weight, expert_end_E, transposed, wants):
    wants, order = LinearWants(*wants), _rows_in_place(rows_NA, expert_end_E)
    gradients = []
    if wants.rows:
        gradients.append(launch_grouped_linear(grad_out_NB, weight, order, top_k=1, transposed=not transposed))
    if wants.weight:
        gradients.append(weight_gradient(grad_out_NB, rows_NA, order, 1, transposed=transposed))
    if wants.bias:
        gradients.append(bias_gradient(grad_out_NB, order, 1))
    return gradients


_grouped_linear = define_linear_op("hf_moe::triton_grouped_linear", gpu_op, _linear, _linear_backward)
