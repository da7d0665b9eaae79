"""The up projection with its activation against float64: every layout, activation and bias, with adapters."""

from dataclasses import replace

import pytest
import torch

import kernel_cases
from hf_moe.kernels.triton import grouped_linear, up
from hf_moe.kernels.triton.grouped_linear import LowRankTerm
from hf_moe.kernels.triton.routing import RowOrder, sort_rows
from hf_moe.kernels.triton.tiles import Tile
from hf_moe.kernels.triton.up import launch_up
from kernel_cases import DTYPES, FORMS, Layer, amid_nan, assert_right
from numerics import ROUTINGS


def order_of(layer: Layer, device) -> RowOrder:
    return sort_rows(layer.index.to(device), layer.num_experts, layer.num_experts + 1)


def low_rank(layer: Layer, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, R] and [E, P, R], exact in 16 bits."""
    P = layer.up_weight.shape[2 if layer.form.transposed else 1]
    low, low_weight = torch.randn(layer.index.numel(), rank), torch.randn(layer.num_experts, P, rank)
    return low.bfloat16().float(), low_weight.bfloat16().float()


def plain(layer: Layer, order: RowOrder, low=None, low_weight=None, absolute: bool = False):
    """(act, pre) in expert order and the layer's dtype; zeros for sentinels."""
    P = layer.up_weight.shape[2 if layer.form.transposed else 1]
    pre_NP = layer.hidden.new_zeros(layer.index.numel(), P)
    order_N, flat = order.order_N.cpu().long(), layer.index.reshape(-1)
    for expert in range(layer.num_experts):
        rows = torch.where(flat[order_N] == expert)[0]
        tokens = order_N[rows] // layer.index.shape[1]
        pre_NP[rows] = kernel_cases.plain_pre(layer, expert, layer.hidden[tokens])
        if low is not None:
            pre_NP[rows] += low[rows].to(pre_NP.dtype) @ low_weight[expert].T.to(pre_NP.dtype)
    act_NI = kernel_cases.activate(pre_NP, layer.form, absolute)
    return act_NI.masked_fill((flat[order_N] == layer.num_experts)[:, None], 0.0), pre_NP


def check(layer: Layer, dtype: torch.dtype, device, rank: int = 0):
    order = order_of(layer, device)
    low = low_rank(layer, rank) if rank else (None, None)
    given = layer.to(dtype, device)
    term = LowRankTerm(*(tensor.to(device, dtype) for tensor in low)) if rank else None
    options = {"top_k": layer.index.shape[1], "bias": given.up_bias, "term": term}
    act_NI, pre_NP = launch_up(given.hidden, given.up_weight, order, layer.form, store_pre=True, **options)
    exact = plain(layer.to(torch.float64), order, *low)
    baseline = plain(layer.to(dtype), order, *low)
    absolute = [None if x is None else x.double().abs() for x in low]
    with torch.no_grad():
        size = plain(kernel_cases.absolute_layer(layer), order, *absolute, absolute=True)
    factor = kernel_cases.rounding(layer) * (1 + rank)
    assert_right(act_NI.cpu(), baseline[0], exact[0], size[0], factor, "act")
    assert_right(pre_NP.cpu(), baseline[1], exact[1], size[1], factor, "pre")
    inference, nothing = launch_up(given.hidden, given.up_weight, order, layer.form, store_pre=False, **options)
    assert nothing is None
    assert torch.equal(inference.nan_to_num(), act_NI.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_forms_match_float64(form, dtype, device):
    check(kernel_cases.layer("odd_sizes", form), dtype, device)


@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_match_float64(routing, form, device):
    check(kernel_cases.layer(routing, form), torch.float32, device)


@pytest.mark.parametrize("rank", [4, 24])
@pytest.mark.parametrize("form", ["silu", "gpt_oss", "relu2_ungated"])
def test_low_rank_addend_matches_float64(form, rank, device):
    check(kernel_cases.layer("sentinels", form), torch.float32, device, rank)


@pytest.mark.parametrize("tile", [(32, 16, 16), (16, 16, 64)])
@pytest.mark.parametrize("form", ["silu", "gelu_tanh_interleaved", "silu_ungated_transposed"])
def test_tiles_match_float64(form, tile, monkeypatch, device):
    monkeypatch.setattr(up, "tile_for", lambda *_, **__: Tile(*tile, num_warps=4, num_stages=1))
    check(kernel_cases.layer("balanced", form), torch.float32, device)


@pytest.mark.parametrize(
    ("routing", "form"),
    [
        ("odd_sizes", "silu"),
        ("one_expert_takes_all", "silu"),  # 17 rows
        ("sentinels", "gelu_transposed"),
        ("odd_sizes", "gpt_oss"),
        ("sentinels", "relu2_ungated"),
    ],
)
def test_half_tiles_and_parts_of_columns_change_no_bit(routing, form, monkeypatch, device):
    monkeypatch.setattr(up, "tile_for", lambda *_, **__: Tile(32, 16, 16, num_warps=4, num_stages=1))
    layer = kernel_cases.layer(routing, form).to(torch.float32, device)
    order, top_k = order_of(layer, device), layer.index.shape[1]
    options = {"top_k": top_k, "bias": layer.up_bias, "store_pre": True}
    wanted = launch_up(layer.hidden, layer.up_weight, order, layer.form, **options)
    monkeypatch.setattr(grouped_linear, "FEWEST_ROWS_OF_HALF", 16)
    monkeypatch.setattr(up, "EPILOGUE_COLUMNS", 16)
    actual = launch_up(layer.hidden, layer.up_weight, order, layer.form, **options)
    assert all(map(torch.equal, actual, wanted))


def test_operands_may_have_any_strides(device):
    """Where memory holds P together, gate and up are no longer side by side in one accumulator."""
    layer = kernel_cases.layer("balanced", "silu").to(torch.float32, device)
    order, top_k = order_of(layer, device), layer.index.shape[1]
    wanted, _ = launch_up(layer.hidden, layer.up_weight, order, layer.form, top_k=top_k)
    strided = replace(
        layer,
        hidden=layer.hidden.T.contiguous().T,
        up_weight=layer.up_weight.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    )
    actual, _ = launch_up(strided.hidden, strided.up_weight, order, layer.form, top_k=top_k)
    assert torch.equal(actual, wanted)


@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_nothing_is_read_beyond_the_operands(form, device):
    layer = kernel_cases.layer("odd_sizes", form).to(torch.float32, device)
    order, top_k = order_of(layer, device), layer.index.shape[1]
    wanted, _ = launch_up(layer.hidden, layer.up_weight, order, layer.form, bias=layer.up_bias, top_k=top_k)
    operands = (amid_nan(layer.hidden), amid_nan(layer.up_weight))
    actual, _ = launch_up(*operands, order, layer.form, bias=layer.up_bias, top_k=top_k)
    assert torch.equal(actual, wanted)


def test_rows_of_sentinels_are_zero(device):
    layer = kernel_cases.layer("sentinels", "silu").to(torch.float32, device)
    order, top_k = order_of(layer, device), layer.index.shape[1]
    results = launch_up(layer.hidden, layer.up_weight, order, layer.form, store_pre=True, top_k=top_k)
    for result in results:
        assert not result[int(order.expert_end_E[-1]) :].any()
