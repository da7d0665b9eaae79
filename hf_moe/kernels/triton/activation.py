"""Activations of an expert in closed form, forward and backward, for kernels; and the same in plain torch for tests.

    glu(gate, up) = (clamp(up, -limit, limit) + offset) * f(min(gate, limit))

with f silu (x * sigmoid(alpha * x)), gelu, gelu_tanh, relu or relu2. alpha 1, limit inf and offset 0 give the plain
gated units; gpt-oss is silu with alpha 1.702, limit 7, offset 1. An ungated expert computes f alone. Values are
float32, and built from tl.exp and tl.erf only, which every target and the interpreter have.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..layer_call import ExpertForm

ACTIVATIONS: dict[str, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
RELU = tl.constexpr(3)
# above it a limit is no limit: float32 has no larger finite number
NO_LIMIT = tl.constexpr(3.4028234e38)
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
# gelu_tanh(x) = x * sigmoid(x * (TANH_1 + TANH_3 * x^2)), as tanh(u) = 2 * sigmoid(2u) - 1
TANH_1 = tl.constexpr(2 * math.sqrt(2 / math.pi))
TANH_3 = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)


def activation_kind(name: str) -> int:
    """The kernels' number of an activation.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}.")
    return ACTIVATIONS[name]


def form_constants(form: ExpertForm) -> dict[str, Any]:
    """The constants of kernels that compute an activation; errors as in `activation_kind`."""
    return {
        "KIND": activation_kind(form.activation),
        "ALPHA": form.alpha,
        "LIMIT": form.limit,
        "OFFSET": form.offset,
        "GATED": form.gated,
        "INTERLEAVED": form.interleaved,
    }


@triton.jit
def activate(x, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """f(x) of an ungated expert."""
    if KIND == SILU:
        return x * tl.sigmoid(ALPHA * x)
    elif KIND == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif KIND == GELU_TANH:
        return x * tl.sigmoid(x * (TANH_1 + TANH_3 * x * x))
    elif KIND == RELU:
        return tl.where(x < 0.0, 0.0, x)  # NaN stays NaN, unlike with maximum
    else:
        positive = tl.where(x < 0.0, 0.0, x)
        return positive * positive


@triton.jit
def _slope(x, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """f'(x)."""
    if KIND == SILU:
        s = tl.sigmoid(ALPHA * x)
        return s + ALPHA * x * s * (1.0 - s)
    elif KIND == GELU:
        return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    elif KIND == GELU_TANH:
        s = tl.sigmoid(x * (TANH_1 + TANH_3 * x * x))
        return s + x * s * (1.0 - s) * (TANH_1 + 3.0 * TANH_3 * x * x)
    elif KIND == RELU:
        return tl.where(x > 0.0, 1.0, 0.0)
    else:
        return tl.where(x < 0.0, 0.0, 2.0 * x)


@triton.jit
def activate_backward(x, d_act, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """(f(x), gradient of x) from the gradient of f(x)."""
    return activate(x, KIND, ALPHA), d_act * _slope(x, KIND, ALPHA)


@triton.jit
def glu(gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """The gated activation."""
    if LIMIT <= NO_LIMIT:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return (up + OFFSET) * activate(gate, KIND, ALPHA)


@triton.jit
def glu_backward(gate, up, d_act, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """(act, d_gate, d_up) from the gradient of act; a clamp passes gradient inside and at its bounds, as torch's."""
    gate_c = gate
    up_c = up
    if LIMIT <= NO_LIMIT:
        gate_c = tl.where(gate > LIMIT, LIMIT, gate)
        up_c = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    activated, d_gate = activate_backward(gate_c, d_act * (up_c + OFFSET), KIND, ALPHA)
    d_up = d_act * activated
    if LIMIT <= NO_LIMIT:
        d_gate = tl.where(gate <= LIMIT, d_gate, 0.0)
        d_up = tl.where((up >= -LIMIT) & (up <= LIMIT), d_up, 0.0)
    return (up_c + OFFSET) * activated, d_gate, d_up


def activate_reference(x: Tensor, activation: str, alpha: float = 1.0) -> Tensor:
    """f in plain torch, in the dtype of `x`."""
    if activation == "silu":
        return x * torch.sigmoid(alpha * x)
    if activation == "relu2":
        return F.relu(x).square()
    plain = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}
    return plain[activation](x)


def glu_reference(
    gate: Tensor, up: Tensor, activation: str, alpha: float = 1.0, limit: float = math.inf, offset: float = 0.0
) -> Tensor:
    """The gated activation in plain torch, in the dtype of its arguments."""
    return (up.clamp(-limit, limit) + offset) * activate_reference(gate.clamp(max=limit), activation, alpha)
