"""The up projection with its activation against float64: every layout, activation and bias, with adapters."""

from dataclasses import replace

import pytest
import torch

import kernel_cases
from hf_moe.kernels.triton import up
from hf_moe.kernels.triton.routing import RowOrder, sort_rows
from hf_moe.kernels.triton.tiles import Tile
from hf_moe.kernels.triton.up import launch_up
from kernel_cases import DTYPES, GATES, Layer, amid_nan, assert_right
from numerics import ROUTINGS


def order_of(layer: Layer, device) -> RowOrder:
    return sort_rows(layer.index.to(device), layer.num_experts, layer.num_experts + 1)


def low_rank(layer: Layer, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, R] and [E, P, R], exact in 16 bits."""
    P = layer.up_weight.shape[2 if layer.gate.transposed else 1]
    low, low_weight = torch.randn(layer.index.numel(), rank), torch.randn(layer.num_experts, P, rank)
    return low.bfloat16().float(), low_weight.bfloat16().float()


def plain(layer: Layer, order: RowOrder, low=None, low_weight=None, absolute: bool = False):
    """(act, pre) in expert order and the layer's dtype; zeros for sentinels."""
    P = layer.up_weight.shape[2 if layer.gate.transposed else 1]
    pre_NP = layer.hidden.new_zeros(layer.index.numel(), P)
    order_N, flat = order.order_N.cpu().long(), layer.index.reshape(-1)
    for expert in range(layer.num_experts):
        rows = torch.where(flat[order_N] == expert)[0]
        tokens = order_N[rows] // layer.index.shape[1]
        pre_NP[rows] = kernel_cases.plain_pre(layer, expert, layer.hidden[tokens])
        if low is not None:
            pre_NP[rows] += low[rows].to(pre_NP.dtype) @ low_weight[expert].T.to(pre_NP.dtype)
    act_NI = kernel_cases.activate(pre_NP, layer.gate, absolute)
    return act_NI.masked_fill((flat[order_N] == layer.num_experts)[:, None], 0.0), pre_NP


def check(layer: Layer, dtype: torch.dtype, device, rank: int = 0):
    order = order_of(layer, device)
    low = low_rank(layer, rank) if rank else (None, None)
    given = layer.to(dtype, device)
    low_here = {"low": low[0].to(device, dtype), "low_weight": low[1].to(device, dtype)} if rank else {}
    options = {"top_k": layer.index.shape[1], "bias": given.up_bias, **layer.gate.options(), **low_here}
    act_NI, pre_NP = launch_up(given.hidden, given.up_weight, order, store_pre=True, **options)
    exact = plain(layer.to(torch.float64), order, *low)
    baseline = plain(layer.to(dtype), order, *low)
    absolute = [None if x is None else x.double().abs() for x in low]
    with torch.no_grad():
        size = plain(kernel_cases.absolute_layer(layer), order, *absolute, absolute=True)
    factor = kernel_cases.rounding(layer) * (1 + rank)
    assert_right(act_NI.cpu(), baseline[0], exact[0], size[0], factor, "act")
    assert_right(pre_NP.cpu(), baseline[1], exact[1], size[1], factor, "pre")
    inference, nothing = launch_up(given.hidden, given.up_weight, order, store_pre=False, **options)
    assert nothing is None
    assert torch.equal(inference.nan_to_num(), act_NI.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
def test_gates_match_float64(gate, dtype, device):
    check(kernel_cases.layer("odd_sizes", gate), dtype, device)


@pytest.mark.parametrize("gate", ["silu", "gpt_oss"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_match_float64(routing, gate, device):
    check(kernel_cases.layer(routing, gate), torch.float32, device)


@pytest.mark.parametrize("rank", [4, 24])
@pytest.mark.parametrize("gate", ["silu", "gpt_oss", "relu2_ungated"])
def test_low_rank_addend_matches_float64(gate, rank, device):
    check(kernel_cases.layer("sentinels", gate), torch.float32, device, rank)


@pytest.mark.parametrize("tile", [(32, 16, 16), (16, 16, 64)])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh_interleaved", "silu_ungated_transposed"])
def test_tiles_match_float64(gate, tile, monkeypatch, device):
    monkeypatch.setattr(up, "tile_for", lambda *_, **__: Tile(*tile, num_warps=4, num_stages=1))
    check(kernel_cases.layer("balanced", gate), torch.float32, device)


def test_operands_may_have_any_strides(device):
    layer = kernel_cases.layer("balanced", "silu").to(torch.float32, device)
    order, options = order_of(layer, device), {"top_k": layer.index.shape[1], **layer.gate.options()}
    wanted, _ = launch_up(layer.hidden, layer.up_weight, order, **options)
    strided = replace(
        layer,
        hidden=layer.hidden.T.contiguous().T,
        up_weight=layer.up_weight.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    )
    actual, _ = launch_up(strided.hidden, strided.up_weight, order, **options)
    assert torch.equal(actual, wanted)


@pytest.mark.parametrize("gate", ["silu", "gpt_oss"])
def test_nothing_is_read_beyond_the_operands(gate, device):
    layer = kernel_cases.layer("odd_sizes", gate).to(torch.float32, device)
    order, options = order_of(layer, device), {"top_k": layer.index.shape[1], **layer.gate.options()}
    wanted, _ = launch_up(layer.hidden, layer.up_weight, order, bias=layer.up_bias, **options)
    operands = (amid_nan(layer.hidden), amid_nan(layer.up_weight))
    actual, _ = launch_up(*operands, order, bias=layer.up_bias, **options)
    assert torch.equal(actual, wanted)


def test_rows_of_sentinels_are_zero(device):
    layer = kernel_cases.layer("sentinels", "silu").to(torch.float32, device)
    order = order_of(layer, device)
    options = {"top_k": layer.index.shape[1], **layer.gate.options()}
    results = launch_up(layer.hidden, layer.up_weight, order, store_pre=True, **options)
    for result in results:
        assert not result[int(order.expert_end_E[-1]) :].any()
