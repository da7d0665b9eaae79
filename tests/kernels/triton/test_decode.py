"""A layer for few tokens, two launches without a sort, against float64.

Shape suffixes: T tokens, K slots per token, E experts, H hidden, I expert width.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_moe.kernels.layer_call import ExpertForm
from hf_moe.kernels.triton import decode as decode_module
from hf_moe.kernels.triton import tiles
from hf_moe.kernels.triton.decode import can_overlap, launch_decode, output_block
from hf_moe.kernels.triton.tiles import Tile
from kernel_cases import DTYPES, FORMS, Layer, absolute_layer, assert_right, layer, plain_layer, rounding
from numerics import ROUTINGS


def decode(case: Layer) -> Tensor:
    return launch_decode(case.call())


def check(case: Layer, dtype: torch.dtype, device: torch.device) -> None:
    case = case.to(dtype, device)
    size = plain_layer(absolute_layer(case), absolute=True).detach()
    exact = plain_layer(case.to(torch.float64, device))
    assert_right(decode(case), plain_layer(case), exact, size, rounding(case))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_matches_float64(routing, device):
    check(layer(routing), torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_matches_float64(form, dtype, device):
    check(layer("sentinels", form), dtype, device)


@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_odd_sizes_in_both_layouts(form, device):
    check(layer("odd_sizes", form, bias=True), torch.float32, device)


def test_sentinels_read_no_weights(monkeypatch, interpreter):
    """Their activations, which nothing reads, stay unwritten: NaN here."""
    case, acts, launch = layer("sentinels"), [], decode_module._launch_up
    monkeypatch.setattr(decode_module, "_launch_up", lambda *args: acts.append(launch(*args)) or acts[0])
    assert not decode(case).isnan().any()
    assert torch.equal(acts[0].isnan().all(1), case.index.reshape(-1) == case.num_experts)


@pytest.mark.parametrize(("wrong", "num_ids"), [(-1, 5), (4, 4), (5, 5), (2**40, 5), (-(2**40), 5)])
def test_an_id_out_of_range_makes_its_token_nan_and_reads_nothing(wrong, num_ids, device):
    case = layer("one_token", "gpt_oss")
    three = {name: getattr(case, name).repeat(3, 1) for name in ("hidden", "index", "weights")}
    case = replace(case, **three).to(torch.float32, device)
    right = decode(case)
    case.index[1, -1] = wrong
    out = launch_decode(case.call()._replace(num_ids=num_ids))
    assert out[1].isnan().all()
    assert torch.equal(out[::2], right[::2])


def test_int32_ids_and_float32_routing_weights(device):
    case = layer("one_token", "gpt_oss").to(torch.bfloat16, device)
    expected = decode(replace(case, weights=case.weights.float()))
    assert torch.equal(decode(replace(case, index=case.index.int())), expected)
    assert torch.equal(decode(case), expected)  # these routing weights are exact in bfloat16


def test_strided_operands(device):
    case = layer("one_token", "gelu_transposed").to(torch.float32, device)
    strided = {
        name: torch.stack([value, torch.full_like(value, math.nan)], dim=-1)[..., 0]
        for name, value in case.tensors().items()
    }
    assert torch.equal(decode(replace(case, **strided)), decode(case))


def test_same_bits_from_run_to_run(device):
    case = layer("repeated_indices", "gpt_oss").to(torch.bfloat16, device)
    assert torch.equal(decode(case), decode(case))


@pytest.mark.parametrize(("chip", "can"), [("sm_80", False), ("sm_90", True), ("sm_120", True), ("gfx942", False)])
def test_the_second_launch_starts_early_where_the_chip_can(chip, can, monkeypatch):
    monkeypatch.setattr(tiles, "device_name", lambda device: chip)
    assert can_overlap(torch.device("cuda")) == can
    assert not can_overlap(torch.device("cpu"))


@pytest.mark.parametrize(
    ("transposed", "slots", "block"),
    [(False, 1, (16, 256)), (False, 8, (2, 256)), (False, 32, (1, 128)), (True, 1, (64, 64)), (True, 8, (16, 32))],
)
def test_blocks_are_as_large_as_the_tile_and_lie_as_the_weights_do(transposed, slots, block):
    assert output_block(Tile(1, 16, 256, num_warps=4, num_stages=2), transposed, slots) == block
    assert slots * block[0] * block[1] == 16 * 256


def random_layer(tokens: int, E: int, K: int, H: int, width: int, form: ExpertForm, device: torch.device) -> Layer:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    index = torch.rand(tokens, E, generator=generator, device=device).argsort(-1)[:, :K]
    up, down = normal(E, 2 * width, H) / H**0.5, normal(E, H, width) / width**0.5
    if form.transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = normal(E, 2 * width), normal(E, H)
    return Layer(normal(tokens, H), index, normal(tokens, K).softmax(-1), up, biases[0], down, biases[1], form)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("sizes", [(128, 8, 2048, 768), (32, 4, 2880, 2880)], ids=["qwen3_30b", "gpt_oss_20b"])
@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_real_size(form, sizes, tokens, device):
    check(random_layer(tokens, *sizes, FORMS[form], device), torch.bfloat16, device)


@pytest.mark.gpu
def test_calls_in_a_row_are_as_without_the_early_start(device, monkeypatch):
    """Each call's input is the output of the one before, so that a read ahead of a write shows."""
    case = random_layer(1, 64, 8, 2048, 768, FORMS["silu"], device).to(torch.bfloat16, device)
    # a kernel that fills `out` between the two launches would keep the second one from starting early
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)

    def last_of_many() -> Tensor:
        call = case.call()
        for _ in range(200):
            call = call._replace(hidden_TH=torch.nn.functional.normalize(call.hidden_TH + launch_decode(call)))
        return call.hidden_TH

    overlapped = last_of_many()
    monkeypatch.setattr(decode_module, "can_overlap", lambda device: False)
    assert torch.equal(last_of_many(), overlapped)
