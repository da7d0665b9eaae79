"""The order of routed rows: sort them by expert, gather the tokens, and sum the weighted outputs of each token.

Backward passes sum over a token's slots in a fixed order instead of adding up by index: the same bits on every run.

Shape suffixes: T tokens, K slots per token, N = T * K routed rows, E experts, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@torch.library.custom_op("hf_moe::sort_by_expert", mutates_args=())
def sort_by_expert(index_TK: Tensor, num_experts: int, num_ids: int) -> tuple[Tensor, Tensor]:
    """Order the routed rows by expert.

    Args:
        index_TK: Expert ids, int64.
        num_ids: Ids must be smaller than this: `num_experts`, or one more where the id `num_experts` marks a slot that
            another process computes (expert parallelism).

    Returns:
        order_N: int64, `t * K + k` of each row in expert order; rows that nobody computes here come last.
        expert_end_E: int32, where the rows of each expert end.

    Raises:
        IndexError: On the CPU, if an id is out of range. On a GPU a device-side assertion fails.
    """
    check_ids(index_TK, num_ids)
    ids_N, order_N = index_TK.flatten().sort(stable=True)
    bounds_E = torch.arange(num_experts, device=ids_N.device)
    return order_N, torch.searchsorted(ids_N, bounds_E, right=True, out_int32=True)


@sort_by_expert.register_fake
def _(index_TK: Tensor, num_experts: int, num_ids: int) -> tuple[Tensor, Tensor]:
    order_N = index_TK.new_empty(index_TK.numel(), dtype=torch.int64)
    return order_N, index_TK.new_empty(num_experts, dtype=torch.int32)


def check_ids(index_TK: Tensor, num_ids: int) -> None:
    """Refuse expert ids outside of `[0, num_ids)`; on a GPU without waiting for it."""
    if index_TK.numel() == 0:
        return
    if index_TK.device.type == "cpu":
        wrong_TK = (index_TK < 0) | (index_TK >= num_ids)
        if wrong_TK.any():
            token, slot = wrong_TK.nonzero()[0].tolist()
            raise IndexError(
                f"expert id {index_TK[token, slot]} of token {token} is not in [0, {num_ids}): check the router."
            )
    else:
        torch._assert_async(((index_TK >= 0) & (index_TK < num_ids)).all())


class GatherRows(torch.autograd.Function):
    """The token of every row, in expert order: `(hidden_TH, order_N, K) -> [N, H]`."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, order_N: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.slots = slots
        return hidden_TH[order_N // slots]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor | None, ...]:
        (order_N,) = ctx.saved_tensors
        return _sum_slots(grad_NH, order_N, ctx.slots).to(grad_NH.dtype), None, None


class CombineRows(torch.autograd.Function):
    """The weighted sum of a token's rows: `(rows_NH in expert order, weights_TK, order_N) -> [T, H]` in float32."""

    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, weights_TK: Tensor, order_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NH, weights_TK, order_N)
        weights_N = weights_TK.reshape(-1)[order_N]
        return _sum_slots(_wide(rows_NH) * weights_N.unsqueeze(-1), order_N, weights_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        rows_NH, weights_TK, order_N = ctx.saved_tensors
        grad_NH = grad_TH[order_N // weights_TK.shape[1]]
        weights_N = weights_TK.reshape(-1)[order_N]
        grad_rows_NH = (grad_NH * weights_N.unsqueeze(-1)).to(rows_NH.dtype) if ctx.needs_input_grad[0] else None
        grad_weights_TK = None
        if ctx.needs_input_grad[1]:
            grad_N = (grad_NH * rows_NH).sum(-1).to(weights_TK.dtype)
            grad_weights_TK = torch.empty_like(grad_N).index_copy(0, order_N, grad_N).view_as(weights_TK)
        return grad_rows_NH, grad_weights_TK, None


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _sum_slots(rows_NH: Tensor, order_N: Tensor, slots: int) -> Tensor:
    """Rows in expert order summed to tokens, at least in float32."""
    wide_NH = _wide(rows_NH)
    by_slot_NH = torch.empty_like(wide_NH).index_copy(0, order_N, wide_NH)
    return by_slot_NH.view(-1, slots, rows_NH.shape[1]).sum(1)
