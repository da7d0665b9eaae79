"""Differentiable operators on the CPU: the experts of one layer, and one linear map per expert.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, P pre-activation width, A and B
the inner and outer width of a grouped linear.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer_call import LayerCall, flatten_dense
from ..layer_op import LayerOp, Wants
from ..linear_op import define_linear_op
from .build import load_kernels
from .checks import require_layer, require_linear


def cpu_op(name: str, function: Callable, schema: str) -> torch.library.CustomOpDef:
    return torch.library.custom_op(name, function, mutates_args=(), schema=schema, device_types="cpu")


class Kept(NamedTuple):
    """The pre-activations of the rows sorted by expert, which backward needs beside the arguments."""

    pre_NP: Tensor


def cpu_experts(call: LayerCall) -> Tensor:
    """Compute the weighted sum of every token's experts [T, H], differentiable in all floating tensors.

    Takes float32, bfloat16, float16 and float64.

    Raises:
        IndexError: An id is not in [0, num_ids).
        ValueError: Shapes, dtypes or the activation do not fit.
        RuntimeError: The kernels cannot be built; see `unavailable_reason`.
    """
    return _experts(call)


def _forward(call: LayerCall, keep: bool) -> tuple[Tensor, Kept]:
    load_kernels()
    require_layer(call)
    out_TH, pre_NP = torch.ops.hf_moe_cpu.experts_forward.default(*flatten_dense(call), keep)
    return out_TH, Kept(pre_NP)


def _kept_like(call: LayerCall, keep: bool) -> Kept:
    return Kept(rows_like(call, call.pre_width if keep else None))


def rows_like(call: LayerCall, width: int | None) -> Tensor:
    """Memory for rows [N, width] in the dtype of the hidden states; empty without a width."""
    shape = (0,) if width is None else (call.index_TK.shape[0] * call.top_k, width)
    return call.hidden_TH.new_empty(shape)


def _backward(grad_TH: Tensor, call: LayerCall, kept: Kept, wants: Wants) -> list[Tensor]:
    gradients = torch.ops.hf_moe_cpu.experts_backward.default(grad_TH, *kept, *flatten_dense(call), list(wants))
    return [gradient for gradient, wanted in zip(gradients, wants, strict=True) if wanted]


_experts = LayerOp("hf_moe::cpu_experts", cpu_op, Kept, forward=_forward, backward=_backward, kept_like=_kept_like)


def _linear(rows_NA, weight, bias, expert_end_E, transposed):
    load_kernels()
    require_linear(rows_NA, weight, bias, expert_end_E, transposed)
    return torch.ops.hf_moe_cpu.grouped_linear.default(
        rows_NA.contiguous(), weight, None if bias is None else bias.contiguous(), _ids(expert_end_E), transposed
    )


def _linear_backward(grad_NB, rows_NA, weight, expert_end_E, transposed, wants):
    gradients = torch.ops.hf_moe_cpu.grouped_linear_backward.default(
        grad_NB.contiguous(), rows_NA.contiguous(), weight, _ids(expert_end_E), transposed, wants
    )
    return [gradient for gradient, wanted in zip(gradients, wants, strict=True) if wanted]


def _ids(index: Tensor) -> Tensor:
    return index.to(torch.int64).contiguous()


_grouped_linear = define_linear_op("hf_moe::cpu_grouped_linear", cpu_op, _linear, _linear_backward)


def cpu_grouped_linear(
    rows_NA: Tensor, weight: Tensor, bias: Tensor | None, expert_end_E: Tensor, transposed: bool
) -> Tensor:
    """Compute one linear map per expert, [N, B], over rows sorted by expert; differentiable in rows, weight and bias.

    Args:
        rows_NA: float32, bfloat16, float16 or float64; weight and bias have the same dtype.
        weight: [E, B, A], transposed [E, A, B].
        bias: [E, B].
        expert_end_E: int32 or int64, where each expert's rows end; the rows past the last end give zeros.

    Raises:
        IndexError: The ends fall, or there are more than N.
        ValueError: Shapes or dtypes do not fit.
        RuntimeError: The kernels cannot be built; see `unavailable_reason`.
    """
    return _grouped_linear(rows_NA, weight, bias, expert_end_E, transposed)
