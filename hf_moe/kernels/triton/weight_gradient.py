"""Gradients of the expert weights and biases: per expert, sums over the rows that were routed to it.

One program owns one tile of one expert's gradient and walks that expert's rows in order, so the result has no atomics
and the same bits from run to run. Experts without rows write zeros; sentinel rows lie past the last expert's end and
are never read.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, A and B the widths of the two factors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .routing import RowOrder
from .tiles import Tile, tile_for

MIN_DOT = 16  # tl.dot needs at least 16 in every dimension; narrower factors (LoRA ranks) are masked


@triton.jit
def expert_rows(expert_end, expert):
    """First and one-past-last row of an expert."""
    start = tl.load(expert_end + expert - 1, mask=expert > 0, other=0)
    return start, tl.load(expert_end + expert)


@triton.jit
def tokens_of(order, rows, row_ok, TOP_K: tl.constexpr):
    """Tokens of rows in expert order."""
    slots = tl.load(order + rows, mask=row_ok, other=0)
    return slots.to(tl.uint32) // TOP_K  # unsigned: one shift instead of three for a power of two


@triton.jit
def first_step(factor, start, ks, cols, stride, GATHER: tl.constexpr):
    """Where the first step's rows are in a factor by row, or token 0 in one by token (GATHER)."""
    if GATHER:
        return factor + cols[None, :]
    else:
        within = ks[:, None] * stride + cols[None, :]  # int32: a step spans few rows
        return factor + start.to(tl.int64) * stride + within


@triton.jit
def load_step(at, tokens, ok, stride, GATHER: tl.constexpr):
    """One step's rows of a factor."""
    if GATHER:
        at += tokens.to(tl.int64)[:, None] * stride
    return tl.load(at, mask=ok, other=0.0)


@triton.jit
def weight_gradient_kernel(
    left, right, out, order, expert_end, A, B, stride_left, stride_right, scale,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e] = scale * sum over the rows r of e of left[r]^T right[r]; grid (E * tiles of A * tiles of B,)."""
    pid = tl.program_id(0)
    blocks_b = tl.cdiv(B, BLOCK_B)
    tiles = tl.cdiv(A, BLOCK_A) * blocks_b
    expert = pid // tiles  # expert-major: the tiles of one expert are neighbours and share its rows in L2
    tile = pid % tiles
    cols_a = (tile // blocks_b) * BLOCK_A + tl.arange(0, BLOCK_A)
    cols_b = (tile % blocks_b) * BLOCK_B + tl.arange(0, BLOCK_B)
    a_ok = cols_a < A
    b_ok = cols_b < B
    start, end = expert_rows(expert_end, expert)
    ks = tl.arange(0, BLOCK_K)
    left_at = first_step(left, start, ks, cols_a, stride_left, GATHER_LEFT)
    right_at = first_step(right, start, ks, cols_b, stride_right, GATHER_RIGHT)
    acc = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    tokens = tokens_of(order, start + ks, ks < end - start, TOP_K)
    for first in range(start, end, BLOCK_K):
        left_ok = (ks < end - first)[:, None]
        right_ok = left_ok
        if not EVEN:
            left_ok = left_ok & a_ok[None, :]
            right_ok = right_ok & b_ok[None, :]
        left_KA = load_step(left_at, tokens, left_ok, stride_left, GATHER_LEFT)
        right_KB = load_step(right_at, tokens, right_ok, stride_right, GATHER_RIGHT)
        acc = tl.dot(tl.trans(left_KA), right_KB, acc, input_precision="ieee")
        # a step ahead: loads that wait for an index of their own step would halve the steps in flight
        next_row = first + BLOCK_K
        tokens = tokens_of(order, next_row + ks, ks < end - next_row, TOP_K)
        if not GATHER_LEFT:
            left_at += BLOCK_K * stride_left
        if not GATHER_RIGHT:
            right_at += BLOCK_K * stride_right
    acc *= scale
    at = out + expert.to(tl.int64) * A * B + cols_a.to(tl.int64)[:, None] * B + cols_b[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=a_ok[:, None] & b_ok[None, :])


@triton.jit(do_not_specialize_on_alignment=["row_weights"])
def bias_gradient_kernel(
    rows_NB, row_weights, out, order, expert_end, B, stride_rows,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the rows r of e of row_weights[order[r]] * rows[r]; grid (E * tiles of B,)."""
    pid = tl.program_id(0)
    blocks_b = tl.cdiv(B, BLOCK_B)
    expert = pid // blocks_b
    cols = (pid % blocks_b) * BLOCK_B + tl.arange(0, BLOCK_B)
    col_ok = cols < B
    start, end = expert_rows(expert_end, expert)
    acc = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    for first in range(start, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        row_ok = rows < end
        source = tokens_of(order, rows, row_ok, TOP_K) if GATHER else rows
        at = rows_NB + source.to(tl.int64)[:, None] * stride_rows + cols[None, :]
        values = tl.load(at, mask=row_ok[:, None] & col_ok[None, :], other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            slots = tl.load(order + rows, mask=row_ok, other=0)
            values *= tl.load(row_weights + slots, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        acc += values
    total = tl.sum(acc, axis=0)
    tl.store(out + expert.to(tl.int64) * B + cols, total.to(out.dtype.element_ty), mask=col_ok)


def unit_stride_rows(rows: Tensor) -> Tensor:
    """Rows whose elements are neighbours in memory; autograd may hand over expanded or transposed gradients."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def block_of(size: int, largest: int) -> int:
    """A block width that a tile table asks for, not wider than the masked size needs."""
    return min(largest, max(MIN_DOT, triton.next_power_of_2(size)))


def launch_weight_gradient(
    left: Tensor, right: Tensor, order: RowOrder, *, top_k: int, gather_left: bool = False,
    gather_right: bool = False, out_dtype: torch.dtype, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Sum `scale * left_row^T right_row` [E, A, B] over each expert's rows in float32; zeros for experts without rows.

    Args:
        left: [N, A] in expert order, or [T, A] with `gather_left`: row r reads `left[order.order_N[r] // top_k]`.
        right: [N, B] or [T, B], likewise. The dtype of `left`.
    """
    if left.dtype != right.dtype:
        raise ValueError(f"left and right must have one dtype, got {left.dtype} and {right.dtype}; cast one.")
    A, B, num_experts, num_rows = left.shape[1], right.shape[1], order.expert_end_E.numel(), order.order_N.numel()
    out = torch.empty(num_experts, A, B, dtype=out_dtype, device=left.device)
    if not num_rows:
        return out.zero_()
    left, right = unit_stride_rows(left), unit_stride_rows(right)

    def run(tile: Tile) -> None:
        block_a, block_b = block_of(A, tile.block_m), block_of(B, tile.block_n)
        weight_gradient_kernel[(num_experts * triton.cdiv(A, block_a) * triton.cdiv(B, block_b),)](
            left, right, out, order.order_N, order.expert_end_E, A, B, left.stride(0), right.stride(0), scale,
            TOP_K=top_k, GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right,
            EVEN=A % block_a == 0 and B % block_b == 0, BLOCK_A=block_a, BLOCK_B=block_b, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    run(tile_for("weight_gradient", num_rows // num_experts, B, A, left.dtype, left.device, launch=run))
    return out


def launch_bias_gradient(
    rows: Tensor, order: RowOrder, *, top_k: int, gather: bool, out_dtype: torch.dtype,
    row_weights_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Per expert, the sum of its rows, accumulated in float32.

    Args:
        rows: [N, B] in expert order, or [T, B] with `gather`: row r reads `rows[order.order_N[r] // top_k]`.
        out_dtype: dtype of the result.
        row_weights_N: A factor per slot (not per row in expert order), such as the routing weights; contiguous.

    Returns:
        [E, B], zeros for experts without rows.
    """
    B, num_experts = rows.shape[1], order.expert_end_E.numel()
    out = torch.empty(num_experts, B, dtype=out_dtype, device=rows.device)
    if not order.order_N.numel():
        return out.zero_()
    rows, block_b = unit_stride_rows(rows), block_of(B, 128)
    bias_gradient_kernel[(num_experts * triton.cdiv(B, block_b),)](
        rows, rows if row_weights_N is None else row_weights_N,  # not read without weights
        out, order.order_N, order.expert_end_E, B, rows.stride(0), TOP_K=top_k, GATHER=gather,
        HAS_WEIGHTS=row_weights_N is not None, BLOCK_B=block_b, BLOCK_K=16, num_warps=4,
    )  # fmt: skip
    return out
