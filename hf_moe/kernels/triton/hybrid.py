"""The hybrid: torch's grouped product (CUTLASS, TMA on SM90 and SM100) does the products, Triton (glue) all between.

Forward: gather rows, product, bias and activation in one pass, product, weighted sum over a token's slots. Backward:
gather the output gradient, product, the activation's backward (as in backward_activation, from a product in memory),
then one product for each wanted gradient. Saved are the arguments, the order of the rows and the pre-activation.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), A and B the widths of two factors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layer_call import LayerCall
from .between_products import (
    launch_activation,
    launch_activation_backward,
    launch_combine_rows,
    launch_gather_rows,
    launch_row_of_slot,
)
from .dense_layer import BACKWARD, FORWARD, LayerWants, gradients_like, make_differentiable
from .layer import (
    Gate,
    bias_gradient,
    differentiates,
    gpu_op,
    nothing_kept,
    require_one_dtype,
    require_shapes,
)
from .routing import RowOrder, sort_rows

PRODUCT_BYTES = 16  # torch's grouped product takes rows of whole 16 bytes


def _product(rows_NA: Tensor, weight: Tensor, order: RowOrder, transposed: bool) -> Tensor:
    """Every row times the matrix of its expert, [E, B, A] or transposed [E, A, B]; other rows stay unwritten."""
    return F.grouped_mm(rows_NA, weight if transposed else weight.transpose(1, 2), offs=order.expert_end_E)


def _outer_product(out_NB: Tensor, in_NA: Tensor, order: RowOrder, transposed: bool) -> Tensor:
    """Gradient [E, B, A] of a weight ([E, A, B] if transposed)."""
    left, right = (in_NA, out_NB) if transposed else (out_NB, in_NA)
    return F.grouped_mm(left.t(), right, offs=order.expert_end_E)


def _require_whole_rows(**widths_of: Tensor) -> None:
    for name, tensor in widths_of.items():
        if any(width * tensor.element_size() % PRODUCT_BYTES for width in tensor.shape[1:]):
            multiple = PRODUCT_BYTES // tensor.element_size()
            raise ValueError(
                f"torch's grouped product takes widths that are multiples of {multiple} in {tensor.dtype}, got {name} "
                f"of shape {tuple(tensor.shape)}. Use triton_experts."
            )


def triton_hybrid_experts(call: LayerCall) -> Tensor:
    """`triton_experts` with the products by `torch.nn.functional.grouped_mm`: same arguments, result and gradients.

    Worth it where that product is one kernel (SM90, SM100) and experts have many rows; elsewhere it is a loop.

    Raises:
        ValueError: If shapes or dtypes do not fit, or rows of a weight are not whole 16 bytes.
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
    _require_whole_rows(up_weight=up_weight, down_weight=down_weight)
    tensors = (hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias)
    return torch.ops.hf_moe.triton_hybrid_experts(*tensors, num_ids, differentiates(*tensors), *gate)[0]


@gpu_op("hf_moe::triton_hybrid_experts", FORWARD)
def _experts(hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids, keep, *gate):
    """(out_TH, pre_NP, order_N, expert_end_E); all but the output are empty unless kept for backward."""
    gate, top_k = Gate(*gate), index_TK.shape[1]
    order = sort_rows(index_TK, up_weight.shape[0], num_ids)
    if index_TK.numel():
        rows_NH = launch_gather_rows(hidden_TH, order, top_k)
        pre_NP = _product(rows_NH, up_weight, order, gate.transposed)
        act_NI = launch_activation(pre_NP, order, gate, up_bias)
        rows_NH = _product(act_NI, down_weight, order, gate.transposed)
        options = {"weights_TK": weights_TK, "index_TK": index_TK, "bias": down_bias}
        out_TH = launch_combine_rows(rows_NH, launch_row_of_slot(order), top_k, **options)
    else:
        out_TH, pre_NP = torch.zeros_like(hidden_TH), hidden_TH.new_empty(0, _pre_width(up_weight, gate))
    if not keep:
        pre_NP, order = nothing_kept(hidden_TH)
    return out_TH, pre_NP, *order


def _pre_width(up_weight: Tensor, gate: Gate) -> int:
    return up_weight.shape[2 if gate.transposed else 1]


@gpu_op("hf_moe::triton_hybrid_experts_backward", BACKWARD)
def _experts_backward(
    grad_out_TH, hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, order_N, expert_end_E, wants, *gate
):
    """The wanted gradients, in the order of `LayerWants`."""
    gate, wants, order = Gate(*gate), LayerWants(*wants), RowOrder(order_N, expert_end_E)
    top_k = weights_TK.shape[1]
    if not pre_NP.shape[0]:
        empty = gradients_like(hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, wants)
        return [gradient.zero_() for gradient in empty]
    grad_rows_NH = launch_gather_rows(grad_out_TH, order, top_k)
    grad_act_NI = _product(grad_rows_NH, down_weight, order, not gate.transposed)
    grad_pre_NP, weighted_act_NI, grad_weights_TK = launch_activation_backward(
        grad_act_NI, pre_NP, grad_out_TH, order, weights_TK, gate, down_bias=down_bias,
        need_act=wants.down_weight, need_grad_weights=wants.weights,
    )  # fmt: skip
    gradients = []
    if wants.hidden:
        rows_NH = _product(grad_pre_NP, up_weight, order, not gate.transposed)
        gradients.append(launch_combine_rows(rows_NH, launch_row_of_slot(order), top_k))
    if grad_weights_TK is not None:
        gradients.append(grad_weights_TK.to(weights_TK.dtype))
    if wants.up_weight:
        rows_NH = launch_gather_rows(hidden_TH, order, top_k)
        gradients.append(_outer_product(grad_pre_NP, rows_NH, order, gate.transposed))
    if wants.up_bias:
        gradients.append(bias_gradient(grad_pre_NP, order, top_k))
    if weighted_act_NI is not None:
        gradients.append(_outer_product(grad_rows_NH, weighted_act_NI, order, gate.transposed))
    if wants.down_bias:
        gradients.append(bias_gradient(grad_out_TH, order, top_k, weights_TK))
    return gradients


make_differentiable(_experts, _experts_backward)
