"""Backward through the down projection and the activation, fused.

One program multiplies a tile of gathered output gradients with the down projection, recomputes the activation from
the saved pre-activation in its epilogue, and leaves what the rest of the backward needs: the gradient of the
pre-activation, the weighted activation (a factor of the down projection's gradient), and partial sums of the routing
weights' gradient. Those are added in a fixed order by a second kernel: no atomics, the same bits from run to run.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), R LoRA rank, C column tiles, M row tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layer_call import ExpertForm
from .activation import activate_backward, form_constants, glu_backward
from .fp8 import load_weight, scale_arguments, scale_places
from .grouped_linear import (
    ROW_TILES_PER_GROUP,
    LowRankTerm,
    add_term,
    bounds_of_tile,
    column_halves,
    halves,
    rows_between,
    step_masks,
    term_arguments,
    tile_of_program,
)
from .routing import RowOrder
from .tiles import Tile, tile_for
from .weight_gradient import block_of, unit_stride_rows

# Neighbouring columns of the pre-activation in one part of the epilogue: a row's piece is a whole sector of 32 bytes,
# and with a 128 x 128 tile of 256 threads at most 128 registers are live, so that two programs fit (sm_90).
EPILOGUE_COLUMNS = 16
SUM_STEP = 64  # hidden columns of one step through the bias's part of the routing weights' gradient


@triton.jit
def tile_places(first_row, first_col, row_size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Places of a tile in a row-major tensor: its first row's place in int64, and places relative to it.

    Those fit int32, as a tile spans few rows, and take half the registers.
    """
    places = tl.arange(0, BLOCK_M)[:, None] * row_size + (first_col + tl.arange(0, BLOCK_N))[None, :]
    return first_row.to(tl.int64) * row_size, places


@triton.jit
def load_pre(
    pre, first_row, first_col, row_ok, width,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gate and the up part of a tile of activations, float32; both the same when ungated."""
    col_ok = first_col + tl.arange(0, BLOCK_N) < width
    ok = row_ok[:, None] & col_ok[None, :]
    if not GATED:
        first, places = tile_places(first_row, first_col, width, BLOCK_M, BLOCK_N)
        gate = tl.load(pre + first + places, mask=ok, other=0.0)
        up = gate
    elif INTERLEAVED:
        # pairs lie side by side: one wide load, as loads of every other element would be scalar
        first, places = tile_places(first_row, 2 * first_col, 2 * width, BLOCK_M, 2 * BLOCK_N)
        pair_ok = 2 * first_col + tl.arange(0, 2 * BLOCK_N) < 2 * width
        pairs = tl.load(pre + first + places, mask=row_ok[:, None] & pair_ok[None, :], other=0.0)
        gate, up = tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_N, 2)))
    else:
        first, places = tile_places(first_row, first_col, 2 * width, BLOCK_M, BLOCK_N)
        gate = tl.load(pre + first + places, mask=ok, other=0.0)
        up = tl.load(pre + first + width + places, mask=ok, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def store_pre(
    pre, gate, up, first_row, first_col, row_ok, width,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store what `load_pre` loads."""
    col_ok = first_col + tl.arange(0, BLOCK_N) < width
    ok = row_ok[:, None] & col_ok[None, :]
    gate = gate.to(pre.dtype.element_ty)
    up = up.to(pre.dtype.element_ty)
    if not GATED:
        first, places = tile_places(first_row, first_col, width, BLOCK_M, BLOCK_N)
        tl.store(pre + first + places, gate, mask=ok)
    elif INTERLEAVED:
        first, places = tile_places(first_row, 2 * first_col, 2 * width, BLOCK_M, 2 * BLOCK_N)
        pair_ok = 2 * first_col + tl.arange(0, 2 * BLOCK_N) < 2 * width
        tl.store(pre + first + places, tl.interleave(gate, up), mask=row_ok[:, None] & pair_ok[None, :])
    else:
        first, places = tile_places(first_row, first_col, 2 * width, BLOCK_M, BLOCK_N)
        tl.store(pre + first + places, gate, mask=ok)
        tl.store(pre + first + width + places, up, mask=ok)


@triton.jit
def store_act(act_NI, act, first_row, first_col, row_ok, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a tile of activations."""
    first, places = tile_places(first_row, first_col, width, BLOCK_M, BLOCK_N)
    ok = row_ok[:, None] & (first_col + tl.arange(0, BLOCK_N) < width)[None, :]
    tl.store(act_NI + first + places, act.to(act_NI.dtype.element_ty), mask=ok)


@triton.jit
def store_zeros(
    pre, act, first_row, first_col, row_ok, width,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, STORE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of rows that no expert computes."""
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    store_pre(pre, zeros, zeros, first_row, first_col, row_ok, width, GATED, INTERLEAVED, BLOCK_M, BLOCK_N)
    if STORE_ACT:
        store_act(act, zeros, first_row, first_col, row_ok, width, BLOCK_M, BLOCK_N)


@triton.jit
def activation_gradient(
    grad_act, tensors, weight, first_row, first_col, row_ok, width, FORM: tl.constexpr, STORE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Recompute a tile's activation, store the tile's gradients, and return the tile's part of the rows' products.

    tensors: pre, and where its gradient and the weighted activation go. FORM: the constants of the activation.
    """
    KIND: tl.constexpr = FORM[0]
    ALPHA: tl.constexpr = FORM[1]
    LIMIT: tl.constexpr = FORM[2]
    OFFSET: tl.constexpr = FORM[3]
    GATED: tl.constexpr = FORM[4]
    INTERLEAVED: tl.constexpr = FORM[5]
    pre, grad_pre, weighted_act = tensors
    gate, up = load_pre(pre, first_row, first_col, row_ok, width, GATED, INTERLEAVED, BLOCK_M, BLOCK_N)
    if GATED:
        act, d_gate, d_up = glu_backward(gate, up, grad_act, KIND, ALPHA, LIMIT, OFFSET)
    else:
        act, d_gate = activate_backward(gate, grad_act, KIND, ALPHA)
        d_up = d_gate
    scale = weight[:, None]
    store_pre(
        grad_pre, scale * d_gate, scale * d_up, first_row, first_col, row_ok, width,
        GATED, INTERLEAVED, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if STORE_ACT:
        store_act(weighted_act, scale * act, first_row, first_col, row_ok, width, BLOCK_M, BLOCK_N)
    return tl.sum(grad_act * act, axis=1)


@triton.jit
def activation_gradients(
    grad_act, tensors, weight, first_row, first_col, row_ok, width, FORM: tl.constexpr, STORE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """`activation_gradient` in parts of at most NARROW columns: a wide tile's values would spill."""
    if BLOCK_N <= NARROW:
        products = tl.zeros((BLOCK_M,), tl.float32)
        # Parts past the last column have nothing to do; and where a part is no block of its own, ptxas adds up the
        # products of all parts at the end, where the registers hold every one of them.
        if first_col < width:
            products = activation_gradient(
                grad_act, tensors, weight, first_row, first_col, row_ok, width, FORM, STORE_ACT, BLOCK_M, BLOCK_N
            )
        return products
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = column_halves(grad_act, BLOCK_M, BLOCK_N)
        total = activation_gradients(
            left, tensors, weight, first_row, first_col, row_ok, width, FORM, STORE_ACT, BLOCK_M, HALF, NARROW
        )
        return total + activation_gradients(
            right, tensors, weight, first_row, first_col + HALF, row_ok, width, FORM, STORE_ACT, BLOCK_M, HALF, NARROW
        )


@triton.jit
def gradient_tile(
    tensors, first_row, end_row, first_col, sizes, strides, low, FORM: tl.constexpr, FLAGS: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_M rows of one expert; tuples as `backward_activation_kernel` makes them."""
    grad_out, weight, pre, weights, grad_pre, weighted_act, partial, order, weight_scale = tensors
    H, width = sizes
    stride_out, stride_h, stride_i, stride_scale_i, stride_scale_h = strides
    TOP_K: tl.constexpr = FLAGS[0]
    HAS_LOW: tl.constexpr = FLAGS[1]
    STORE_ACT: tl.constexpr = FLAGS[2]
    STORE_PARTIAL: tl.constexpr = FLAGS[3]
    EVEN_K: tl.constexpr = FLAGS[4]
    BLOCK_K: tl.constexpr = BLOCKS[0]
    BLOCK_R: tl.constexpr = BLOCKS[1]
    NARROW: tl.constexpr = BLOCKS[2]
    SCALE_N: tl.constexpr = BLOCKS[3]
    SCALE_K: tl.constexpr = BLOCKS[4]
    rows, row_ok = rows_between(first_row, end_row, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    col_ok = cols < width
    slots = tl.load(order + rows, mask=row_ok, other=0)
    ks = tl.arange(0, BLOCK_K)
    out_at = grad_out + (slots // TOP_K).to(tl.int64)[:, None] * stride_out + ks[None, :]
    weight_at = weight + ks[:, None] * stride_h + cols[None, :] * stride_i
    scales = (scale_places(weight_scale, cols, stride_scale_i, SCALE_N), stride_scale_h)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, H, BLOCK_K):
        g_ok, w_ok = step_masks(row_ok, col_ok, H - k, EVEN_K, BLOCK_K)
        g = tl.load(out_at + k, mask=g_ok, other=0.0)
        w = load_weight(weight_at + k * stride_h, w_ok, scales, k, g.dtype, SCALE_K, BLOCK_K)
        acc = tl.dot(g, w, acc, input_precision="ieee")
    acc = add_term(acc, low, rows, row_ok, cols, col_ok, HAS_LOW, BLOCK_R)
    weight_M = tl.load(weights + slots, mask=row_ok, other=0.0).to(tl.float32)
    products = activation_gradients(
        acc, (pre, grad_pre, weighted_act), weight_M, first_row, first_col, row_ok, width,
        FORM, STORE_ACT, BLOCK_M, BLOCK_N, NARROW,
    )  # fmt: skip
    if STORE_PARTIAL:
        partial_at = partial + rows.to(tl.int64) * tl.cdiv(width, BLOCK_N) + first_col // BLOCK_N
        tl.store(partial_at, products, mask=row_ok)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"], do_not_specialize_on_alignment=["weights"])
def backward_activation_kernel(
    grad_out, down_weight, pre, weights, grad_pre, weighted_act, partial, order, expert_end, tile_expert, tile_row,
    num_rows, num_tiles, H, width, stride_out, stride_e, stride_h, stride_i,
    low_NR, low_weight, R, stride_low_e, stride_low_b, stride_low_r,
    weight_scale, stride_scale_e, stride_scale_n, stride_scale_k, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    TOP_K: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_LOW: tl.constexpr,
    STORE_ACT: tl.constexpr, STORE_PARTIAL: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    NARROW: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of rows and activation columns; grid (M * C,)."""
    FORM: tl.constexpr = (KIND, ALPHA, LIMIT, OFFSET, GATED, INTERLEAVED)
    FLAGS: tl.constexpr = (TOP_K, HAS_LOW, STORE_ACT, STORE_PARTIAL, EVEN_K)
    BLOCKS: tl.constexpr = (BLOCK_K, BLOCK_R, NARROW, SCALE_N, SCALE_K)
    tile, column_tile = tile_of_program(num_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert, first, end = bounds_of_tile(tile, tile_expert, tile_row, expert_end, num_rows)
    col = column_tile * BLOCK_N
    if expert < 0:  # rows of no expert are zero; an unused tile has no rows
        _, row_ok = rows_between(first, end, BLOCK_M)
        store_zeros(
            grad_pre, weighted_act, first, col, row_ok, width, GATED, INTERLEAVED, STORE_ACT, BLOCK_M, BLOCK_N
        )  # fmt: skip
        return
    weight = down_weight + expert.to(tl.int64) * stride_e
    scale_of_expert = weight_scale + expert.to(tl.int64) * stride_scale_e
    tensors = (grad_out, weight, pre, weights, grad_pre, weighted_act, partial, order, scale_of_expert)
    sizes = (H, width)
    strides = (stride_out, stride_h, stride_i, stride_scale_n, stride_scale_k)
    low = (low_NR, low_weight + expert.to(tl.int64) * stride_low_e, R, stride_low_b, stride_low_r)
    if HALVES:
        if end - first <= BLOCK_M // 2:
            gradient_tile(tensors, first, end, col, sizes, strides, low, FORM, FLAGS, BLOCKS, BLOCK_M // 2, BLOCK_N)
        else:
            gradient_tile(tensors, first, end, col, sizes, strides, low, FORM, FLAGS, BLOCKS, BLOCK_M, BLOCK_N)
    else:
        gradient_tile(tensors, first, end, col, sizes, strides, low, FORM, FLAGS, BLOCKS, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["num_rows"])
def grad_weights_kernel(
    partial, grad_out, down_bias, grad_weights,
    order, expert_end, tile_expert, tile_row,
    num_rows, H, C, stride_out,
    TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add up a row's partial sums, and its product with the down bias, and write them by slot. Grid (M,)."""
    first_row = tl.load(tile_row + tl.program_id(0))
    if first_row < 0:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    expert = tl.load(tile_expert + tl.program_id(0))
    total = tl.zeros((BLOCK_M,), tl.float32)
    row_ok = rows < num_rows
    if expert >= 0:
        row_ok = rows < tl.load(expert_end + expert)
        cs = tl.arange(0, BLOCK_C)
        partial_at = partial + rows.to(tl.int64)[:, None] * C + cs[None, :]
        total = tl.sum(tl.load(partial_at, mask=row_ok[:, None] & (cs < C)[None, :], other=0.0), axis=1)
    slots = tl.load(order + rows, mask=row_ok, other=0)
    if HAS_BIAS and expert >= 0:
        ks = tl.arange(0, BLOCK_K)
        out_at = grad_out + (slots // TOP_K).to(tl.int64)[:, None] * stride_out + ks[None, :]
        for k in range(0, H, BLOCK_K):
            k_ok = ks < H - k
            g = tl.load(out_at + k, mask=row_ok[:, None] & k_ok[None, :], other=0.0).to(tl.float32)
            bias = tl.load(down_bias + expert.to(tl.int64) * H + k + ks, mask=k_ok, other=0.0).to(tl.float32)
            total += tl.sum(g * bias[None, :], axis=1)
    tl.store(grad_weights + slots, total, mask=row_ok)


def launch_grad_weights(
    partial_NC: Tensor, grad_out_TH: Tensor, order: RowOrder, block_m: int, *, top_k: int,
    down_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of the routing weights, float32 [T, K], from partial sums of rows in expert order.

    Args:
        partial_NC: float32; rows past the last expert's end are not read.
        grad_out_TH: Read with `down_bias` only.
        down_bias: [E, H].
    """
    (num_rows, C), (T, H) = partial_NC.shape, grad_out_TH.shape
    grad_weights_TK = torch.empty(T, top_k, dtype=torch.float32, device=partial_NC.device)
    grad_out_TH = unit_stride_rows(grad_out_TH)
    arguments = order.arguments(block_m)
    grad_weights_kernel[(arguments[-1].numel(),)](
        partial_NC, grad_out_TH, partial_NC if down_bias is None else down_bias.contiguous(), grad_weights_TK,
        *arguments, num_rows, H, C, grad_out_TH.stride(0),
        TOP_K=top_k, HAS_BIAS=down_bias is not None, BLOCK_C=triton.next_power_of_2(C), BLOCK_M=block_m,
        BLOCK_K=SUM_STEP,
    )  # fmt: skip
    return grad_weights_TK


class ActivationGradients(NamedTuple):
    """Results of the step from the output's gradient to that of the pre-activation.

    Attributes:
        pre_NP: Gradient of the pre-activation in expert order, in its dtype; zeros for sentinel rows.
        weighted_act_NI: Routing weight times activation, likewise: a factor of the down projection's gradient.
        weights_TK: Gradient of the routing weights, float32, zeros for sentinels.
    """

    pre_NP: Tensor
    weighted_act_NI: Tensor | None
    weights_TK: Tensor | None


def launch_backward_activation(
    grad_out_TH: Tensor,
    down_weight: Tensor,
    pre_NP: Tensor,
    order: RowOrder,
    weights_TK: Tensor,
    form: ExpertForm,
    *,
    down_bias: Tensor | None = None,
    term: LowRankTerm | None = None,
    scale: Tensor | None = None,
    need_act: bool = True,
    need_grad_weights: bool = True,
) -> ActivationGradients:
    """Gradient of the pre-activation, and if needed what the down projection's and the routing weights' are made of.

    Args:
        grad_out_TH: In the dtype of the weights.
        down_weight: [E, H, I], or [E, I, H] if transposed; any strides.
        pre_NP: Saved by the forward pass, in expert order, contiguous.
        weights_TK: Routing weights of any float dtype.
        down_bias: [E, H], part of the routing weights' gradient only.
        scale: Of blocks of an fp8 `down_weight`, as in ExpertWeights.
        term: Added to `grad_out @ down_weight`, an adapter's part; its weight is [E, I, R].
    """
    (num_rows, P), H, top_k = pre_NP.shape, grad_out_TH.shape[1], weights_TK.shape[1]
    width = P // 2 if form.gated else P
    weight_EHI = down_weight.transpose(1, 2) if form.transposed else down_weight
    grad_out_TH, grad_pre_NP = unit_stride_rows(grad_out_TH), torch.empty_like(pre_NP)
    weighted_act_NI = pre_NP.new_empty(num_rows, width) if need_act else None

    def run(tile: Tile) -> Tensor | None:
        block_n = block_of(width, tile.block_n)
        column_tiles = triton.cdiv(width, block_n)
        narrow = EPILOGUE_COLUMNS // 2 if form.interleaved else EPILOGUE_COLUMNS
        arguments = order.arguments(tile.block_m)
        num_tiles = arguments[-1].numel()
        partial_NC = torch.empty(num_rows, column_tiles, dtype=torch.float32, device=pre_NP.device)
        backward_activation_kernel[(num_tiles * column_tiles,)](
            grad_out_TH, down_weight, pre_NP, weights_TK.contiguous(),
            grad_pre_NP, grad_pre_NP if weighted_act_NI is None else weighted_act_NI, partial_NC, *arguments,
            num_rows, num_tiles, H, width, grad_out_TH.stride(0), *weight_EHI.stride(),
            **term_arguments(term, down_weight), **scale_arguments(scale, down_weight, swapped=True),
            TOP_K=top_k, **form_constants(form),
            STORE_ACT=need_act, STORE_PARTIAL=need_grad_weights, EVEN_K=H % tile.block_k == 0,
            BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=tile.block_k,
            NARROW=narrow, HALVES=halves(tile), GROUP=ROW_TILES_PER_GROUP,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if not need_grad_weights:
            return None
        return launch_grad_weights(partial_NC, grad_out_TH, order, tile.block_m, top_k=top_k, down_bias=down_bias)

    if not num_rows:
        nothing_TK = weights_TK.new_empty(weights_TK.shape, dtype=torch.float32) if need_grad_weights else None
        return ActivationGradients(grad_pre_NP, weighted_act_NI, nothing_TK)
    rows_per_expert = num_rows // down_weight.shape[0]
    tile = tile_for("backward_activation", rows_per_expert, width, H, down_weight.dtype, pre_NP.device, launch=run)
    return ActivationGradients(grad_pre_NP, weighted_act_NI, run(tile))
