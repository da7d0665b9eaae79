"""One linear layer with a matrix for each expert, in plain torch: every floating dtype, every device.

On the CPU (and where the GPU's product refuses) the products are separate calls that write into their place; on GPUs
from SM80 they are one call of `torch.nn.functional.grouped_mm`. That is one kernel, and nothing waits for the device,
for bfloat16 on SM90 and SM100 alone. For float16, float32 and on other GPUs torch reads the rows of every expert back,
which waits for the device and cannot be captured in a graph, and multiplies expert by expert: who asks for
`hf_moe_grouped` by name gets that, `hf_moe` does not choose it where the Triton kernels run.

Shape suffixes: N routed rows in expert order, E experts, A and B the widths that the layer maps from and to.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe.layers.expert_rows import expert_rows


def _matrix(weight: Tensor, expert: int, transposed: bool) -> Tensor:
    """The expert's matrix as `[in, out]`."""
    return weight[expert] if transposed else weight[expert].T


@torch.library.custom_op("hf_moe::grouped_linear", mutates_args=())
def _grouped_linear(
    rows_NA: Tensor, weight: Tensor, bias: Tensor | None, expert_end_E: Tensor, transposed: bool
) -> Tensor:
    width = weight.shape[2 if transposed else 1]
    out_NB = rows_NA.new_zeros(rows_NA.shape[0], width)
    for expert, rows in expert_rows(expert_end_E):
        torch.mm(rows_NA[rows], _matrix(weight, expert, transposed), out=out_NB[rows])
        if bias is not None:
            out_NB[rows] += bias[expert]
    return out_NB


@_grouped_linear.register_fake
def _(rows_NA: Tensor, weight: Tensor, bias: Tensor | None, expert_end_E: Tensor, transposed: bool) -> Tensor:
    # len() would make the number of rows a constant of the graph
    return rows_NA.new_empty(rows_NA.shape[0], weight.shape[2 if transposed else 1])


@torch.library.custom_op("hf_moe::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_NB: Tensor,
    rows_NA: Tensor,
    weight: Tensor,
    expert_end_E: Tensor,
    transposed: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of rows, weight and bias; an empty tensor for each that is not needed."""
    needs_rows, needs_weight, needs_bias = needs
    grad_rows_NA = torch.zeros_like(rows_NA) if needs_rows else rows_NA.new_empty(0)
    grad_weight = _zeros_for(weight, expert_end_E) if needs_weight else weight.new_empty(0)
    grad_bias_EB = grad_NB.new_zeros(len(weight), grad_NB.shape[1]) if needs_bias else grad_NB.new_empty(0)
    for expert, rows in expert_rows(expert_end_E):
        if needs_rows:
            torch.mm(grad_NB[rows], _matrix(weight, expert, transposed).T, out=grad_rows_NA[rows])
        if needs_weight:
            torch.mm(rows_NA[rows].T, grad_NB[rows], out=_matrix(grad_weight, expert, transposed))
        if needs_bias:
            grad_bias_EB[expert] = grad_NB[rows].sum(0)
    return [grad_rows_NA, grad_weight, grad_bias_EB]


@_grouped_linear_backward.register_fake
def _(
    grad_NB: Tensor, rows_NA: Tensor, weight: Tensor, expert_end_E: Tensor, transposed: bool, needs: list[bool]
) -> list[Tensor]:
    shapes = (rows_NA.shape, weight.shape, (len(weight), grad_NB.shape[1]))
    return [grad_NB.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)]


def _zeros_for(weight: Tensor, expert_end_E: Tensor) -> Tensor:
    """A gradient for `weight` in which only the experts without rows are set (to zero)."""
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    counts_E = expert_end_E.diff(prepend=expert_end_E.new_zeros(1))
    for expert in (counts_E == 0).nonzero().flatten().tolist():
        grad[expert].zero_()
    return grad


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_NA, weight, _, expert_end_E, ctx.transposed = inputs
    ctx.save_for_backward(rows_NA, weight, expert_end_E)


def _linear_backward(ctx: Any, grad_NB: Tensor) -> tuple[Any, ...]:
    rows_NA, weight, expert_end_E = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads = _grouped_linear_backward(grad_NB.contiguous(), rows_NA, weight, expert_end_E, ctx.transposed, needs)
    return (*_only_needed(grads, needs), None, None)


def _only_needed(grads: list[Tensor], needs: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


_grouped_linear.register_autograd(_linear_backward, setup_context=_linear_context)


def grouped_linear(
    rows_NA: Tensor, weight: Tensor, bias: Tensor | None, expert_end_E: Tensor, transposed: bool
) -> Tensor:
    """Every row times the matrix of its expert.

    Args:
        rows_NA: In expert order, in the dtype of `weight`.
        weight: `[E, B, A]`, or `[E, A, B]` if `transposed`.
        bias: `[E, B]`.
        expert_end_E: int32, where the rows of each expert end; the rows after the last are left out.

    Returns:
        `[N, B]`, zero for rows left out.
    """
    if not has_grouped_mm(tuple(weight.shape[1:]), weight.dtype, weight.device):
        return _grouped_linear(rows_NA, weight, bias, expert_end_E, transposed)
    row_N = torch.arange(rows_NA.shape[0], device=rows_NA.device, dtype=torch.int32)
    left_out_N1 = (row_N >= expert_end_E[-1]).unsqueeze(-1)
    # the kernel leaves rows after the last expert unwritten, forward and backward
    rows_NA = rows_NA.masked_fill(left_out_N1, 0.0)
    out_NB = F.grouped_mm(rows_NA, weight if transposed else weight.transpose(1, 2), offs=expert_end_E)
    if bias is not None:
        expert_N = torch.searchsorted(expert_end_E, row_N, right=True).clamp(max=len(weight) - 1)
        out_NB = out_NB + bias[expert_N]
    return out_NB.masked_fill(left_out_N1, 0.0)


def has_grouped_mm(widths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's grouped product takes such weights: SM80 or newer, rows of whole 16 bytes, not float64.

    Fast is another question: `crossover`.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    whole = all(width * dtype.itemsize % 16 == 0 for width in widths)
    return len(widths) > 0 and whole and dtype in (torch.float32, torch.bfloat16, torch.float16)
