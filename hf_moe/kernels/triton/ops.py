"""Differentiable Triton ops of one layer of experts: with dense weights, with low-rank adapters, and one linear map.

Each is a pair of custom ops, forward and backward, opaque to torch.compile. The backward op gets a list of what is
wanted and returns these gradients only: a frozen base costs no weight gradient. Saved for backward are the arguments,
the order of the rows and the pre-activation (with adapters also the [N, R] product with up_a); activations, expert
outputs and permuted copies are recomputed or never exist.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), R rank, A and B input and output width of a linear map.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..layer_call import LayerCall
from .backward_activation import launch_backward_activation
from .decode import launch_decode
from .dense_layer import BACKWARD, FORWARD, LayerWants, gradients_like, make_differentiable
from .grouped_linear import launch_grouped_linear
from .layer import (
    Gate,
    bias_gradient,
    differentiates,
    gpu_op,
    hidden_gradient,
    like_wanted,
    nothing_kept,
    placed,
    project_down,
    require_one_dtype,
    require_shapes,
    require_width,
    weight_gradient,
)
from .low_rank import triton_experts_lora
from .routing import RowOrder, require_ids, sort_rows
from .up import launch_up

__all__ = ["triton_experts", "triton_experts_lora", "triton_grouped_linear"]

# Up to one row an expert on average, two launches without a sort win; decode.py says why. Not yet tuned on a GPU.
DECODE_ROWS_PER_EXPERT = 1


class LinearWants(NamedTuple):
    rows: bool
    weight: bool
    bias: bool


def triton_experts(call: LayerCall) -> Tensor:
    """Weighted sum of every token's experts [T, H], in the dtype of `hidden_TH`.

    Args:
        index_TK: int32 or int64 ids in [0, num_ids); the id E is the sentinel, whose slots compute nothing.
        weights_TK: Routing weights of any float dtype.
        up_weight: [E, P, H], or [E, H, P] if `transposed`; any strides.
        up_bias: [E, P].
        down_weight: [E, H, I], or [E, I, H] if `transposed`; any strides.
        down_bias: [E, H].
        num_ids: E, or E + 1 where sentinels are allowed.
        activation: With alpha, limit and offset, as in activation.py.
        interleaved: Whether gate and up are the even and odd columns of P instead of its halves.

    Raises:
        ValueError: If shapes or dtypes do not fit.
        IndexError: For an id out of range under the interpreter; on a GPU an asynchronous device assertion.
        RuntimeError: For CPU tensors, unless Triton's interpreter is on.
    """
    hidden_TH, index_TK, weights_TK, (up_weight, up_bias, down_weight, down_bias), num_ids, form, _ = call
    activation, alpha, limit, offset, gated, transposed, interleaved = form
    gate = Gate(activation, alpha, limit, offset, gated, transposed, interleaved)
    require_shapes(hidden_TH, index_TK, weights_TK, up_weight, down_weight, gate)
    require_one_dtype(
        hidden=hidden_TH, up_weight=up_weight, up_bias=up_bias, down_weight=down_weight, down_bias=down_bias
    )
    tensors = (hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias)
    return torch.ops.hf_moe.triton_experts(*tensors, num_ids, differentiates(*tensors), *gate)[0]


@gpu_op("hf_moe::triton_experts", FORWARD)
def _experts(hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids, keep, *gate):
    """(out_TH, pre_NP, order_N, expert_end_E); all but the output are empty unless kept for backward."""
    gate = Gate(*gate)
    if not keep and 0 < index_TK.numel() <= DECODE_ROWS_PER_EXPERT * up_weight.shape[0]:
        require_ids(index_TK, num_ids)
        operands = (hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias)
        out_TH = launch_decode(*operands, **gate._asdict())
    else:
        top_k = index_TK.shape[1]
        order = sort_rows(index_TK, up_weight.shape[0], num_ids)
        act_NI, pre_NP = launch_up(
            hidden_TH, up_weight, order, top_k=top_k, bias=up_bias, store_pre=keep, **gate._asdict()
        )
        out_TH = project_down(act_NI, weights_TK, down_weight, down_bias, order, gate.transposed)
    if not keep:
        pre_NP, order = nothing_kept(hidden_TH)
    return out_TH, pre_NP, *order


@gpu_op("hf_moe::triton_experts_backward", BACKWARD)
def _experts_backward(
    grad_out_TH, hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, order_N, expert_end_E, wants, *gate
):
    """The wanted gradients, in the order of `LayerWants`."""
    gate, wants, order = Gate(*gate), LayerWants(*wants), RowOrder(order_N, expert_end_E)
    top_k = weights_TK.shape[1]
    if not pre_NP.shape[0]:
        empty = gradients_like(hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, wants)
        return [gradient.zero_() for gradient in empty]
    grad_pre_NP, weighted_act_NI, grad_weights_TK = launch_backward_activation(
        grad_out_TH,
        down_weight,
        pre_NP,
        order,
        weights_TK,
        top_k=top_k,
        down_bias=down_bias,
        need_act=wants.down_weight,
        need_grad_weights=wants.weights,
        **gate._asdict(),
    )
    gradients = []
    if wants.hidden:
        gradients.append(hidden_gradient(grad_pre_NP, up_weight, order, top_k, gate.transposed))
    if grad_weights_TK is not None:
        gradients.append(grad_weights_TK.to(weights_TK.dtype))
    if wants.up_weight:
        gradients.append(weight_gradient(grad_pre_NP, hidden_TH, order, top_k, "in", gate.transposed))
    if wants.up_bias:
        gradients.append(bias_gradient(grad_pre_NP, order, top_k))
    if weighted_act_NI is not None:
        gradients.append(weight_gradient(grad_out_TH, weighted_act_NI, order, top_k, "out", gate.transposed))
    if wants.down_bias:
        gradients.append(bias_gradient(grad_out_TH, order, top_k, weights_TK))
    return gradients


make_differentiable(_experts, _experts_backward)


def triton_grouped_linear(
    rows_NA: Tensor, weight: Tensor, bias: Tensor | None, expert_end_E: Tensor, transposed: bool
) -> Tensor:
    """`row @ weight[e]^T + bias[e]` [N, B] for rows in expert order; zeros for rows past the last expert's end.

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
    return torch.ops.hf_moe.triton_grouped_linear(rows_NA, weight, bias, expert_end_E, transposed)


@gpu_op(
    "hf_moe::triton_grouped_linear",
    "(Tensor rows, Tensor weight, Tensor? bias, Tensor expert_end, bool transposed) -> Tensor",
)
def _grouped_linear(rows_NA, weight, bias, expert_end_E, transposed):
    order = _rows_in_place(rows_NA, expert_end_E)
    return launch_grouped_linear(rows_NA, weight, order, top_k=1, transposed=transposed, bias=bias)


def _rows_in_place(rows_NA: Tensor, expert_end_E: Tensor) -> RowOrder:
    """The order of rows that are in expert order already: launchers without gather or scatter read its ends only."""
    return RowOrder(rows_NA.new_empty(rows_NA.shape[0], dtype=torch.int32), expert_end_E)


@_grouped_linear.register_fake
def _(rows_NA, weight, bias, expert_end_E, transposed):
    return rows_NA.new_empty(rows_NA.shape[0], weight.shape[2 if transposed else 1])


@gpu_op(
    "hf_moe::triton_grouped_linear_backward",
    ("(Tensor grad_out, Tensor rows, Tensor weight, Tensor expert_end, bool transposed, bool[] wants) -> Tensor[]"),
)
def _grouped_linear_backward(grad_out_NB, rows_NA, weight, expert_end_E, transposed, wants):
    """The wanted gradients, in the order of `LinearWants`."""
    wants, order = LinearWants(*wants), _rows_in_place(rows_NA, expert_end_E)
    gradients = []
    if wants.rows:
        gradients.append(launch_grouped_linear(grad_out_NB, weight, order, top_k=1, transposed=not transposed))
    if wants.weight:
        gradients.append(weight_gradient(grad_out_NB, rows_NA, order, 1, transposed=transposed))
    if wants.bias:
        gradients.append(bias_gradient(grad_out_NB, order, 1))
    return gradients


@_grouped_linear_backward.register_fake
def _(grad_out_NB, rows_NA, weight, expert_end_E, transposed, wants):
    bias_EB = weight.new_empty(weight.shape[0], grad_out_NB.shape[1])
    return like_wanted((rows_NA, weight, bias_EB), wants)


def _keep_linear(ctx, inputs, output) -> None:
    rows_NA, weight, _, expert_end_E, ctx.transposed = inputs
    ctx.save_for_backward(rows_NA, weight, expert_end_E)


def _differentiate_linear(ctx, grad_out_NB):
    wants = LinearWants(*ctx.needs_input_grad[:3])
    rows_NA, weight, expert_end_E = ctx.saved_tensors
    gradients = torch.ops.hf_moe.triton_grouped_linear_backward(
        grad_out_NB, rows_NA, weight, expert_end_E, ctx.transposed, list(wants)
    )
    return (*placed(gradients, wants), None, None)


_grouped_linear.register_autograd(_differentiate_linear, setup_context=_keep_linear)
