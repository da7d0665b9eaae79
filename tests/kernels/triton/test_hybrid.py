"""The layer made of torch's grouped products and the steps between them, against float64.

Shape suffixes: N routed rows, E experts, H hidden, P pre-activation width (2I gated, I ungated).
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernel_cases
from hf_moe.kernels.layer_call import flatten
from hf_moe.kernels.triton import hybrid
from hf_moe.kernels.triton.routing import RowOrder, TileMap, size_of_maps
from kernel_cases import DTYPES, FORMS, Layer, assert_right
from numerics import ROUTINGS

# each routing with one form; every form runs with sentinels besides
PAIRS = sorted({*zip(ROUTINGS, 2 * list(FORMS), strict=False), *(("sentinels", form) for form in FORMS)})
PAIRS.remove(next(pair for pair in PAIRS if pair[0] == "nan_token"))


def test_programs_may_run_in_any_order(monkeypatch, device):
    """No tile writes rows of another."""
    case = kernel_cases.layer("sentinels", "gpt_oss").to(torch.float32, device)
    forwards, tiles = run(case, torch.ones_like(case.hidden)), RowOrder.tiles
    monkeypatch.setattr(RowOrder, "tiles", lambda *args: TileMap(*(part.flip(0) for part in tiles(*args))))
    backwards = run(case, torch.ones_like(case.hidden))
    assert all(torch.equal(backwards[name], forwards[name]) for name in forwards)


def run(case: Layer, cotangent: Tensor) -> dict[str, Tensor]:
    """Output and gradients of every tensor."""
    leaves = case.differentiable()
    out = hybrid.triton_hybrid_experts(leaves.call())
    gradients = torch.autograd.grad(out, list(leaves.tensors().values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves.tensors(), gradients, strict=True))}


def check(case: Layer, dtype: torch.dtype, device: torch.device) -> None:
    cotangent = torch.randn(case.hidden.shape).bfloat16().float()
    actual = run(case.to(dtype, device), cotangent.to(device, dtype))
    exact = kernel_cases.layer_results(case.to(torch.float64), cotangent)
    baseline = kernel_cases.layer_results(case.to(dtype), cotangent)
    sizes, factor = kernel_cases.layer_sizes(case, cotangent), kernel_cases.rounding(case)
    for name, value in actual.items():
        assert value.dtype == dtype
        assert_right(value.cpu(), baseline[name], exact[name], sizes[name], factor, name)


@pytest.mark.parametrize(("routing", "form"), PAIRS)
def test_output_and_gradients_match_float64(routing, form, device):
    check(kernel_cases.layer(routing, form), torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_are_as_good_as_plain_torch(form, dtype, device):
    check(kernel_cases.layer("last_expert_empty", form), dtype, device)


def test_nan_stays_in_its_token(device):
    case = kernel_cases.layer("nan_token").to(torch.float32, device)
    results = run(case, torch.ones_like(case.hidden))
    for name in ("out", "hidden"):
        assert torch.equal(results[name].isnan().any(1), case.hidden.isnan().any(1))


@pytest.mark.parametrize("name", ["hidden", "weights", "up_weight", "up_bias", "down_weight", "down_bias"])
def test_only_the_wanted_gradient_is_computed(name, monkeypatch, device):
    case = kernel_cases.layer("sentinels", "gpt_oss").to(torch.float32, device)
    wanted = run(case, torch.ones_like(case.hidden))[name]
    products, outer = [], hybrid._outer_product
    monkeypatch.setattr(hybrid, "_outer_product", lambda *args: products.append(args) or outer(*args))
    leaf = getattr(case, name).detach().requires_grad_()
    hybrid.triton_hybrid_experts(replace(case, **{name: leaf}).call()).sum().backward()
    assert torch.equal(leaf.grad, wanted)
    assert len(products) == name.endswith("_weight")


def test_saved_are_the_arguments_the_order_and_the_pre_activation(device):
    case = kernel_cases.layer("balanced", "gpt_oss").to(torch.float32, device).differentiable()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        hybrid.triton_hybrid_experts(case.call())
    arguments = {tensor.data_ptr() for tensor in (case.index, *case.tensors().values())}
    new = {tuple(tensor.shape): tensor.dtype for tensor in saved if tensor.data_ptr() not in arguments}
    N, E, P = case.index.numel(), case.num_experts, case.up_weight.shape[2]
    maps = (size_of_maps(N, E),)
    assert new == {(N, P): torch.float32, (N,): torch.int32, (E,): torch.int32, maps: torch.int32}


def test_same_bits_from_run_to_run(device):
    case = kernel_cases.layer("repeated_indices", "gpt_oss").to(torch.bfloat16, device)
    first, second = (run(case, torch.ones_like(case.hidden)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_of_the_forward(keep, device):
    case = kernel_cases.layer("sentinels", "gpt_oss").to(torch.float32, device)
    case = case.differentiable() if keep else case
    torch.library.opcheck(torch.ops.hf_moe.triton_hybrid_experts, (*flatten(case.call()), keep))


def test_opcheck_of_the_backward(device):
    case = kernel_cases.layer("sentinels", "gpt_oss").to(torch.float32, device)
    _, pre, *order = torch.ops.hf_moe.triton_hybrid_experts(*flatten(case.call()), True)
    for wants in ([True] * 6, [False, True, True, False, False, True]):
        arguments = (torch.ones_like(case.hidden), pre, *order, *flatten(case.call()), wants)
        torch.library.opcheck(torch.ops.hf_moe.triton_hybrid_experts_backward, arguments)


def test_compiles_whole_with_the_same_results(device):
    case = kernel_cases.layer("balanced", "gpt_oss").to(torch.float32, device)
    eager, leaves = run(case, torch.ones_like(case.hidden)), case.differentiable()
    compiled = torch.compile(hybrid.triton_hybrid_experts, fullgraph=True, backend="aot_eager")
    out = compiled(leaves.call())
    out.sum().backward()
    assert torch.equal(out, eager["out"])
    for name, tensor in leaves.tensors().items():
        assert torch.equal(tensor.grad, eager[name])


def test_rows_that_the_product_refuses_are_an_error_with_a_way_out(device):
    case = kernel_cases.layer("odd_sizes").to(torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"multiples of 8 in torch.bfloat16, got up_weight of shape \(5, 24, 20\)"):
        hybrid.triton_hybrid_experts(case.call())


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_real_size(form, device):
    """A layer of Mixtral's kind, narrow, an expert without rows and sentinels; every gradient."""
    generator = torch.Generator().manual_seed(0)
    E, H, width, tokens, spec = 8, 1024, 1536, 2048, FORMS[form]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    index = torch.rand(tokens, E + 1, generator=generator).argsort(-1)[:, :2]
    index[index == 3] = 4  # expert 3 is empty; some tokens name an expert twice
    up, down = normal(E, 2 * width, H) / H**0.5, normal(E, H, width) / width**0.5
    if spec.transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    weights = normal(tokens, 2).softmax(-1).masked_fill(index == E, 0.0)
    case = Layer(normal(tokens, H), index, weights, up, normal(E, 2 * width), down, normal(E, H), spec)
    check(case.to(torch.bfloat16), torch.bfloat16, device)
