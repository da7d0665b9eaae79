"""Experts in fp8 against the same kernels on the dense weights that values and scales stand for: equal bits."""

from dataclasses import replace

import pytest
import torch

import kernel_cases
from hf_moe.kernels.layer_call import NO_FP8_GRADIENT, ExpertWeights, LayerCall, LowRankPair
from hf_moe.kernels.triton import ops
from hf_moe.kernels.triton.ops import triton_experts, triton_experts_lora
from hf_moe.layers.fp8_storage import dequantise
from hf_moe.layers.moe_layers import moe_layers
from kernel_cases import Layer
from numerics import ROUTINGS
from tiny_fp8 import with_fp8_experts
from tiny_lora import build

# rows and columns that have a scale; None: all
BLOCKS = {"blocks": (4, 4), "rows": (1, None), "tensor": (None, None), "halves": (24, 32), "large": (8, 32)}


@pytest.fixture(autouse=True)
def _converts_fp8(device):
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("float8_e4m3fn needs an NVIDIA GPU from SM89 on")


def wide(layer: Layer) -> Layer:
    """Four times the hidden size, so that a product takes more steps than one."""
    up, down = layer.up_weight.repeat(1, 1, 4) / 2, layer.down_weight.repeat(1, 4, 1)
    return replace(layer, hidden=layer.hidden.repeat(1, 4), up_weight=up, down_weight=down)


def stored(weight: torch.Tensor, blocks: tuple, scale_dtype: torch.dtype = torch.float32):
    """fp8 values, and scales of powers of two where nothing else has their dtype."""
    E, *widths = weight.shape
    grid = [size // (size if block is None else min(block, size)) for size, block in zip(widths, blocks, strict=True)]
    scale = torch.rand((E, *grid), generator=torch.Generator().manual_seed(grid[0])) + 0.5
    return weight.to(torch.float8_e4m3fn), scale.to(weight.device, scale_dtype)


def pair(layer: Layer, dtype: torch.dtype, device, blocks="blocks", scale_dtype=torch.float32):
    """The layer with dense weights, and the weights of the same layer in fp8."""
    layer = layer.to(dtype, device)
    up, down = (stored(weight, BLOCKS[blocks], scale_dtype) for weight in (layer.up_weight, layer.down_weight))
    dense = replace(layer, up_weight=dequantise(*up, dtype), down_weight=dequantise(*down, dtype))
    scales = (s.view(torch.uint8) if s.element_size() == 1 else s for s in (up[1], down[1]))
    return dense, ExpertWeights(up[0], layer.up_bias, down[0], layer.down_bias, *scales)


def factors_of(layer: Layer, rank: int = 5) -> LowRankPair:
    (E, P, H), (_, _, width) = layer.up_weight.shape, layer.down_weight.shape
    shapes = {"up_a": (E, rank, H), "up_b": (E, P, rank), "down_a": (E, rank, width), "down_b": (E, H, rank)}
    generator = torch.Generator().manual_seed(3)
    factors = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    return {name: factor.to(layer.hidden) for name, factor in factors.items()}


def results(call: LayerCall, factors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The output, and gradients of hidden states, routing weights and factors."""
    trained = [tensor.detach().requires_grad_() for tensor in (call.hidden_TH, call.weights_TK, *factors.values())]
    low_rank = kernel_cases.low_rank_of(dict(zip(factors, trained[2:], strict=True)), (0.5, 2.0)) if factors else None
    function = triton_experts_lora if factors else triton_experts
    out = function(call._replace(hidden_TH=trained[0], weights_TK=trained[1], low_rank=low_rank))
    return [out, *torch.autograd.grad(out, trained, torch.ones_like(out))]


def assert_same_bits(layer: Layer, fp8: ExpertWeights, adapted: bool) -> None:
    factors = factors_of(layer) if adapted else {}
    found = (results(call, factors) for call in (layer.call()._replace(experts=fp8), layer.call()))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


SHORT = ("sentinels", "odd_sizes", "no_tokens", "one_token")


@pytest.mark.parametrize("routing", SHORT)
def test_same_bits_in_every_routing(routing, device):
    assert_same_bits(*pair(kernel_cases.layer(routing), torch.bfloat16, device), adapted=routing == "sentinels")


@pytest.mark.long
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("routing", sorted(set(ROUTINGS) - set(SHORT)))
def test_same_bits_in_other_routings(routing, adapted, device):
    assert_same_bits(*pair(kernel_cases.layer(routing), torch.bfloat16, device), adapted)


@pytest.mark.parametrize(
    ("form", "blocks", "dtype", "scale_dtype"),
    [
        ("silu", "rows", torch.bfloat16, torch.bfloat16),
        ("silu", "large", torch.bfloat16, torch.float8_e8m0fnu),
        ("gelu_ungated", "halves", torch.float16, torch.float16),
        pytest.param("gelu_tanh_interleaved", "tensor", torch.float16, torch.float32, marks=pytest.mark.long),
        pytest.param("relu2_ungated", "blocks", torch.float32, torch.float8_e8m0fnu, marks=pytest.mark.long),
    ],
)
def test_same_bits_in_every_form_and_scale(form, blocks, dtype, scale_dtype, device):
    layer = wide(kernel_cases.layer("balanced", form, bias=False))
    assert_same_bits(*pair(layer, dtype, device, blocks, scale_dtype), adapted=False)


@pytest.mark.parametrize(("form", "blocks"), [("silu", "large"), ("relu2_ungated", "blocks")])
@torch.no_grad()
def test_same_bits_for_few_tokens(form, blocks, device, monkeypatch):
    monkeypatch.setattr(ops, "DECODE_ROWS_PER_EXPERT", 6)
    layer, fp8 = pair(wide(kernel_cases.layer("sentinels", form, bias=False)), torch.bfloat16, device, blocks)
    few = {"hidden_TH": layer.hidden[-4:], "index_TK": layer.index[-4:], "weights_TK": layer.weights[-4:]}
    expected = triton_experts(layer.call()._replace(**few))
    assert torch.equal(triton_experts(layer.call()._replace(**few, experts=fp8)), expected)
    assert expected.count_nonzero()


def test_an_experts_module_of_transformers(device):
    """Found in transformers' registry, with adapters' factors, against the same module with dense weights."""
    pair = with_fp8_experts(build("qwen3_moe", torch.bfloat16)[0].to(device))
    found = []
    for model in pair:
        model.set_experts_implementation("hf_moe_triton")
        experts = moe_layers(model)[0].experts.requires_grad_(False)
        generator = torch.Generator().manual_seed(5)
        hidden = torch.randn(4, 32, generator=generator).to(device, torch.bfloat16).requires_grad_()
        index = torch.rand(4, 8, generator=generator).argsort(-1)[:, :2].to(device)
        shapes = {"up_a": (8, 3, 32), "up_b": (8, 48, 3)}
        factors = {name: torch.randn(shape, generator=generator).to(hidden) for name, shape in shapes.items()}
        low_rank = kernel_cases.low_rank_of(factors, (0.5, 2.0))
        out = experts(hidden, index, torch.ones(4, 2, device=device), low_rank=low_rank)
        found.append([out, *torch.autograd.grad(out.sum(), hidden)])
    assert all(torch.equal(fp8, dense) for fp8, dense in zip(*found, strict=True))


def test_values_take_no_gradient(device):
    layer, fp8 = pair(kernel_cases.layer("balanced"), torch.bfloat16, device)
    call = layer.call()._replace(experts=fp8._replace(down=fp8.down.requires_grad_()))
    out = triton_experts(call)
    with pytest.raises(ValueError, match=NO_FP8_GRADIENT[:30]):
        out.sum().backward()


def test_refusals(device):
    layer, fp8 = pair(kernel_cases.layer("balanced"), torch.bfloat16, device)

    def refused(match: str, call: LayerCall) -> None:
        with pytest.raises(ValueError, match=match):
            triton_experts(call)

    call = layer.call()
    refused("both weights", call._replace(experts=fp8._replace(up_scale=None)))
    refused("got up torch.bfloat16", call._replace(experts=fp8._replace(up=layer.up_weight)))
    refused("equal blocks", call._replace(experts=fp8._replace(down_scale=fp8.down_scale[:, :, :-1])))
    swapped = fp8._replace(up=fp8.up.transpose(1, 2), down=fp8.down.transpose(1, 2))
    refused("not transposed", call._replace(experts=swapped, form=kernel_cases.FORMS["gelu_transposed"]))
    refused("must have one dtype", call._replace(experts=fp8._replace(up_scale=None, down_scale=None)))
