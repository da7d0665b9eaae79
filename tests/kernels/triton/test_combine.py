"""Sum over a token's slots against float64."""

import pytest
import torch

from hf_moe.kernels.triton.combine import launch_sum_k
from kernel_cases import DTYPES, assert_right

SHAPES = {"one_slot": (5, 1, 16), "odd_sizes": (7, 3, 37), "two_blocks": (2, 4, 1100), "no_tokens": (0, 2, 16)}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_matches_float64(shape, dtype, weighted, device):
    T, K, H = SHAPES[shape]
    rows_NH, weights_TK = torch.randn(T * K, H).to(dtype), torch.rand(T, K)

    def total(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = rows.view(T, K, H)
        return (rows * weights[..., None].to(rows.dtype) if weighted else rows).sum(1)

    actual = launch_sum_k(rows_NH.to(device), K, dtype, weights_TK.to(device) if weighted else None).cpu()
    exact = total(rows_NH.double(), weights_TK.double())
    size = total(rows_NH.double().abs(), weights_TK.double())
    assert actual.dtype == dtype
    assert_right(actual, total(rows_NH, weights_TK), exact, size, (K + 1) * torch.finfo(torch.float32).eps)


def test_one_rounding_from_16_bit_rows_to_float32(device):
    rows_NH = torch.randn(6, 20, device=device).bfloat16()
    actual = launch_sum_k(rows_NH, 2, torch.float32)
    assert torch.equal(actual, rows_NH.float().view(3, 2, 20).sum(1))
