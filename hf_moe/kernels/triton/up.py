"""The up projection of every expert with its activation: tokens gathered, gate and up in one loop over H.

Pairs of gate and up columns lie side by side in one accumulator, which the epilogue splits: one wide product a step,
as fast as tensor cores get. A weight `[E, P, H]` can be read in any order of P. A transposed one cannot, as memory
holds P together: concatenated gate and up take two accumulators there. Ungated experts take one.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), R rank of the low-rank addend, M row tiles.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..layer_call import ExpertForm
from .activation import activate, form_constants, glu
from .backward_activation import store_act, store_pre
from .fp8 import load_weight, scale_arguments, scale_places
from .grouped_linear import (
    EPILOGUE_COLUMNS,
    ROW_TILES_PER_GROUP,
    LowRankTerm,
    add_term,
    bounds_of_tile,
    column_halves,
    halves,
    multiply,
    rows_between,
    step_masks,
    term_arguments,
    tile_of_program,
)
from .routing import RowOrder, require_gpu
from .tiles import Tile, tile_for
from .weight_gradient import block_of, unit_stride_rows


@triton.jit
def bias_of(bias, first_col, num_cols, BLOCK: tl.constexpr):
    """A row of biases, float32."""
    cols = first_col + tl.arange(0, BLOCK)
    return tl.load(bias + cols, mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_activation(
    pre, tensors, first_row, first_col, row_ok, width, FORM: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Add the bias, store activations and, if wanted, pre-activations of a tile in parts of at most NARROW columns.

    pre: gate and up in pairs, or ungated. tensors: where they go, and the bias.
    """
    KIND: tl.constexpr = FORM[0]
    ALPHA: tl.constexpr = FORM[1]
    LIMIT: tl.constexpr = FORM[2]
    OFFSET: tl.constexpr = FORM[3]
    GATED: tl.constexpr = FORM[4]
    INTERLEAVED: tl.constexpr = FORM[5]
    STORE_PRE: tl.constexpr = FLAGS[2]
    HAS_BIAS: tl.constexpr = FLAGS[3]
    act_NI, pre_NP, bias_P = tensors
    if BLOCK_N > NARROW:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = column_halves(pre, BLOCK_M, 2 * BLOCK_N if GATED else BLOCK_N)
        store_activation(left, tensors, first_row, first_col, row_ok, width, FORM, FLAGS, BLOCK_M, HALF, NARROW)
        first_col += HALF
        store_activation(right, tensors, first_row, first_col, row_ok, width, FORM, FLAGS, BLOCK_M, HALF, NARROW)
    elif not GATED:
        if HAS_BIAS:
            pre += bias_of(bias_P, first_col, width, BLOCK_N)
        if STORE_PRE:
            store_act(pre_NP, pre, first_row, first_col, row_ok, width, BLOCK_M, BLOCK_N)
        store_act(act_NI, activate(pre, KIND, ALPHA), first_row, first_col, row_ok, width, BLOCK_M, BLOCK_N)
    else:
        if INTERLEAVED:
            if HAS_BIAS:
                pre += bias_of(bias_P, 2 * first_col, 2 * width, 2 * BLOCK_N)
            if STORE_PRE:
                store_act(pre_NP, pre, first_row, 2 * first_col, row_ok, 2 * width, BLOCK_M, 2 * BLOCK_N)
        gate, up = tl.split(tl.reshape(pre, (BLOCK_M, BLOCK_N, 2)))
        if not INTERLEAVED:
            if HAS_BIAS:
                gate += bias_of(bias_P, first_col, width, BLOCK_N)
                up += bias_of(bias_P + width, first_col, width, BLOCK_N)
            if STORE_PRE:
                store_pre(pre_NP, gate, up, first_row, first_col, row_ok, width, True, False, BLOCK_M, BLOCK_N)
        act = glu(gate, up, KIND, ALPHA, LIMIT, OFFSET)
        store_act(act_NI, act, first_row, first_col, row_ok, width, BLOCK_M, BLOCK_N)


@triton.jit
def multiply_two(
    first, second, rows_at, row_ok, weights_at, col_ok, A, stride_a, scales,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_K: tl.constexpr,
):  # fmt: skip
    """`multiply` of the same rows by two blocks of the weight."""
    first_at, second_at = weights_at
    first_scales, second_scales = scales
    for k in range(0, A, BLOCK_K):
        x_ok, w_ok = step_masks(row_ok, col_ok, A - k, EVEN_K, BLOCK_K)
        x = tl.load(rows_at, mask=x_ok, other=0.0)
        w = load_weight(first_at, w_ok, first_scales, k, x.dtype, SCALE_K, BLOCK_K)
        first = tl.dot(x, w, first, input_precision="ieee")
        w = load_weight(second_at, w_ok, second_scales, k, x.dtype, SCALE_K, BLOCK_K)
        second = tl.dot(x, w, second, input_precision="ieee")
        rows_at += BLOCK_K
        first_at += BLOCK_K * stride_a
        second_at += BLOCK_K * stride_a
    return first, second


@triton.jit
def up_tile(
    tensors, first_row, end, expert, first_col, sizes, strides, low, FORM: tl.constexpr, FLAGS: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The results of BLOCK_M rows of one expert; tuples as `up_kernel` makes them."""
    hidden_TH, weight, bias_EP, act_NI, pre_NP, order_N, weight_scale = tensors
    H, width = sizes
    stride_hidden, stride_p, stride_h, stride_scale_p, stride_scale_h = strides
    GATED: tl.constexpr = FORM[4]
    INTERLEAVED: tl.constexpr = FORM[5]
    TOP_K: tl.constexpr = FLAGS[0]
    TWO: tl.constexpr = FLAGS[1]
    HAS_LOW: tl.constexpr = FLAGS[4]
    EVEN_K: tl.constexpr = FLAGS[5]
    BLOCK_N: tl.constexpr = BLOCKS[0]
    BLOCK_K: tl.constexpr = BLOCKS[1]
    BLOCK_R: tl.constexpr = BLOCKS[2]
    NARROW: tl.constexpr = BLOCKS[3]
    SCALE_N: tl.constexpr = BLOCKS[4]
    SCALE_K: tl.constexpr = BLOCKS[5]
    # columns of the weight in the first accumulator
    WIDE: tl.constexpr = 2 * BLOCK_N if GATED and not TWO else BLOCK_N
    lanes = tl.arange(0, WIDE)
    if WIDE == BLOCK_N:
        cols = first_col + lanes
        col_ok = cols < width
    elif INTERLEAVED:
        cols = 2 * first_col + lanes
        col_ok = cols < 2 * width
    else:
        cols = (lanes % 2) * width + first_col + lanes // 2
        col_ok = first_col + lanes // 2 < width
    rows, row_ok = rows_between(first_row, end, BLOCK_M)
    token = (tl.load(order_N + rows, mask=row_ok, other=0) // TOP_K).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    hidden_at = hidden_TH + token[:, None] * stride_hidden + ks[None, :]
    weight_at = weight + cols.to(tl.int64)[None, :] * stride_p + ks.to(tl.int64)[:, None] * stride_h
    scales = (scale_places(weight_scale, cols, stride_scale_p, SCALE_N), stride_scale_h)
    pre = tl.zeros((BLOCK_M, WIDE), tl.float32)
    if TWO:
        both_at = (weight_at, weight_at + tl.cast(width, tl.int64) * stride_p)
        both_scales = (scales, (scale_places(weight_scale, cols + width, stride_scale_p, SCALE_N), stride_scale_h))
        gate, up = multiply_two(
            pre, pre, hidden_at, row_ok, both_at, col_ok, H, stride_h, both_scales, EVEN_K, BLOCK_K, SCALE_K
        )
        gate = add_term(gate, low, rows, row_ok, cols, col_ok, HAS_LOW, BLOCK_R)
        up = add_term(up, low, rows, row_ok, cols + width, col_ok, HAS_LOW, BLOCK_R)
        pre = tl.reshape(tl.join(gate, up), (BLOCK_M, 2 * BLOCK_N))
    else:
        pre = multiply(pre, hidden_at, row_ok, weight_at, col_ok, H, stride_h, scales, EVEN_K, BLOCK_K, SCALE_K)
        pre = add_term(pre, low, rows, row_ok, cols, col_ok, HAS_LOW, BLOCK_R)
    to = (act_NI, pre_NP, bias_EP + expert.to(tl.int64) * (2 * width if GATED else width))
    store_activation(pre, to, first_row, first_col, row_ok, width, FORM, FLAGS, BLOCK_M, BLOCK_N, NARROW)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def up_kernel(
    hidden_TH, weight, bias_EP, act_NI, pre_NP, order_N, expert_end_E, expert_M, row_M,
    num_rows, num_tiles, H, width, stride_hidden, stride_weight_e, stride_weight_p, stride_weight_h,
    low_NR, low_weight, R, stride_low_e, stride_low_b, stride_low_r,
    weight_scale, stride_scale_e, stride_scale_n, stride_scale_k, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    TOP_K: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, TWO: tl.constexpr, STORE_PRE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LOW: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    NARROW: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """act and, if stored, pre of one tile of rows and BLOCK_N columns of I; grid (M * column tiles,)."""
    FORM: tl.constexpr = (KIND, ALPHA, LIMIT, OFFSET, GATED, INTERLEAVED)
    FLAGS: tl.constexpr = (TOP_K, TWO, STORE_PRE, HAS_BIAS, HAS_LOW, EVEN_K)
    BLOCKS: tl.constexpr = (BLOCK_N, BLOCK_K, BLOCK_R, NARROW, SCALE_N, SCALE_K)
    tile, col_block = tile_of_program(num_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert, first, end = bounds_of_tile(tile, expert_M, row_M, expert_end_E, num_rows)
    first_col = col_block * BLOCK_N
    if expert < 0:  # rows of no expert are zero; an unused tile has no rows
        _, row_ok = rows_between(first, end, BLOCK_M)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        store_act(act_NI, zeros, first, first_col, row_ok, width, BLOCK_M, BLOCK_N)
        if STORE_PRE:
            store_pre(pre_NP, zeros, zeros, first, first_col, row_ok, width, GATED, INTERLEAVED, BLOCK_M, BLOCK_N)
        return

    scale_of_expert = weight_scale + expert.to(tl.int64) * stride_scale_e
    matrix = weight + expert.to(tl.int64) * stride_weight_e
    tensors = (hidden_TH, matrix, bias_EP, act_NI, pre_NP, order_N, scale_of_expert)
    sizes = (H, width)
    strides = (stride_hidden, stride_weight_p, stride_weight_h, stride_scale_n, stride_scale_k)
    low = (low_NR, low_weight + expert.to(tl.int64) * stride_low_e, R, stride_low_b, stride_low_r)
    if HALVES:
        if end - first <= BLOCK_M // 2:
            up_tile(tensors, first, end, expert, first_col, sizes, strides, low, FORM, FLAGS, BLOCKS, BLOCK_M // 2)
        else:
            up_tile(tensors, first, end, expert, first_col, sizes, strides, low, FORM, FLAGS, BLOCKS, BLOCK_M)
    else:
        up_tile(tensors, first, end, expert, first_col, sizes, strides, low, FORM, FLAGS, BLOCKS, BLOCK_M)


def launch_up(
    hidden_TH: Tensor,
    weight: Tensor,
    order: RowOrder,
    form: ExpertForm,
    *,
    top_k: int,
    bias: Tensor | None = None,
    store_pre: bool = False,
    term: LowRankTerm | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Activations of every routed row, in expert order.

    Args:
        weight: [E, P, H], or [E, H, P] if transposed; any strides, the dtype of `hidden_TH`, or fp8 with `scale`.
        bias: [E, P].
        term: Added to the pre-activation; its weight is [E, P, R].
        scale: Of blocks of the weight, as in ExpertWeights.

    Returns:
        act_NI and, with `store_pre`, pre_NP, both in the dtype of `hidden_TH`; zeros for the rows of no expert.
    """
    require_gpu(hidden_TH)
    hidden_TH, num_rows = unit_stride_rows(hidden_TH), order.order_N.numel()
    weight_EPH = weight.transpose(1, 2) if form.transposed else weight
    num_experts, P, H = weight_EPH.shape
    width = P // 2 if form.gated else P
    two = form.gated and not form.interleaved and weight_EPH.stride(1) == 1
    act_NI = hidden_TH.new_empty(num_rows, width)
    pre_NP = hidden_TH.new_empty(num_rows, P) if store_pre else None

    def run(tile: Tile) -> None:
        block_n, block_k = block_of(width, tile.block_n), block_of(H, tile.block_k)
        arguments = order.arguments(tile.block_m)
        num_tiles = arguments[-1].numel()
        up_kernel[(num_tiles * triton.cdiv(width, block_n),)](
            hidden_TH, weight, weight if bias is None else bias.contiguous(),  # an absent operand is never read
            act_NI, act_NI if pre_NP is None else pre_NP, *arguments,
            num_rows, num_tiles, H, width, hidden_TH.stride(0), *weight_EPH.stride(), **term_arguments(term, weight),
            **scale_arguments(scale, weight),
            TOP_K=top_k, **form_constants(form), TWO=two, STORE_PRE=store_pre, HAS_BIAS=bias is not None,
            EVEN_K=H % block_k == 0, BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            NARROW=EPILOGUE_COLUMNS // 2, HALVES=halves(tile), GROUP=ROW_TILES_PER_GROUP,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    if act_NI.numel():
        run(tile_for("up", num_rows // num_experts, width, H, weight.dtype, hidden_TH.device, launch=run))
    return act_NI, pre_NP
