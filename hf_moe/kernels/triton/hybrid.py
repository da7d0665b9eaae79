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
from ..layer_op import LayerOp, Wants, gradients_like
from .between_products import (
    launch_activation,
    launch_activation_backward,
    launch_combine_rows,
    launch_gather_rows,
    launch_row_of_slot,
)
from .layer import Kept, bias_gradient, gpu_op, kept_like, require_layer
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
    """Compute `triton_experts` with the products by `torch.nn.functional.grouped_mm`: same result and gradients.

    Worth it where that product is one kernel (bfloat16 on SM90 and SM100) and experts have many rows; elsewhere it is
    a loop that waits for the GPU.

    Raises:
        ValueError: If shapes or dtypes do not fit, or rows of a weight are not whole 16 bytes.
        IndexError: For an id out of range under the interpreter; on a GPU an asynchronous device assertion.
        RuntimeError: For CPU tensors, unless Triton's interpreter is on.
    """
    require_layer(call)
    _require_whole_rows(up_weight=call.experts.up, down_weight=call.experts.down)
    return _experts(call)


def _forward(call: LayerCall, keep: bool) -> tuple[Tensor, Kept]:
    hidden_TH, index_TK, weights_TK, experts, num_ids, form, _ = call
    order = sort_rows(index_TK, call.num_experts, num_ids)
    if not index_TK.numel():
        return torch.zeros_like(hidden_TH), kept_like(call, keep)
    rows_NH = launch_gather_rows(hidden_TH, order, call.top_k)
    pre_NP = _product(rows_NH, experts.up, order, form.transposed)
    act_NI = launch_activation(pre_NP, order, form, experts.up_bias)
    rows_NH = _product(act_NI, experts.down, order, form.transposed)
    out_TH = launch_combine_rows(
        rows_NH,
        launch_row_of_slot(order),
        call.top_k,
        weights_TK=weights_TK,
        index_TK=index_TK,
        num_ids=num_ids,
        bias=experts.down_bias,
    )
    return out_TH, Kept(pre_NP, *order) if keep else kept_like(call, keep)


def _backward(grad_out_TH: Tensor, call: LayerCall, kept: Kept, wants: Wants) -> list[Tensor]:
    if not kept.pre_NP.shape[0]:
        return [gradient.zero_() for gradient in gradients_like(call, wants)]
    order, top_k, transposed = kept.order, call.top_k, call.form.transposed
    grad_rows_NH = launch_gather_rows(grad_out_TH, order, top_k)
    grad_pre_NP, weighted_act_NI, grad_weights_TK = launch_activation_backward(
        _product(grad_rows_NH, call.experts.down, order, not transposed), kept.pre_NP, grad_out_TH, order,
        call.weights_TK, call.form, down_bias=call.experts.down_bias, need_act=wants.down_weight,
        need_grad_weights=wants.weights,
    )  # fmt: skip
    gradients = []
    if wants.hidden:
        rows_NH = _product(grad_pre_NP, call.experts.up, order, not transposed)
        gradients.append(launch_combine_rows(rows_NH, launch_row_of_slot(order), top_k))
    if grad_weights_TK is not None:
        gradients.append(grad_weights_TK.to(call.weights_TK.dtype))
    if wants.up_weight:
        rows_NH = launch_gather_rows(call.hidden_TH, order, top_k)
        gradients.append(_outer_product(grad_pre_NP, rows_NH, order, transposed))
    if wants.up_bias:
        gradients.append(bias_gradient(grad_pre_NP, order, top_k))
    if weighted_act_NI is not None:
        gradients.append(_outer_product(grad_rows_NH, weighted_act_NI, order, transposed))
    if wants.down_bias:
        gradients.append(bias_gradient(grad_out_TH, order, top_k, call.weights_TK))
    return gradients


_experts = LayerOp(
    "hf_moe::triton_hybrid_experts", gpu_op, Kept, forward=_forward, backward=_backward, kept_like=kept_like
)
