"""The steps between torch's grouped products: rows moved and summed, bias and activation in one pass.

Rows past the last expert's end are never read from a product, which leaves them unwritten; what the steps here write
there is zero.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), C column tiles, M row tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layer_call import ExpertForm
from .activation import activate, form_constants, glu
from .backward_activation import (
    ActivationGradients,
    activation_gradient,
    launch_grad_weights,
    load_pre,
    store_act,
    store_pre,
    store_zeros,
)
from .combine import nan_without_expert
from .grouped_linear import bounds_of_tile, rows_between
from .routing import RowOrder
from .weight_gradient import block_of, unit_stride_rows

BLOCK_ROWS = 16
BLOCK_COLUMNS = 128
WIDE_BLOCK = 1024  # columns of one program that only copies or sums rows


@triton.jit
def gather_rows_kernel(
    values_TH, order_N, expert_end_E, rows_NH, num_experts, H, stride_values, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """rows[r] = values[order[r] // K], zero past the last expert's end. Grid (N, column blocks)."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = (tl.load(order_N + row) // TOP_K).to(tl.int64)
    num_read = tl.where(row < tl.load(expert_end_E + num_experts - 1), H, 0)
    value = tl.load(values_TH + token * stride_values + cols, mask=cols < num_read, other=0.0)
    tl.store(rows_NH + row.to(tl.int64) * H + cols, value, mask=cols < H)


@triton.jit(do_not_specialize=["num_rows"])
def row_of_slot_kernel(order_N, expert_end_E, row_N, num_rows, num_experts, BLOCK: tl.constexpr):
    """row[order[r]] = r, -1 past the last expert's end."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_routed = rows < tl.load(expert_end_E + num_experts - 1)
    slots = tl.load(order_N + rows, mask=rows < num_rows, other=0)
    tl.store(row_N + slots, tl.where(is_routed, rows, -1), mask=rows < num_rows)


@triton.jit(do_not_specialize_on_alignment=["weights_N", "index_N"])
def combine_rows_kernel(
    rows_NH, row_N, weights_N, index_N, bias_EH, out_TH, H, num_ids,
    K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weight * (rows[row of slot k] + bias). Grid (T, column blocks)."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        slot = token * K + k
        row = tl.load(row_N + slot).to(tl.int64)
        col_ok = cols < tl.where(row >= 0, H, 0)
        value = tl.load(rows_NH + row * H + cols, mask=col_ok, other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias_at = bias_EH + tl.load(index_N + slot).to(tl.int64) * H + cols
            value += tl.load(bias_at, mask=col_ok, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights_N + slot, mask=row >= 0, other=0.0).to(tl.float32)
        total += value
        if HAS_IDS:
            total = nan_without_expert(total, index_N, slot, num_ids)
    tl.store(out_TH + token * H + cols, total.to(out_TH.dtype.element_ty), mask=cols < H)


@triton.jit
def load_bias(
    bias_EP, expert, first_col, width,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The bias of the gate and the up part of activation columns, float32."""
    cols = first_col + tl.arange(0, BLOCK_N)
    if not GATED:
        gate_at = bias_EP + expert.to(tl.int64) * width + cols
        up_at = gate_at
    elif INTERLEAVED:
        gate_at = bias_EP + expert.to(tl.int64) * 2 * width + 2 * cols
        up_at = gate_at + 1
    else:
        gate_at = bias_EP + expert.to(tl.int64) * 2 * width + cols
        up_at = gate_at + width
    gate = tl.load(gate_at, mask=cols < width, other=0.0).to(tl.float32)
    up = tl.load(up_at, mask=cols < width, other=0.0).to(tl.float32)
    return gate[None, :], up[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def activation_kernel(
    pre_NP, bias_EP, act_NI, expert_end_E, expert_M, row_M, num_rows, width,
    KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """act of a tile of rows, the bias added to pre in place; zeros in both past the last expert's end. Grid (M, C)."""
    expert, first_row, end = bounds_of_tile(tl.program_id(0), expert_M, row_M, expert_end_E, num_rows)
    _, row_ok = rows_between(first_row, end, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_N
    if expert < 0:
        store_zeros(
            pre_NP, act_NI, first_row, first_col, row_ok, width, GATED, INTERLEAVED, True, BLOCK_M, BLOCK_N
        )  # fmt: skip
        return
    gate, up = load_pre(pre_NP, first_row, first_col, row_ok, width, GATED, INTERLEAVED, BLOCK_M, BLOCK_N)
    if HAS_BIAS:
        gate_bias, up_bias = load_bias(bias_EP, expert, first_col, width, GATED, INTERLEAVED, BLOCK_N)
        gate += gate_bias
        up += up_bias
        store_pre(pre_NP, gate, up, first_row, first_col, row_ok, width, GATED, INTERLEAVED, BLOCK_M, BLOCK_N)
    if GATED:
        act = glu(gate, up, KIND, ALPHA, LIMIT, OFFSET)
    else:
        act = activate(gate, KIND, ALPHA)
    store_act(act_NI, act, first_row, first_col, row_ok, width, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["weights_N"])
def activation_backward_kernel(
    grad_act_NI, pre_NP, weights_N, grad_pre_NP, weighted_act_NI, partial_NC,
    order_N, expert_end_E, expert_M, row_M, num_rows, width,
    KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, STORE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Epilogue of `backward_activation_kernel` for a product in memory. Grid (M, C)."""
    expert, first_row, end = bounds_of_tile(tl.program_id(0), expert_M, row_M, expert_end_E, num_rows)
    rows, row_ok = rows_between(first_row, end, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_N
    if expert < 0:
        store_zeros(
            grad_pre_NP, weighted_act_NI, first_row, first_col, row_ok, width,
            GATED, INTERLEAVED, STORE_ACT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        return
    cols = first_col + tl.arange(0, BLOCK_N)
    at = grad_act_NI + rows.to(tl.int64)[:, None] * width + cols[None, :]
    grad_act = tl.load(at, mask=row_ok[:, None] & (cols < width)[None, :], other=0.0).to(tl.float32)
    slots = tl.load(order_N + rows, mask=row_ok, other=0)
    weight = tl.load(weights_N + slots, mask=row_ok, other=0.0).to(tl.float32)
    products = activation_gradient(
        grad_act, (pre_NP, grad_pre_NP, weighted_act_NI), weight, first_row, first_col, row_ok, width,
        (KIND, ALPHA, LIMIT, OFFSET, GATED, INTERLEAVED), STORE_ACT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    C = tl.num_programs(1)
    tl.store(partial_NC + rows.to(tl.int64) * C + tl.program_id(1), products, mask=row_ok)


def launch_gather_rows(values_TH: Tensor, order: RowOrder, top_k: int) -> Tensor:
    """Rows by token in expert order [N, H]; zeros past the last expert's end."""
    num_rows, H = order.order_N.numel(), values_TH.shape[1]
    rows_NH = values_TH.new_empty(num_rows, H)
    values_TH, block = unit_stride_rows(values_TH), block_of(H, WIDE_BLOCK)
    if num_rows:
        gather_rows_kernel[(num_rows, triton.cdiv(H, block))](
            values_TH,
            order.order_N,
            order.expert_end_E,
            rows_NH,
            order.expert_end_E.numel(),
            H,
            values_TH.stride(0),
            TOP_K=top_k,
            BLOCK=block,
        )
    return rows_NH


def launch_row_of_slot(order: RowOrder) -> Tensor:
    """int32 [N]: the row of every slot in expert order, -1 for sentinels."""
    num_rows = order.order_N.numel()
    row_N = torch.empty_like(order.order_N)
    if num_rows:
        row_of_slot_kernel[(triton.cdiv(num_rows, WIDE_BLOCK),)](
            order.order_N, order.expert_end_E, row_N, num_rows, order.expert_end_E.numel(), BLOCK=WIDE_BLOCK
        )
    return row_N


def launch_combine_rows(
    rows_NH: Tensor, row_N: Tensor, top_k: int, *, weights_TK: Tensor | None = None, index_TK: Tensor | None = None,
    num_ids: int = 0, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum every token's rows, which are in expert order, in float32 and in the order of the slots.

    Args:
        rows_NH: Contiguous; rows past the last expert's end are not read.
        row_N: Of `launch_row_of_slot`.
        weights_TK: A factor per slot, of any float dtype.
        index_TK: The slots' ids: a token is NaN if one of them is not in `[0, num_ids)`.
        bias: [E, H], added before the factor; with `index_TK` only.

    Returns:
        [T, H] in the dtype of `rows_NH`; zeros for tokens without rows.
    """
    num_rows, H = rows_NH.shape
    out_TH = rows_NH.new_empty(num_rows // top_k, H)
    block = block_of(H, WIDE_BLOCK)
    unused = rows_NH  # stands for the operands that are not given
    if num_rows:
        combine_rows_kernel[(num_rows // top_k, triton.cdiv(H, block))](
            rows_NH, row_N, unused if weights_TK is None else weights_TK.contiguous(),
            row_N if index_TK is None else index_TK.contiguous(), unused if bias is None else bias.contiguous(),
            out_TH, H, num_ids, K=top_k, HAS_WEIGHTS=weights_TK is not None, HAS_IDS=index_TK is not None,
            HAS_BIAS=bias is not None, BLOCK=block,
        )  # fmt: skip
    return out_TH


def launch_activation(pre_NP: Tensor, order: RowOrder, form: ExpertForm, bias: Tensor | None = None) -> Tensor:
    """Activation [N, I] of a product in expert order, whose bias [E, P] is added in place.

    Rows past the last expert's end become zero in both.
    """
    num_rows, P = pre_NP.shape
    width = P // 2 if form.gated else P
    act_NI = pre_NP.new_empty(num_rows, width)
    block_n = block_of(width, BLOCK_COLUMNS)
    tiles = order.tiles(BLOCK_ROWS)
    if num_rows:
        activation_kernel[(tiles.row_M.numel(), triton.cdiv(width, block_n))](
            pre_NP, pre_NP if bias is None else bias.contiguous(), act_NI, order.expert_end_E, *tiles,
            num_rows, width, **form_constants(form), HAS_BIAS=bias is not None, BLOCK_M=BLOCK_ROWS, BLOCK_N=block_n,
        )  # fmt: skip
    return act_NI


def launch_activation_backward(
    grad_act_NI: Tensor, pre_NP: Tensor, grad_out_TH: Tensor, order: RowOrder, weights_TK: Tensor, form: ExpertForm,
    *, down_bias: Tensor | None = None, need_act: bool = True, need_grad_weights: bool = True,
) -> ActivationGradients:  # fmt: skip
    """Results of `launch_backward_activation`, from the product of output gradients and down projection.

    Args:
        grad_act_NI: grad_out_row @ down_weight in expert order, not yet times the routing weight.
        grad_out_TH: Read with `down_bias` only.
    """
    num_rows, width = grad_act_NI.shape
    grad_pre_NP = torch.empty_like(pre_NP)
    weighted_act_NI = torch.empty_like(grad_act_NI) if need_act else None
    block_n = block_of(width, BLOCK_COLUMNS)
    arguments, column_tiles = order.arguments(BLOCK_ROWS), triton.cdiv(width, block_n)
    partial_NC = grad_act_NI.new_empty(num_rows, column_tiles, dtype=torch.float32)
    activation_backward_kernel[(arguments[-1].numel(), column_tiles)](
        grad_act_NI, pre_NP, weights_TK.contiguous(), grad_pre_NP,
        grad_pre_NP if weighted_act_NI is None else weighted_act_NI, partial_NC, *arguments,
        num_rows, width, **form_constants(form), STORE_ACT=need_act, BLOCK_M=BLOCK_ROWS, BLOCK_N=block_n,
    )  # fmt: skip
    grad_weights_TK = None
    if need_grad_weights:
        top_k = weights_TK.shape[1]
        grad_weights_TK = launch_grad_weights(
            partial_NC, grad_out_TH, order, BLOCK_ROWS, top_k=top_k, down_bias=down_bias
        )
    return ActivationGradients(grad_pre_NP, weighted_act_NI, grad_weights_TK)
