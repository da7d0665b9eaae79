"""Gradients of expert weights and biases against float64, one expert after the other.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, A and B the widths of the two factors.
"""

import pytest
import torch
from torch import Tensor

from hf_moe.kernels.triton.routing import sort_rows
from hf_moe.kernels.triton.weight_gradient import launch_bias_gradient, launch_weight_gradient
from kernel_cases import DTYPES, assert_right
from numerics import ROUTINGS

NUM_LEFT = 20  # width of the left factor: no multiple of a tile
NAN = float("nan")


def random_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width)).to(device, dtype)


def expert_sums(index_TK: Tensor, num_experts: int, left_NA: Tensor, right_NB: Tensor) -> Tensor:
    """Plain torch in the dtype of the factors, which are by slot."""
    expert_N = index_TK.reshape(-1)
    sums = [left_NA[expert_N == expert].T @ right_NB[expert_N == expert] for expert in range(num_experts)]
    return torch.stack(sums)


def by_slot(rows: Tensor, top_k: int, gather: bool) -> Tensor:
    return rows.repeat_interleave(top_k, dim=0) if gather else rows


def in_expert_order(rows_NA: Tensor, order) -> Tensor:
    """Rows by slot in the kernel's order; rows past the last expert's end hold NaN, which nothing may read."""
    rows_NA = rows_NA[order.order_N.long()]
    rows_NA[int(order.expert_end_E[-1]) :] = NAN
    return rows_NA


class Problem:
    """Two factors by token (gathered) or by slot, for a named routing."""

    def __init__(self, routing, dtype, device, width=24, left_gather=False, right_gather=True):
        case = ROUTINGS[routing]()
        self.num_experts, (tokens, self.top_k) = len(case.down), case.index.shape
        self.index_TK = case.index.to(device)
        self.order = sort_rows(self.index_TK, self.num_experts, self.num_experts + 1)
        self.gather = (left_gather, right_gather)
        sizes = [tokens if gather else tokens * self.top_k for gather in self.gather]
        self.left = random_rows(sizes[0], NUM_LEFT, dtype, device)
        self.right = random_rows(sizes[1], width, dtype, device)
        if routing == "nan_token":
            token = 3 if right_gather else 3 * self.top_k
            self.right[token] = NAN

    def launch(self, out_dtype=None, **options) -> Tensor:
        pairs = zip((self.left, self.right), self.gather, strict=True)
        left, right = (rows if gather else in_expert_order(rows, self.order) for rows, gather in pairs)
        return launch_weight_gradient(
            left,
            right,
            self.order,
            top_k=self.top_k,
            gather_left=self.gather[0],
            gather_right=self.gather[1],
            out_dtype=out_dtype or left.dtype,
            **options,
        )

    def plain(self, dtype: torch.dtype, absolute: bool = False) -> Tensor:
        pairs = zip((self.left, self.right), self.gather, strict=True)
        left, right = (by_slot(rows.to(dtype), self.top_k, gather) for rows, gather in pairs)
        if absolute:
            left, right = left.abs(), right.abs()
        return expert_sums(self.index_TK, self.num_experts, left, right)

    def check(self, actual: Tensor, scale: float = 1.0) -> None:
        exact = scale * self.plain(torch.float64)
        factor = (self.index_TK.numel() + 3) * torch.finfo(torch.float32).eps
        baseline = (scale * self.plain(self.left.dtype)).to(actual.dtype)
        assert_right(actual, baseline, exact, scale * self.plain(torch.float64, absolute=True), factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_matches_float64(routing, dtype, device):
    problem = Problem(routing, dtype, device)
    problem.check(problem.launch())


@pytest.mark.parametrize("gather", [(False, False), (True, False), (True, True)], ids=str)
def test_either_factor_is_gathered(gather, device):
    problem = Problem("sentinels", torch.bfloat16, device, left_gather=gather[0], right_gather=gather[1])
    problem.check(problem.launch())


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 40])
def test_narrow_factor(rank, device):
    problem = Problem("odd_sizes", torch.bfloat16, device, width=rank)
    problem.check(problem.launch(scale=0.5), scale=0.5)


def test_wide_result_of_16_bit_factors(device):
    problem = Problem("balanced", torch.bfloat16, device)
    problem.check(problem.launch(out_dtype=torch.float32))


def test_more_rows_than_a_step(device):
    """Several steps of one expert, the last one ragged."""
    problem = Problem("balanced", torch.float32, device)
    problem.index_TK = torch.full((83, 1), 1, device=device)
    problem.top_k = 1
    problem.order = sort_rows(problem.index_TK, problem.num_experts, problem.num_experts)
    problem.left, problem.right = (random_rows(83, width, torch.float32, device) for width in (NUM_LEFT, 70))
    problem.check(problem.launch())


def test_sizes_that_blocks_divide(device):
    """No column of a tile is masked."""
    problem = Problem("odd_sizes", torch.bfloat16, device, width=64)
    problem.left = random_rows(len(problem.left), 32, torch.bfloat16, device)
    problem.check(problem.launch())


def test_expanded_and_transposed_factors(device):
    problem = Problem("balanced", torch.float32, device)
    problem.right = torch.ones((), device=device).expand(problem.right.shape)
    problem.left = problem.left.T.contiguous().T
    problem.check(problem.launch())


def test_factors_of_two_dtypes_are_refused(device):
    problem = Problem("balanced", torch.float32, device)
    problem.right = problem.right.bfloat16()
    with pytest.raises(ValueError, match=r"one dtype, got torch\.float32 and torch\.bfloat16"):
        problem.launch()


def test_same_bits_from_run_to_run(device):
    problem = Problem("repeated_indices", torch.bfloat16, device)
    assert torch.equal(problem.launch(), problem.launch())


def bias_sums(rows_NB: Tensor, weights_N: Tensor | None, index_TK: Tensor, num_experts: int) -> Tensor:
    rows_NB = rows_NB if weights_N is None else rows_NB * weights_N[:, None]
    return torch.stack([rows_NB[index_TK.reshape(-1) == expert].sum(0) for expert in range(num_experts)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_bias_gradient_matches_float64(routing, weighted, dtype, device):
    problem = Problem(routing, dtype, device)
    index_TK, num_experts = problem.index_TK, problem.num_experts
    weights_N = ROUTINGS[routing]().weights.to(device, dtype).reshape(-1) if weighted else None
    options = {"top_k": problem.top_k, "gather": True, "out_dtype": dtype, "row_weights_N": weights_N}
    actual = launch_bias_gradient(problem.right, problem.order, **options)

    def plain(to: torch.dtype, absolute: bool = False) -> Tensor:
        rows_NB = by_slot(problem.right.to(to), problem.top_k, gather=True)
        scale_N = None if weights_N is None else weights_N.to(to)
        return bias_sums(rows_NB.abs() if absolute else rows_NB, scale_N, index_TK, num_experts)

    factor = (index_TK.numel() + 3) * torch.finfo(torch.float32).eps
    assert_right(actual, plain(dtype), plain(torch.float64), plain(torch.float64, absolute=True), factor)


def test_bias_gradient_of_rows_in_expert_order(device):
    problem = Problem("sentinels", torch.float32, device)
    rows_NA = in_expert_order(problem.left, problem.order)
    options = {"top_k": problem.top_k, "gather": False, "out_dtype": torch.float32}
    actual = launch_bias_gradient(rows_NA, problem.order, **options)
    exact = bias_sums(problem.left.double(), None, problem.index_TK, problem.num_experts)
    size = bias_sums(problem.left.double().abs(), None, problem.index_TK, problem.num_experts)
    assert_right(actual, actual, exact, size, 30 * torch.finfo(torch.float32).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_real_size(dtype, device):
    """A Qwen3-30B-A3B layer's gate gradient at 4096 tokens, three experts checked."""
    generator = torch.Generator(device).manual_seed(0)
    index_TK = torch.rand(4096, 128, generator=generator, device=device).argsort(-1)[:, :8]
    order = sort_rows(index_TK, 128, 128)
    left = torch.randn(4096 * 8, 1536, generator=generator, device=device).to(dtype)
    right = torch.randn(4096, 2048, generator=generator, device=device).to(dtype)
    options = {"top_k": 8, "gather_left": False, "gather_right": True, "out_dtype": dtype}
    actual = launch_weight_gradient(left, right, order, 128, **options)
    assert torch.equal(actual, launch_weight_gradient(left, right, order, 128, **options))
    end = [0, *order.expert_end_E.tolist()]
    for expert in (0, 77, 127):
        rows = slice(end[expert], end[expert + 1])
        pair = left[rows], right[order.order_N[rows].long() // 8]
        exact, size = (f(pair[0].double()).T @ f(pair[1].double()) for f in (torch.clone, torch.abs))
        factor = pair[0].shape[0] * torch.finfo(torch.float32).eps
        assert_right(actual[expert], pair[0].T @ pair[1], exact, size, factor)
