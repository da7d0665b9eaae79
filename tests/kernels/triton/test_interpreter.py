"""The interpreter computes what a GPU would, with the repairs and only with them."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

SIDE = 32


@triton.jit
def product(left, right, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(left + at), tl.load(right + at)))


@triton.jit
def arithmetic(left, right, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(left + at)
    y = tl.load(right + at)
    tl.store(out + at, tl.where(x < y, x * y, x - y))


@triton.jit
def cast(values, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(values + at).to(out.dtype.element_ty))


@triton.jit
def count_steps(out, size, STEP: tl.constexpr):
    for at in range(0, size, STEP):
        tl.store(out + at, tl.load(out + at) + 1)


def run_product() -> tuple[torch.Tensor, torch.Tensor]:
    left, right = torch.randn(2, SIDE, SIDE).bfloat16()
    out = torch.empty(SIDE, SIDE)
    product[(1,)](left, right, out, SIZE=SIDE)
    return out, left.float() @ right.float()


def run_arithmetic() -> tuple[torch.Tensor, torch.Tensor]:
    left, right = torch.randn(2, SIDE).bfloat16()
    out = torch.empty(SIDE, dtype=torch.bfloat16)
    arithmetic[(1,)](left, right, out, SIZE=SIDE)
    return out, torch.where(left < right, left * right, left - right)


def run_cast() -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randn(SIDE)
    values[:4] = torch.tensor([float("nan"), float("inf"), 3.4e38, 0.0])
    out = torch.empty(SIDE, dtype=torch.bfloat16)
    cast[(1,)](values, out, SIZE=SIDE)
    return out, values.bfloat16()


def run_cast_of_integers() -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.arange(250, 250 + SIDE, dtype=torch.int32)
    out = torch.empty(SIDE, dtype=torch.bfloat16)
    cast[(1,)](values, out, SIZE=SIDE)
    return out, values.bfloat16()


CASES = {
    "create_dot": run_product,
    "binary_op": run_arithmetic,
    "cast_impl": run_cast,
    "cast_impl of integers": run_cast_of_integers,
}


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_right(interpreter, case):
    actual, exact = CASES[case]()
    tolerance = {} if case == "create_dot" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(actual, exact, equal_nan=True, **tolerance)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_wrong_without_the_repair(interpreter, case, monkeypatch):
    """A failure here is good news: this Triton needs the repair no more."""
    method = case.split()[0]
    monkeypatch.setattr(InterpreterBuilder, method, interpreter[method])
    actual, exact = CASES[case]()
    assert not torch.allclose(actual.float(), exact.float(), rtol=1e-3, equal_nan=True)


def test_a_loop_may_end_at_a_run_time_value(interpreter):
    out = torch.zeros(SIDE, dtype=torch.int32)
    count_steps[(1,)](out, SIDE, STEP=8)
    assert out.view(-1, 8)[:, 0].tolist() == [1] * (SIDE // 8)
    assert out.sum() == SIDE // 8


def test_kernels_are_interpreted_where_there_is_no_gpu(device):
    compiled = isinstance(product, triton.JITFunction)
    assert compiled == (device.type == "cuda")
