"""Activations and their gradients in the kernels' closed form, against plain torch in float64."""

import math

import pytest
import torch
import triton
import triton.language as tl

from hf_moe.kernels.triton import activation

GATES = {
    "silu": ("silu", 1.0, math.inf, 0.0),
    "gpt_oss": ("silu", 1.702, 7.0, 1.0),
    "quick_gelu": ("silu", 1.702, math.inf, 0.0),
    "clamped_gelu": ("gelu", 1.0, 2.0, 0.0),
    "gelu": ("gelu", 1.0, math.inf, 0.0),
    "gelu_tanh": ("gelu_tanh", 1.0, math.inf, 0.0),
    "relu": ("relu", 1.0, math.inf, 0.5),
    "relu2": ("relu2", 1.0, 3.0, 0.0),
}


@triton.jit
def glu_kernel(
    gate, up, d_act, out, N: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, N)
    g = tl.load(gate + lanes)
    u = tl.load(up + lanes)
    act, d_gate, d_up = activation.glu_backward(g, u, tl.load(d_act + lanes), KIND, ALPHA, LIMIT, OFFSET)
    tl.store(out + lanes, activation.glu(g, u, KIND, ALPHA, LIMIT, OFFSET))
    tl.store(out + N + lanes, act)
    tl.store(out + 2 * N + lanes, d_gate)
    tl.store(out + 3 * N + lanes, d_up)


@triton.jit
def activate_kernel(x, d_act, out, N: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr):
    lanes = tl.arange(0, N)
    x = tl.load(x + lanes)
    act, d_x = activation.activate_backward(x, tl.load(d_act + lanes), KIND, ALPHA)
    tl.store(out + lanes, activation.activate(x, KIND, ALPHA))
    tl.store(out + N + lanes, act)
    tl.store(out + 2 * N + lanes, d_x)


def values(device) -> list[torch.Tensor]:
    """gate, up, gradient [256]: normal values, with bounds of the clamps, zeros, large numbers and NaN among them."""
    gate, up, d_act = (4 * torch.randn(3, 256)).unbind()
    special = torch.tensor([7.0, -7.0, 2.0, -2.0, 3.0, -3.0, 0.0, -0.0, 60.0, -60.0, math.nan])
    gate[: len(special)] = special
    up[20 : 20 + len(special)] = special
    return [tensor.to(device) for tensor in (gate, up, d_act)]


def assert_close(actual: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor):
    """Within 16 roundings of float32, each relative to `scale`: |f'| < 1.2 for the smooth ones, more for relu2."""
    bound = 16 * torch.finfo(torch.float32).eps * scale + 1e-30
    assert torch.equal(actual.isnan(), exact.isnan())
    excess = ((actual.double() - exact).abs() - bound).nan_to_num(-1.0)
    assert excess.max() <= 0


def exact_gradients(function, inputs: list[torch.Tensor], d_act: torch.Tensor) -> tuple[torch.Tensor, list]:
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return out.detach(), list(torch.autograd.grad(out, leaves, d_act.double()))


@pytest.mark.parametrize("name", GATES)
def test_glu_and_gradients_match_float64(name, device):
    kind, *parameters = GATES[name]
    gate, up, d_act = values(device)
    out = torch.empty(4, 256, device=device)
    glu_kernel[(1,)](gate, up, d_act, out, 256, activation.activation_kind(kind), *parameters)
    act, gradients = exact_gradients(
        lambda gate, up: activation.glu_reference(gate, up, kind, *parameters), [gate, up], d_act
    )
    size = 2 * (1 + gate.double().abs()).square() * (1 + up.double().abs())
    assert_close(out[0], act, size)
    assert torch.equal(out[0].nan_to_num(), out[1].nan_to_num())
    # a clamp, even without a limit, stops torch's gradient at NaN: nothing relies on it
    finite = ~(gate + up).isnan()
    for actual, exact in zip(out[2:], gradients, strict=True):
        assert_close(actual[finite], exact[finite], (size * (1 + d_act.abs()))[finite])


@pytest.mark.parametrize("kind", activation.ACTIVATIONS)
def test_ungated_activation_and_gradient_match_float64(kind, device):
    x, _, d_act = values(device)
    out = torch.empty(3, 256, device=device)
    activate_kernel[(1,)](x, d_act, out, 256, activation.ACTIVATIONS[kind], 1.25)
    act, gradients = exact_gradients(lambda x: activation.activate_reference(x, kind, 1.25), [x], d_act)
    size = 2 * (1 + x.double().abs()).square()
    assert_close(out[0], act, size)
    assert torch.equal(out[0].nan_to_num(), out[1].nan_to_num())
    finite = ~x.isnan()
    assert_close(out[2][finite], gradients[0][finite], (size * (1 + d_act.abs()))[finite])


def test_unknown_activation_raises():
    with pytest.raises(ValueError, match=r"activation must be one of silu, .*, got 'mish'"):
        activation.activation_kind("mish")
