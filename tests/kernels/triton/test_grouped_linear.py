"""One linear map per expert against float64: gathered, scattered, weighted, with bias and low-rank addend."""

from dataclasses import dataclass

import pytest
import torch

from hf_moe.kernels.triton import grouped_linear
from hf_moe.kernels.triton.grouped_linear import LowRankTerm, launch_grouped_linear
from hf_moe.kernels.triton.routing import RowOrder, rows_in_order, sort_rows
from hf_moe.kernels.triton.tiles import Tile
from kernel_cases import DTYPES, amid_nan, assert_right
from numerics import ROUTINGS

NUM_OUT = 20  # no multiple of a tile


@dataclass(frozen=True)
class Options:
    gather: bool = False
    scatter: bool = False
    transposed: bool = False
    bias: bool = False
    row_weights: bool = False
    rank: int = 0
    scale: float = 1.0


OPTIONS = {
    "plain": Options(),
    "up_projection": Options(gather=True, bias=True),
    "down_projection": Options(scatter=True, row_weights=True, transposed=True, bias=True),
    "gradient_of_rows": Options(scatter=True, transposed=True),
    "low_rank_factor": Options(gather=True, scale=0.5),
    "adapted_down": Options(scatter=True, row_weights=True, rank=4, bias=True),
    "adapted_transposed": Options(transposed=True, rank=24, scale=2.0),
    "two_blocks_of_rank": Options(gather=True, scatter=True, rank=80),
}


class Problem:
    """Operands in `dtype` with values exact in 16 bits, and the map in plain torch."""

    def __init__(self, routing: str, options: Options, dtype: torch.dtype):
        case = ROUTINGS[routing]()
        generator = torch.Generator().manual_seed(2)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).bfloat16().to(dtype)

        self.options, self.index_TK, self.E = options, case.index, len(case.gate_up)
        (self.T, A), self.K = case.hidden.shape, case.index.shape[1]
        self.N = case.index.numel()
        self.order = sort_rows(self.index_TK, self.E, self.E + 1)
        self.rows = case.hidden.to(dtype) if options.gather else normal(self.N, A)
        self.weight = normal(*((self.E, A, NUM_OUT) if options.transposed else (self.E, NUM_OUT, A)))
        self.bias = normal(self.E, NUM_OUT) if options.bias else None
        self.row_weights_N = torch.rand(self.N, generator=generator) if options.row_weights else None
        self.low = normal(self.N, options.rank) if options.rank else None
        self.low_weight = normal(self.E, NUM_OUT, options.rank) if options.rank else None

    def launch(self, device) -> torch.Tensor:
        given = (self.bias, self.row_weights_N, self.low, self.low_weight)
        bias, row_weights_N, low, low_weight = (None if x is None else x.to(device) for x in given)
        order = RowOrder(*(tensor.to(device) for tensor in self.order))
        o = self.options
        return launch_grouped_linear(
            self.rows.to(device), self.weight.to(device), order, top_k=self.K, transposed=o.transposed, bias=bias,
            gather=o.gather, scatter=o.scatter, row_weights_N=row_weights_N, scale=o.scale,
            term=None if low is None else LowRankTerm(low, low_weight),
        ).cpu()  # fmt: skip

    def plain(self, dtype: torch.dtype, absolute: bool = False) -> torch.Tensor:
        """The map row by row in `dtype`; of absolute values for the size of rounding errors."""

        def cast(x):
            return None if x is None else (x.to(dtype).abs() if absolute else x.to(dtype))

        rows, weight, bias, low, low_weight = map(cast, (self.rows, self.weight, self.bias, self.low, self.low_weight))
        out = torch.zeros(self.N, NUM_OUT, dtype=dtype)
        for r, slot in enumerate(self.order.order_N.tolist()):
            e = self.index_TK.reshape(-1)[slot]
            if e == self.E:
                continue
            row = rows[slot // self.K if self.options.gather else r]
            y = self.options.scale * (row @ (weight[e] if self.options.transposed else weight[e].T))
            y = y if low is None else y + low[r] @ low_weight[e].T
            y = y if bias is None else y + bias[e]
            y = y if self.row_weights_N is None else y * self.row_weights_N[slot].to(dtype)
            out[slot if self.options.scatter else r] = y
        return out

    def check(self, actual: torch.Tensor):
        exact, size = self.plain(torch.float64), self.plain(torch.float64, absolute=True)
        terms = self.rows.shape[1] + self.options.rank + 4
        assert_right(actual, self.plain(actual.dtype), exact, size, terms * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_match_float64(options, dtype, device):
    problem = Problem("odd_sizes", OPTIONS[options], dtype)
    problem.check(problem.launch(device))


@pytest.mark.parametrize("options", ["up_projection", "adapted_down"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_match_float64(routing, options, device):
    problem = Problem(routing, OPTIONS[options], torch.float32)
    actual = problem.launch(device)
    problem.check(actual)
    assert torch.equal(actual.nan_to_num(), problem.launch(device).nan_to_num())


@pytest.mark.parametrize("tile", [(32, 16, 16), (16, 16, 64)])
@pytest.mark.parametrize("options", ["adapted_down", "low_rank_factor"])
def test_tiles_match_float64(options, tile, monkeypatch, device):
    monkeypatch.setattr(grouped_linear, "tile_for", lambda *_, **__: Tile(*tile, num_warps=4, num_stages=1))
    problem = Problem("balanced", OPTIONS[options], torch.float32)
    problem.check(problem.launch(device))


@pytest.mark.parametrize("routing", ["odd_sizes", "sentinels", "one_expert_takes_all"])
def test_half_tiles_and_parts_of_columns_change_no_bit(routing, monkeypatch, device):
    """Experts with at most half a tile of rows left, with more, with none; every option at once."""
    monkeypatch.setattr(grouped_linear, "tile_for", lambda *_, **__: Tile(32, 16, 16, num_warps=4, num_stages=1))
    problem = Problem(routing, Options(gather=True, scatter=True, bias=True, row_weights=True, rank=4), torch.float32)
    wanted = problem.launch(device)
    monkeypatch.setattr(grouped_linear, "FEWEST_ROWS_OF_HALF", 16)
    monkeypatch.setattr(grouped_linear, "EPILOGUE_COLUMNS", 8)
    assert torch.equal(problem.launch(device), wanted)


def test_groups_of_row_tiles_cover_every_tile(monkeypatch, device):
    """More row tiles than a group holds, the last group not full, several column tiles."""
    monkeypatch.setattr(grouped_linear, "tile_for", lambda *_, **__: Tile(16, 16, 16, 4, 1))
    index = torch.randint(0, 11, (40, 2), device=device)
    rows, weight = torch.randn(80, 16, device=device), torch.randn(11, 40, 16, device=device)
    order = sort_rows(index, 11, 11)
    actual = launch_grouped_linear(rows, weight, order, top_k=2, transposed=False)
    experts = index.reshape(-1)[order.order_N.long()]
    torch.testing.assert_close(actual, torch.einsum("na,nba->nb", rows, weight[experts]))


def test_operands_may_have_any_strides(device):
    problem = Problem("balanced", OPTIONS["adapted_down"], torch.float32)
    wanted = problem.launch(device)
    problem.rows = problem.rows.T.contiguous().T
    problem.weight = problem.weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    problem.low_weight = torch.stack([problem.low_weight] * 2, -1)[..., 0]
    assert torch.equal(problem.launch(device), wanted)


@pytest.mark.parametrize("options", ["adapted_down", "adapted_transposed", "up_projection"])
def test_nothing_is_read_beyond_the_operands(options, device):
    problem = Problem("odd_sizes", OPTIONS[options], torch.float32)
    wanted = problem.launch(device)
    problem.rows, problem.weight = amid_nan(problem.rows), amid_nan(problem.weight)
    if problem.low_weight is not None:
        problem.low, problem.low_weight = amid_nan(problem.low), amid_nan(problem.low_weight)
    assert torch.equal(problem.launch(device), wanted)


def test_rows_of_no_expert_are_zero_and_unread(device):
    rows = torch.randn(10, 16, device=device)
    rows[7:] = float("nan")
    order = rows_in_order(torch.arange(10, device=device).int(), torch.tensor([3, 7], device=device).int())
    out = launch_grouped_linear(rows, torch.randn(2, 8, 16, device=device), order, top_k=1, transposed=False)
    assert out[:7].isfinite().all()
    assert torch.equal(out[7:], torch.zeros(3, 8, device=device))
