"""Sum of every token's K expert outputs, in float32 and in the order of the slots.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, H hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 1024


@triton.jit
def nan_without_expert(total, index_N, slot, num_ids):
    """The total, or NaN where the slot's id is out of range: the assertion of such ids may be compiled out."""
    expert = tl.load(index_N + slot)
    return tl.where((expert >= 0) & (expert < num_ids), total, float("nan"))


@triton.jit(do_not_specialize_on_alignment=["weights_N", "index_N"])
def sum_k_kernel(
    rows_NH, weights_N, index_N, out_TH, H, num_ids,
    K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's columns. Grid (T, column blocks)."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    col_ok = cols < H
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows_NH + (token * K + k) * H + cols, mask=col_ok, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            row *= tl.load(weights_N + token * K + k).to(tl.float32)
        total += row
        if HAS_IDS:
            total = nan_without_expert(total, index_N, token * K + k, num_ids)
    tl.store(out_TH + token * H + cols, total.to(out_TH.dtype.element_ty), mask=col_ok)


def launch_sum_k(
    rows_NH: Tensor, top_k: int, out_dtype: torch.dtype, weights_TK: Tensor | None = None, *,
    index_TK: Tensor | None = None, num_ids: int = 0,
) -> Tensor:  # fmt: skip
    """Sum the `top_k` rows of every token, each times its weight if given.

    Args:
        rows_NH: Contiguous, in the order of the slots.
        index_TK: The slots' ids: a token is NaN if one of them is not in `[0, num_ids)`.

    Returns:
        [T, H] in `out_dtype`, accumulated in float32 and rounded once.
    """
    num_rows, hidden_size = rows_NH.shape
    out_TH = torch.empty(num_rows // top_k, hidden_size, dtype=out_dtype, device=rows_NH.device)
    if out_TH.numel():
        block = min(LARGEST_BLOCK, triton.next_power_of_2(hidden_size))
        grid = (out_TH.shape[0], triton.cdiv(hidden_size, block))
        # operands that are not given are not read
        weights_N = rows_NH if weights_TK is None else weights_TK.contiguous()
        index_N = rows_NH if index_TK is None else index_TK.contiguous()
        sum_k_kernel[grid](
            rows_NH, weights_N, index_N, out_TH, hidden_size, num_ids, K=top_k, HAS_WEIGHTS=weights_TK is not None,
            HAS_IDS=index_TK is not None, BLOCK=block,
        )  # fmt: skip
    return out_TH
