"""One linear map per expert over rows sorted by expert; rows may be gathered from tokens and scattered to slots.

The same kernel serves the down projection, the gradient of the rows, and the low-rank factors of an adapter.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, A input and B output width, R rank of the
low-rank addend, M row tiles.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .fp8 import load_weight, scale_arguments, scale_places
from .routing import RowOrder, require_gpu
from .tiles import Tile, tile_for
from .weight_gradient import block_of, unit_stride_rows

# Row tiles that sweep the columns together: a weight tile that one of them reads is in L2 for the others.
ROW_TILES_PER_GROUP = 8
# columns of the low-rank factors that one dot takes
LARGEST_RANK_BLOCK = 64
# Columns of one part of an epilogue: what a wide tile is stored from takes as many registers as the tile itself.
EPILOGUE_COLUMNS = 64
# Rows of the lowest half of a tile: products of fewer have no wgmma, and few rows wait for the weights anyway.
FEWEST_ROWS_OF_HALF = 64


class LowRankTerm(NamedTuple):
    """`rows_NR @ weight[e]^T`, which is added to the product of the rows of every expert e.

    Attributes:
        rows_NR: In expert order, already scaled.
        weight: [E, B, R], any strides.
    """

    rows_NR: Tensor
    weight: Tensor


def term_arguments(term: LowRankTerm | None, unused: Tensor) -> dict[str, Any]:
    """Arguments of kernels that call `add_term`; `unused` stands for the operands of a term that is absent."""
    rows_NR, weight = (unused, unused) if term is None else (term.rows_NR.contiguous(), term.weight)
    (stride_e, stride_b, stride_r), rank = weight.stride(), 0 if term is None else weight.shape[2]
    return {
        "low_NR": rows_NR,
        "low_weight": weight,
        "R": rank,
        "stride_low_e": stride_e,
        "stride_low_b": stride_b,
        "stride_low_r": stride_r,
        "HAS_LOW": term is not None,
        "BLOCK_R": block_of(rank, LARGEST_RANK_BLOCK),
    }


def halves(tile: Tile) -> bool:
    """Whether a kernel multiplies half as many rows where an expert's last tile holds no more."""
    return tile.block_m // 2 >= FEWEST_ROWS_OF_HALF


@triton.jit
def tile_of_program(num_tiles, col_blocks, GROUP: tl.constexpr):
    """(row tile, column tile) of this program: groups of row tiles, expert-major, one group's column tiles inner."""
    pid = tl.program_id(0)
    group = pid // (GROUP * col_blocks)
    first = group * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = pid - first * col_blocks
    return first + within % size, within // size


@triton.jit
def bounds_of_tile(tile, expert_M, row_M, expert_end_E, num_rows):
    """(expert, first row, end of its rows). Expert -1: rows that no expert computes, or none at all."""
    expert = tl.load(expert_M + tile)
    first = tl.load(row_M + tile)
    end = tl.load(expert_end_E + expert, mask=expert >= 0, other=0)
    return expert, first, tl.where(expert >= 0, end, tl.where(first >= 0, num_rows, 0))


@triton.jit
def rows_between(first, end, BLOCK_M: tl.constexpr):
    """(rows of a tile, whether a row is the tile's)."""
    rows = first + tl.arange(0, BLOCK_M)
    return rows, (rows >= 0) & (rows < end)


@triton.jit
def step_masks(row_ok, col_ok, left, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Masks of the rows [M, BLOCK_K] and of the weight [BLOCK_K, N] where `left` columns of the rows are left."""
    x_ok = row_ok[:, None]
    w_ok = col_ok[None, :]
    if not EVEN_K:
        ks = tl.arange(0, BLOCK_K)
        x_ok = x_ok & (ks < left)[None, :]
        w_ok = w_ok & (ks < left)[:, None]
    return x_ok, w_ok


@triton.jit
def multiply(
    acc, rows_at, row_ok, weight_at, col_ok, A, stride_a, scales,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, SCALE_K: tl.constexpr,
):  # fmt: skip
    """acc + rows @ weight^T over A, from the places of the first BLOCK_K columns of the rows and of the weight.

    scales: As `load_weight` takes them.
    """
    for k in range(0, A, BLOCK_K):
        x_ok, w_ok = step_masks(row_ok, col_ok, A - k, EVEN_K, BLOCK_K)
        x = tl.load(rows_at, mask=x_ok, other=0.0)
        w = load_weight(weight_at, w_ok, scales, k, x.dtype, SCALE_K, BLOCK_K)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        rows_at += BLOCK_K
        weight_at += BLOCK_K * stride_a
    return acc


@triton.jit
def add_low_rank(
    acc, low_NR, low_weight, rows, row_ok, cols, col_ok, R, stride_b, stride_r, BLOCK_R: tl.constexpr
):  # fmt: skip
    """acc + low @ low_weight^T, with the weight of the rows' expert."""
    for rank in tl.range(0, R, BLOCK_R, num_stages=1):  # one step as a rule: nothing to prefetch
        ranks = rank + tl.arange(0, BLOCK_R)
        rank_ok = ranks < R
        low_at = low_NR + rows.to(tl.int64)[:, None] * R + ranks[None, :]
        weight_at = low_weight + cols.to(tl.int64)[None, :] * stride_b
        weight_at += ranks.to(tl.int64)[:, None] * stride_r
        low = tl.load(low_at, mask=row_ok[:, None] & rank_ok[None, :], other=0.0)
        weight = tl.load(weight_at, mask=rank_ok[:, None] & col_ok[None, :], other=0.0)
        acc = tl.dot(low, weight, acc, input_precision="ieee")
    return acc


@triton.jit
def add_term(acc, low, rows, row_ok, cols, col_ok, HAS_LOW: tl.constexpr, BLOCK_R: tl.constexpr):
    """acc + low-rank term of the rows' expert, if there is one; low: (low_NR, low_weight, R, stride_b, stride_r)."""
    if HAS_LOW:
        acc = add_low_rank(acc, low[0], low[1], rows, row_ok, cols, col_ok, low[2], low[3], low[4], BLOCK_R)
    return acc


@triton.jit
def column_halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def store_columns(
    acc, tensors, target, row_ok, first_col, B, HAS_BIAS: tl.constexpr, HAS_ROW_WEIGHTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Add the bias, multiply with the rows' weights and store, in parts of at most NARROW columns.

    tensors: the bias of the expert, the weights of these rows, and the output.
    """
    if BLOCK_N > NARROW:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        store_columns(left, tensors, target, row_ok, first_col, B, HAS_BIAS, HAS_ROW_WEIGHTS, BLOCK_M, HALF, NARROW)
        first_col += HALF
        store_columns(right, tensors, target, row_ok, first_col, B, HAS_BIAS, HAS_ROW_WEIGHTS, BLOCK_M, HALF, NARROW)
    else:
        bias_B, weights_M, out_NB = tensors
        cols = first_col + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            acc += tl.load(bias_B + cols, mask=cols < B, other=0.0).to(tl.float32)[None, :]
        if HAS_ROW_WEIGHTS:
            acc *= weights_M[:, None]
        out_at = out_NB + target.to(tl.int64)[:, None] * B + cols[None, :]
        tl.store(out_at, acc.to(out_NB.dtype.element_ty), mask=row_ok[:, None] & (cols < B)[None, :])


@triton.jit
def linear_tile(
    tensors, first, end, expert, first_col, sizes, strides, low, FLAGS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The results of BLOCK_M rows of one expert; tuples as `grouped_linear_kernel` makes them."""
    rows_in, weight, bias_EB, row_weights_N, out_NB, order_N, weight_scale = tensors
    A, B, scale = sizes
    stride_rows, stride_b, stride_a, stride_scale_b, stride_scale_a = strides
    TOP_K: tl.constexpr = FLAGS[0]
    GATHER: tl.constexpr = FLAGS[1]
    SCATTER: tl.constexpr = FLAGS[2]
    HAS_BIAS: tl.constexpr = FLAGS[3]
    HAS_ROW_WEIGHTS: tl.constexpr = FLAGS[4]
    HAS_LOW: tl.constexpr = FLAGS[5]
    EVEN_K: tl.constexpr = FLAGS[6]
    BLOCK_K: tl.constexpr = BLOCKS[0]
    BLOCK_R: tl.constexpr = BLOCKS[1]
    NARROW: tl.constexpr = BLOCKS[2]
    SCALE_N: tl.constexpr = BLOCKS[3]
    SCALE_K: tl.constexpr = BLOCKS[4]
    rows, row_ok = rows_between(first, end, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    col_ok = cols < B
    slots = rows
    if GATHER or SCATTER or HAS_ROW_WEIGHTS:
        slots = tl.load(order_N + rows, mask=row_ok, other=0)
    source = slots // TOP_K if GATHER else rows
    target = slots if SCATTER else rows
    ks = tl.arange(0, BLOCK_K)
    rows_at = rows_in + source.to(tl.int64)[:, None] * stride_rows + ks[None, :]
    weight_at = weight + cols.to(tl.int64)[None, :] * stride_b + ks.to(tl.int64)[:, None] * stride_a
    scales = (scale_places(weight_scale, cols, stride_scale_b, SCALE_N), stride_scale_a)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = multiply(acc, rows_at, row_ok, weight_at, col_ok, A, stride_a, scales, EVEN_K, BLOCK_K, SCALE_K)
    acc *= scale
    acc = add_term(acc, low, rows, row_ok, cols, col_ok, HAS_LOW, BLOCK_R)
    row_weights = rows
    if HAS_ROW_WEIGHTS:
        row_weights = tl.load(row_weights_N + slots, mask=row_ok, other=0.0).to(tl.float32)
    to = (bias_EB + expert.to(tl.int64) * B, row_weights, out_NB)
    store_columns(acc, to, target, row_ok, first_col, B, HAS_BIAS, HAS_ROW_WEIGHTS, BLOCK_M, BLOCK_N, NARROW)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"], do_not_specialize_on_alignment=["row_weights_N"])
def grouped_linear_kernel(
    rows_in, weight, bias_EB, row_weights_N, out_NB, order_N, expert_end_E, expert_M, row_M,
    num_rows, num_tiles, A, B, scale, stride_rows, stride_weight_e, stride_weight_b, stride_weight_a,
    low_NR, low_weight, R, stride_low_e, stride_low_b, stride_low_r,
    weight_scale, stride_scale_e, stride_scale_n, stride_scale_k, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROW_WEIGHTS: tl.constexpr, HAS_LOW: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    NARROW: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = row_weight * (scale * row @ weight[e]^T + low @ low_weight[e]^T + bias[e]); grid (M * column tiles,)."""
    FLAGS: tl.constexpr = (TOP_K, GATHER, SCATTER, HAS_BIAS, HAS_ROW_WEIGHTS, HAS_LOW, EVEN_K)
    BLOCKS: tl.constexpr = (BLOCK_K, BLOCK_R, NARROW, SCALE_N, SCALE_K)
    tile, col_block = tile_of_program(num_tiles, tl.cdiv(B, BLOCK_N), GROUP)
    expert, first, end = bounds_of_tile(tile, expert_M, row_M, expert_end_E, num_rows)
    col = col_block * BLOCK_N
    if expert < 0:  # rows of no expert are zero; an unused tile has no rows
        rows, row_ok = rows_between(first, end, BLOCK_M)
        if SCATTER:
            rows = tl.load(order_N + rows, mask=row_ok, other=0)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        store_columns(zeros, (out_NB, rows, out_NB), rows, row_ok, col, B, False, False, BLOCK_M, BLOCK_N, NARROW)
        return

    scale_of_expert = weight_scale + expert.to(tl.int64) * stride_scale_e
    matrix = weight + expert.to(tl.int64) * stride_weight_e
    tensors = (rows_in, matrix, bias_EB, row_weights_N, out_NB, order_N, scale_of_expert)
    sizes = (A, B, scale)
    strides = (stride_rows, stride_weight_b, stride_weight_a, stride_scale_n, stride_scale_k)
    low = (low_NR, low_weight + expert.to(tl.int64) * stride_low_e, R, stride_low_b, stride_low_r)
    if HALVES:
        if end - first <= BLOCK_M // 2:
            linear_tile(tensors, first, end, expert, col, sizes, strides, low, FLAGS, BLOCKS, BLOCK_M // 2, BLOCK_N)
        else:
            linear_tile(tensors, first, end, expert, col, sizes, strides, low, FLAGS, BLOCKS, BLOCK_M, BLOCK_N)
    else:
        linear_tile(tensors, first, end, expert, col, sizes, strides, low, FLAGS, BLOCKS, BLOCK_M, BLOCK_N)


def launch_grouped_linear(
    rows: Tensor,
    weight: Tensor,
    order: RowOrder,
    *,
    top_k: int,
    transposed: bool,
    bias: Tensor | None = None,
    gather: bool = False,
    scatter: bool = False,
    row_weights_N: Tensor | None = None,
    term: LowRankTerm | None = None,
    scale: float = 1.0,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """`row_weight * (scale * row @ weight[e]^T + term + bias[e])` for every row of every expert e.

    Args:
        rows: [N, A] in expert order, or [T, A] with `gather`: row r reads `rows[order.order_N[r] // top_k]`.
        weight: [E, B, A], or [E, A, B] if `transposed`; any strides, the dtype of `rows`, or fp8 with `weight_scale`.
        order: Its `order_N` is read only with `gather`, `scatter` or `row_weights_N`.
        bias: [E, B].
        scatter: Whether row r is written to place `order.order_N[r]` instead of r.
        row_weights_N: A factor per slot, such as the routing weights.
        weight_scale: Of blocks of the weight, in its layout, as in ExpertWeights.

    Returns:
        [N, B] in the dtype of `rows`, accumulated in float32 and rounded once; zeros for the rows of no expert.
    """
    require_gpu(rows)
    rows, num_rows = unit_stride_rows(rows), order.order_N.numel() if gather else rows.shape[0]
    weight_EBA = weight.transpose(1, 2) if transposed else weight
    num_experts, B, A = weight_EBA.shape
    out_NB = rows.new_empty(num_rows, B)

    def run(tile: Tile) -> None:
        block_n, block_k = block_of(B, tile.block_n), block_of(A, tile.block_k)
        arguments = order.arguments(tile.block_m)
        num_tiles = arguments[-1].numel()
        grouped_linear_kernel[(num_tiles * triton.cdiv(B, block_n),)](
            rows, weight, weight if bias is None else bias.contiguous(),  # an absent operand's pointer is never read
            weight if row_weights_N is None else row_weights_N.contiguous(), out_NB, *arguments,
            num_rows, num_tiles, A, B, scale, rows.stride(0), *weight_EBA.stride(), **term_arguments(term, weight),
            **scale_arguments(weight_scale, weight, transposed),
            TOP_K=top_k, GATHER=gather, SCATTER=scatter, HAS_BIAS=bias is not None,
            HAS_ROW_WEIGHTS=row_weights_N is not None, EVEN_K=A % block_k == 0,
            BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=block_k, NARROW=EPILOGUE_COLUMNS,
            HALVES=halves(tile), GROUP=ROW_TILES_PER_GROUP, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    if out_NB.numel():
        run(tile_for("grouped_linear", num_rows // num_experts, B, A, weight.dtype, rows.device, launch=run))
    return out_NB
