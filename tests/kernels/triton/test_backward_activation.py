"""The backward through down projection and activation against float64.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows by slot, E experts, H hidden, I expert width, P
pre-activation width, R LoRA rank.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hf_moe.kernels.triton import backward_activation, grouped_linear
from hf_moe.kernels.triton.backward_activation import launch_backward_activation
from hf_moe.kernels.triton.grouped_linear import LowRankTerm
from hf_moe.kernels.triton.routing import RowOrder, TileMap, sort_rows
from hf_moe.kernels.triton.tiles import Tile
from kernel_cases import DTYPES, FORMS, Layer, absolute_layer, activate, assert_right, layer
from numerics import ROUTINGS

NAN = float("nan")
NAMES = ("grad_pre", "weighted_act", "grad_weights")


@dataclass
class Problem:
    """What the forward pass saved and the gradient of its output; rows by slot."""

    layer: Layer
    pre_NP: Tensor
    grad_out_TH: Tensor
    low_NR: Tensor | None = None
    low_weight: Tensor | None = None  # [E, R, I]

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Problem":
        layer = self.layer.to(dtype, device)
        rest = (self.pre_NP, self.grad_out_TH, self.low_NR, self.low_weight)
        return Problem(layer, *(None if x is None else x.to(device, dtype) for x in rest))

    def absolute(self) -> "Problem":
        rest = (self.pre_NP, self.grad_out_TH, self.low_NR, self.low_weight)
        return Problem(absolute_layer(self.layer), *(None if x is None else x.double().abs() for x in rest))

    @property
    def width(self) -> int:
        return self.layer.down_weight.shape[1 if self.layer.form.transposed else 2]

    def factor(self) -> float:
        chain = 2 * self.layer.hidden.shape[1] + self.width + 40
        return chain * torch.finfo(torch.float32).eps


def problem(routing: str = "balanced", form: str = "silu", rank: int = 0, **options) -> Problem:
    case = layer(routing, form, **options)
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().float()

    num_rows, (tokens, hidden) = case.index.numel(), case.hidden.shape
    made = Problem(case, torch.empty(0), normal(tokens, hidden))
    made.pre_NP = normal(num_rows, made.width * (2 if case.form.gated else 1))
    if rank:
        made.low_NR, made.low_weight = normal(num_rows, rank), normal(case.num_experts, rank, made.width) / 4
    if routing == "nan_token":
        made.grad_out_TH[3] = NAN
    return made


def plain(case: Problem, absolute: bool = False) -> dict[str, Tensor]:
    """In the dtype of the problem, one expert after the other, rows by slot."""
    layer, index_N, top_k = case.layer, case.layer.index.reshape(-1), case.layer.index.shape[1]
    grad_pre_NP = torch.zeros_like(case.pre_NP)
    weighted_act_NI = case.pre_NP.new_zeros(len(index_N), case.width)
    grad_weights_N = case.pre_NP.new_zeros(len(index_N))
    for expert in range(layer.num_experts):
        slots = torch.where(index_N == expert)[0]
        g, weight = case.grad_out_TH[slots // top_k], layer.down_weight[expert].detach()
        grad_act = g @ (weight.T if layer.form.transposed else weight)
        if case.low_NR is not None:
            grad_act = grad_act + case.low_NR[slots] @ case.low_weight[expert]
        pre = case.pre_NP[slots].requires_grad_()
        act = activate(pre, layer.form, absolute)
        weights = layer.weights.detach().reshape(-1)[slots, None]
        grad_pre_NP[slots] = torch.autograd.grad(act, pre, weights * grad_act)[0]
        weighted_act_NI[slots] = weights * act.detach()
        grad_weights_N[slots] = (grad_act * act.detach()).sum(-1)
        if layer.down_bias is not None:
            grad_weights_N[slots] += (g * layer.down_bias[expert].detach()).sum(-1)
    return dict(zip(NAMES, (grad_pre_NP, weighted_act_NI, grad_weights_N), strict=True))


def launch(case: Problem, **options) -> dict[str, Tensor]:
    """The kernels' results by slot. Rows that no expert computes are given as NaN, nothing may read them."""
    layer = case.layer
    order = sort_rows(layer.index, layer.num_experts, layer.num_experts + 1)
    order_N, end = order.order_N.long(), int(order.expert_end_E[-1])

    def sorted_rows(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows[order_N].index_fill(0, torch.arange(end, len(rows)).to(rows.device), NAN)

    rows_NR = sorted_rows(case.low_NR)
    results = launch_backward_activation(
        case.grad_out_TH,
        layer.down_weight,
        sorted_rows(case.pre_NP),
        order,
        layer.weights,
        layer.form,
        down_bias=layer.down_bias,
        term=None if rows_NR is None else LowRankTerm(rows_NR, case.low_weight.transpose(1, 2)),
        **options,
    )
    back = torch.empty_like(order_N)
    back[order_N] = torch.arange(len(back), device=back.device)
    by_slot = [None if rows is None else rows[back] for rows in results[:2]]
    return dict(zip(NAMES, (*by_slot, None if results[2] is None else results[2].view(-1)), strict=True))


def check(case: Problem, dtype: torch.dtype, device: torch.device) -> None:
    case = case.to(dtype, device)
    actual, baseline = launch(case), plain(case)
    exact, sizes = plain(case.to(torch.float64, device)), plain(case.absolute(), absolute=True)
    assert actual["grad_weights"].dtype == torch.float32
    actual["grad_weights"] = actual["grad_weights"].to(dtype)
    for name in NAMES:
        assert_right(actual[name], baseline[name], exact[name], sizes[name], case.factor(), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_matches_float64(routing, dtype, device):
    check(problem(routing), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_matches_float64(form, dtype, device):
    check(problem("sentinels", form), dtype, device)


@pytest.mark.parametrize(("form", "rank"), [("silu", 4), ("gpt_oss", 16), ("gelu_ungated", 20)])
def test_low_rank_part(form, rank, device):
    check(problem("sentinels", form, rank), torch.bfloat16, device)


def test_float32_routing_weights_with_16_bit_rows(device):
    case = problem("balanced").to(torch.bfloat16, device)
    case.layer = replace(case.layer, weights=torch.rand_like(case.layer.weights, dtype=torch.float32))
    baseline = replace(case, layer=case.layer.to(torch.bfloat16, device))
    actual, exact = launch(case), plain(case.to(torch.float64, device))
    for name in ("grad_pre", "weighted_act"):
        assert_right(actual[name], plain(baseline)[name], exact[name], exact[name], 0.0, name)


def test_expanded_gradient_and_strided_weight(device):
    case = problem("balanced", "gelu_transposed").to(torch.float32, device)
    expected = launch(replace(case, grad_out_TH=torch.ones_like(case.grad_out_TH)))
    expanded = torch.ones((), device=device).expand(case.grad_out_TH.shape)
    weight = case.layer.down_weight
    strided = torch.stack([weight, weight], dim=-1)[..., 0]
    actual = launch(replace(case, grad_out_TH=expanded, layer=replace(case.layer, down_weight=strided)))
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


def test_only_what_is_needed_is_computed(device):
    case = problem("sentinels", "gpt_oss").to(torch.float32, device)
    everything, least = launch(case), launch(case, need_act=False, need_grad_weights=False)
    assert least["weighted_act"] is None
    assert least["grad_weights"] is None
    assert torch.equal(least["grad_pre"], everything["grad_pre"])


def test_same_bits_from_run_to_run(device):
    case = problem("repeated_indices", "gpt_oss").to(torch.bfloat16, device)
    first, second = launch(case), launch(case)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_sizes_that_blocks_divide(device):
    """No step of the product is masked."""
    case = problem("one_expert_takes_all")
    hidden, down = torch.randn(17, 64), torch.randn(4, 64, 32) / 6
    case.layer = replace(case.layer, hidden=hidden, down_weight=down)
    case.grad_out_TH, case.pre_NP = torch.randn(17, 64), torch.randn(17, 64)
    check(case, torch.bfloat16, device)


@pytest.mark.parametrize("form", ["silu", "gpt_oss", "gelu_ungated"])
def test_parts_of_the_epilogue_give_the_whole(form, monkeypatch, device):
    case = problem("sentinels", form).to(torch.float32, device)
    monkeypatch.setattr(backward_activation, "EPILOGUE_COLUMNS", 64)
    whole = launch(case)
    monkeypatch.setattr(backward_activation, "EPILOGUE_COLUMNS", 8)
    parts = launch(case)
    assert torch.equal(parts["grad_pre"], whole["grad_pre"])
    assert torch.equal(parts["weighted_act"], whole["weighted_act"])
    torch.testing.assert_close(parts["grad_weights"], whole["grad_weights"])


def test_half_tiles_change_no_bit(monkeypatch, device):
    tile = Tile(32, 16, 16, num_warps=4, num_stages=1)
    monkeypatch.setattr(backward_activation, "tile_for", lambda *_, **__: tile)
    case = problem("sentinels", "gpt_oss", rank=4).to(torch.float32, device)
    whole = launch(case)
    monkeypatch.setattr(grouped_linear, "FEWEST_ROWS_OF_HALF", 16)
    half = launch(case)
    assert all(torch.equal(half[name], whole[name]) for name in NAMES)


def test_programs_may_run_in_any_order(monkeypatch, device):
    """No tile writes rows of another."""
    case = problem("sentinels", "gpt_oss").to(torch.float32, device)
    forwards, tiles = launch(case), RowOrder.tiles
    monkeypatch.setattr(RowOrder, "tiles", lambda *args: TileMap(*(part.flip(0) for part in tiles(*args))))
    backwards = launch(case)
    assert all(torch.equal(backwards[name], forwards[name]) for name in NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_real_size(dtype, device):
    """A Qwen3-30B-A3B layer at 1024 tokens."""
    generator = torch.Generator().manual_seed(0)
    E, H, width, tokens = 128, 2048, 768, 1024

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    index = torch.rand(tokens, E, generator=generator).argsort(-1)[:, :8]
    weights, down = normal(tokens, 8).softmax(-1), normal(E, H, width) / width**0.5
    case = Layer(normal(tokens, H), index, weights, down.new_zeros(E, 1, 1), None, down, normal(E, H), FORMS["silu"])
    check(Problem(case, normal(tokens * 8, 2 * width), normal(tokens, H)), dtype, device)
