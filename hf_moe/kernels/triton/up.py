"""The up projection of every expert with its activation: tokens gathered, gate and up in one loop over H.

Concatenated gate and up take two accumulators. Interleaved ones take one of twice the width that is split in the
epilogue, so that memory is read in whole lines in both weight layouts. Ungated experts take one.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), R rank of the low-rank addend, M row tiles.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..layer_call import ExpertForm
from .activation import activate, form_constants, glu
from .grouped_linear import (
    ROW_TILES_PER_GROUP,
    LowRankTerm,
    add_terms,
    rows_of_tile,
    term_arguments,
    tile_of_program,
)
from .routing import RowOrder, require_gpu
from .tiles import Tile, tile_for
from .weight_gradient import block_of, unit_stride_rows


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def up_kernel(
    hidden_TH, weight, bias_EP, act_NI, pre_NP, order_N, expert_end_E, expert_M, row_M,
    num_rows, num_tiles, H, width, stride_hidden, stride_weight_e, stride_weight_p, stride_weight_h,
    low_NR, low_weight, R, stride_low_e, stride_low_b, stride_low_r,
    TOP_K: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, STORE_PRE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LOW: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """act and, if stored, pre of one tile of rows and BLOCK_N columns of I; grid (M * column tiles,)."""
    # columns of the weight in the first accumulator; concatenated gate and up have a second one, I columns further
    TWO: tl.constexpr = GATED and not INTERLEAVED
    WIDE: tl.constexpr = 2 if GATED and INTERLEAVED else 1
    P = 2 * width if GATED else width
    tile, col_block = tile_of_program(num_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert, rows, row_ok = rows_of_tile(tile, expert_M, row_M, expert_end_E, num_rows, BLOCK_M)
    act_cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = col_block * (WIDE * BLOCK_N) + tl.arange(0, WIDE * BLOCK_N)
    col_ok = cols < WIDE * width
    act_at = act_NI + rows.to(tl.int64)[:, None] * width + act_cols[None, :]
    act_ok = row_ok[:, None] & (act_cols < width)[None, :]
    pre_at = pre_NP + rows.to(tl.int64)[:, None] * P + cols[None, :]
    pre_ok = row_ok[:, None] & col_ok[None, :]
    if expert < 0:  # rows of no expert are zero; an unused tile has no rows
        tl.store(act_at, tl.zeros((BLOCK_M, BLOCK_N), act_NI.dtype.element_ty), mask=act_ok)
        if STORE_PRE:
            nothing = tl.zeros((BLOCK_M, WIDE * BLOCK_N), pre_NP.dtype.element_ty)
            tl.store(pre_at, nothing, mask=pre_ok)
            if TWO:
                tl.store(pre_at + width, nothing, mask=pre_ok)
        return

    token = (tl.load(order_N + rows, mask=row_ok, other=0) // TOP_K).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    hidden_at = hidden_TH + token[:, None] * stride_hidden + ks[None, :]
    weight_at = weight + expert.to(tl.int64) * stride_weight_e + cols.to(tl.int64)[None, :] * stride_weight_p
    weight_at += ks.to(tl.int64)[:, None] * stride_weight_h
    to_second = tl.cast(width, tl.int64) * stride_weight_p
    first = tl.zeros((BLOCK_M, WIDE * BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, H, BLOCK_K):
        x_ok = row_ok[:, None]
        w_ok = col_ok[None, :]
        if not EVEN_K:
            x_ok = x_ok & (ks < H - k)[None, :]
            w_ok = w_ok & (ks < H - k)[:, None]
        x = tl.load(hidden_at, mask=x_ok, other=0.0)
        w = tl.load(weight_at, mask=w_ok, other=0.0)
        first = tl.dot(x, w, first, input_precision="ieee")
        if TWO:
            w = tl.load(weight_at + to_second, mask=w_ok, other=0.0)
            second = tl.dot(x, w, second, input_precision="ieee")
        hidden_at += BLOCK_K
        weight_at += BLOCK_K * stride_weight_h

    low = (low_NR, low_weight + expert.to(tl.int64) * stride_low_e, R, stride_low_b, stride_low_r)
    bias_at = bias_EP + expert.to(tl.int64) * P
    first = add_terms(first, low, bias_at, rows, row_ok, cols, col_ok, HAS_LOW, HAS_BIAS, BLOCK_R)
    if STORE_PRE:
        tl.store(pre_at, first.to(pre_NP.dtype.element_ty), mask=pre_ok)
    if TWO:
        second = add_terms(second, low, bias_at, rows, row_ok, cols + width, col_ok, HAS_LOW, HAS_BIAS, BLOCK_R)
        if STORE_PRE:
            tl.store(pre_at + width, second.to(pre_NP.dtype.element_ty), mask=pre_ok)
        act = glu(first, second, KIND, ALPHA, LIMIT, OFFSET)
    elif GATED:
        gate, up = tl.split(tl.reshape(first, (BLOCK_M, BLOCK_N, 2)))
        act = glu(gate, up, KIND, ALPHA, LIMIT, OFFSET)
    else:
        act = activate(first, KIND, ALPHA)
    tl.store(act_at, act.to(act_NI.dtype.element_ty), mask=act_ok)


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
) -> tuple[Tensor, Tensor | None]:
    """Activations of every routed row, in expert order.

    Args:
        weight: [E, P, H], or [E, H, P] if transposed; any strides, the dtype of `hidden_TH`.
        bias: [E, P].
        term: Added to the pre-activation; its weight is [E, P, R].

    Returns:
        act_NI and, with `store_pre`, pre_NP, both in the dtype of `hidden_TH`; zeros for the rows of no expert.
    """
    require_gpu(hidden_TH)
    hidden_TH, num_rows = unit_stride_rows(hidden_TH), order.order_N.numel()
    weight_EPH = weight.transpose(1, 2) if form.transposed else weight
    num_experts, P, H = weight_EPH.shape
    width = P // 2 if form.gated else P
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
            TOP_K=top_k, **form_constants(form), STORE_PRE=store_pre, HAS_BIAS=bias is not None,
            EVEN_K=H % block_k == 0, BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            GROUP=ROW_TILES_PER_GROUP, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    if act_NI.numel():
        run(tile_for("up", num_rows // num_experts, width, H, hidden_TH.dtype, hidden_TH.device, launch=run))
    return act_NI, pre_NP
