"""Experts under low-rank adapters on the CPU: `B(Ax)` for each expert's rows, without building `W + BA`.

Shape suffixes: T tokens, N = T*K routed rows, H hidden, P pre-activation width, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..layer_call import LayerCall, LowRankPair, flatten_dense
from ..layer_op import AdapterWants, LayerOp
from .build import load_kernels
from .checks import require_adapters, require_layer
from .ops import cpu_op, rows_like


class Kept(NamedTuple):
    """Rows sorted by expert that backward needs beside the arguments; low-rank ones are empty without an adapter."""

    pre_NP: Tensor
    up_low_NR: Tensor
    down_low_NR: Tensor


def cpu_experts_lora(call: LayerCall) -> Tensor:
    """Compute `cpu_experts` with weights `W + scale * b @ a`, without these sums or their gradients.

    Differentiable in hidden states, routing weights and factors.

    Raises:
        ValueError: If shapes or dtypes do not fit, or the gradient of a base weight or bias would be needed.
        IndexError, RuntimeError: As `cpu_experts`.
    """
    return _experts(call)


def _forward(call: LayerCall, keep: bool) -> tuple[Tensor, Kept]:
    load_kernels()
    require_layer(call)
    require_adapters(call)
    out_TH, *kept = torch.ops.hf_moe_cpu.experts_lora_forward.default(*flatten_dense(call), keep)
    return out_TH, Kept(*kept)


def _kept_like(call: LayerCall, keep: bool) -> Kept:
    ranks = [None if factors is None else factors.a.shape[1] for factors in call.low_rank or LowRankPair(None, None)]
    return Kept(*(rows_like(call, width if keep else None) for width in (call.pre_width, *ranks)))


def _backward(grad_TH: Tensor, call: LayerCall, kept: Kept, wants: AdapterWants) -> list[Tensor]:
    gradients = torch.ops.hf_moe_cpu.experts_lora_backward.default(grad_TH, *kept, *flatten_dense(call), list(wants))
    return [gradient for gradient, wanted in zip(gradients, wants, strict=True) if wanted]


_experts = LayerOp(
    "hf_moe::cpu_experts_lora",
    cpu_op,
    Kept,
    forward=_forward,
    backward=_backward,
    kept_like=_kept_like,
    adapted=True,
)
