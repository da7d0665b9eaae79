"""Rows in expert order, and what multiplies them by one expert's matrix after the other.

Shape suffixes: N routed rows in expert order, E experts, A and B the widths that a projection maps from and to.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Projection = Literal["up", "down"]
# the matrices `[B, A]` of some experts, one after the other
Matrices = Callable[[list[int]], Iterable[Tensor]]


class Plan(NamedTuple):
    """Order of a batch's rows, as the pipeline knows it.

    Attributes:
        order_N: int64, the slot `t * K + k` of each row in expert order; rows that nobody computes here come last.
        expert_end_E: int32, where the rows of each expert end, on the rows' device.
    """

    order_N: Tensor
    expert_end_E: Tensor


def expert_rows(expert_end_E: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, with their rows. Waits for the device."""
    start = 0
    for expert, end in enumerate(expert_end_E.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


@torch.compiler.disable(reason="hf_moe loops over the experts that have rows, which are known when it runs")
def linear_by_expert(
    rows_NA: Tensor, plan: Plan, matrices: Matrices, width: int, bias_EB: Tensor | None = None
) -> Tensor:
    """Rows times the matrix of their expert, one matrix at a time, of experts that have rows alone.

    Nothing of the matrices is kept: the backward asks for them again.

    Args:
        rows_NA: In expert order.
        matrices: Gives the frozen matrices `[B, A]` of the experts it is asked for, in the rows' dtype, in order.
        width: B.
        bias_EB: Differentiable.

    Returns:
        `[N, B]`, differentiable in the rows and the bias; zero for rows after the last expert's.
    """
    out_NB = _LinearByExpert.apply(rows_NA, plan.expert_end_E, matrices, width)
    return out_NB if bias_EB is None else out_NB + _bias_rows(bias_EB, plan, rows_NA.shape[0])


def linear_by_matrix(
    rows_NA: Tensor,
    plan: Plan,
    matrices: Sequence[Tensor] | Tensor,
    bias_EB: Tensor | None,
    width: int,
    transposed: bool,
) -> Tensor:
    """Rows times the matrix of their expert as `torch.nn.functional.linear` computes it, differentiable in everything.

    Args:
        rows_NA: In expert order.
        matrices: `[B, A]` by expert, or `[A, B]` if `transposed`.
        width: B.
    """
    parts, end = [], 0
    for expert, rows in expert_rows(plan.expert_end_E):
        matrix = matrices[expert].T if transposed else matrices[expert]
        parts.append(F.linear(rows_NA[rows], matrix, None if bias_EB is None else bias_EB[expert]))
        end = rows.stop
    return torch.cat([*parts, rows_NA.new_zeros(rows_NA.shape[0] - end, width)])


def _bias_rows(bias_EB: Tensor, plan: Plan, num_rows: int) -> Tensor:
    """The bias of each row's expert; zero for rows after the last expert's."""
    row_N = torch.arange(num_rows, device=bias_EB.device, dtype=plan.expert_end_E.dtype)
    expert_N = torch.searchsorted(plan.expert_end_E, row_N, right=True)
    is_left_out_N = expert_N == len(bias_EB)
    return bias_EB[expert_N.clamp(max=len(bias_EB) - 1)].masked_fill(is_left_out_N.unsqueeze(-1), 0.0)


class _LinearByExpert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NA: Tensor, expert_end_E: Tensor, matrices: Matrices, width: int) -> Tensor:
        ctx.save_for_backward(expert_end_E)
        ctx.matrices, ctx.width_in = matrices, rows_NA.shape[1]
        out_NB = rows_NA.new_zeros(rows_NA.shape[0], width)
        for rows, matrix in _each(expert_end_E, matrices):
            torch.mm(rows_NA[rows], matrix.T, out=out_NB[rows])
        return out_NB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NB: Tensor) -> tuple[Tensor | None, ...]:
        (expert_end_E,) = ctx.saved_tensors
        grad_NB = grad_NB.contiguous()
        grad_NA = grad_NB.new_zeros(grad_NB.shape[0], ctx.width_in)
        for rows, matrix in _each(expert_end_E, ctx.matrices):
            torch.mm(grad_NB[rows], matrix, out=grad_NA[rows])
        return grad_NA, None, None, None


def _each(expert_end_E: Tensor, matrices: Matrices) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each expert that has some, with its matrix."""
    found = list(expert_rows(expert_end_E))
    return zip((rows for _, rows in found), matrices([expert for expert, _ in found]), strict=True)
