"""Experts under low-rank adapters against dense experts with weights W + scale * B @ A in float64."""

import functools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_cases
from hf_moe.kernels.layer_call import LowRankPair, flatten
from hf_moe.kernels.layer_op import AdapterWants
from hf_moe.kernels.triton import layer as layer_steps
from hf_moe.kernels.triton import low_rank
from hf_moe.kernels.triton.ops import triton_experts_lora
from hf_moe.kernels.triton.routing import size_of_maps
from kernel_cases import DTYPES, FORMS, Layer, assert_right
from numerics import ROUTINGS

SCALES = (0.5, 2.0)
FACTORS = ("up_a", "up_b", "down_a", "down_b")
TRAINED = ("hidden", "weights", *FACTORS)


def sizes(layer: Layer) -> tuple[int, int, int, int]:
    """E, H, P, I."""
    E, P, H = (layer.up_weight.transpose(1, 2) if layer.form.transposed else layer.up_weight).shape
    return E, H, P, layer.down_weight.shape[1 if layer.form.transposed else 2]


def random_factors(layer: Layer, rank: int, down_rank: int | None = None) -> dict[str, torch.Tensor]:
    """Exact in 16 bits."""
    (E, H, P, width), down_rank = sizes(layer), down_rank or rank
    shapes = ((E, rank, H), (E, P, rank), (E, down_rank, width), (E, H, down_rank))
    generator = torch.Generator().manual_seed(3)
    factors = {name: torch.randn(shape, generator=generator) for name, shape in zip(FACTORS, shapes, strict=True)}
    return {name: (factor / 4).bfloat16().float() for name, factor in factors.items()}


def cast(factors: dict, dtype: torch.dtype, device) -> dict:
    return {name: factor.detach().to(device, dtype) for name, factor in factors.items()}


def results(function, layer: Layer, factors: dict, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output of `function(layer, factors)` and gradients of everything that is trained."""
    factors = {name: factor.detach().requires_grad_() for name, factor in factors.items()}
    hidden, weights = (tensor.detach().requires_grad_() for tensor in (layer.hidden, layer.weights))
    out = function(replace(layer, hidden=hidden, weights=weights), factors)
    gradients = torch.autograd.grad(out, [hidden, weights, *factors.values()], cotangent.to(out))
    return {"out": out.detach(), **dict(zip(("hidden", "weights", *factors), gradients, strict=True))}


def ours(layer: Layer, factors: dict) -> torch.Tensor:
    return triton_experts_lora(layer.call(kernel_cases.low_rank_of(factors, SCALES)))


def dense(layer: Layer, factors: dict, absolute: bool = False) -> torch.Tensor:
    """Plain torch with the adapters added to the weights."""
    additions = [
        scale * factors[f"{name}_b"] @ factors[f"{name}_a"] for name, scale in zip(("up", "down"), SCALES, strict=True)
    ]
    if layer.form.transposed:
        additions = [addition.transpose(1, 2) for addition in additions]
    merged = replace(layer, up_weight=layer.up_weight + additions[0], down_weight=layer.down_weight + additions[1])
    return kernel_cases.plain_layer(merged, absolute)


def check(layer: Layer, dtype: torch.dtype, device, rank: int, down_rank: int | None = None):
    factors = random_factors(layer, rank, down_rank)
    cotangent = torch.randn(layer.hidden.shape).bfloat16().float()
    actual = results(ours, layer.to(dtype, device), cast(factors, dtype, device), cotangent)
    exact = results(dense, layer.to(torch.float64), cast(factors, torch.float64, "cpu"), cotangent)
    baseline = results(dense, layer.to(dtype), cast(factors, dtype, "cpu"), cotangent)
    absolute = {name: factor.double().abs() for name, factor in factors.items()}
    absolute_dense = functools.partial(dense, absolute=True)
    size = results(absolute_dense, kernel_cases.absolute_layer(layer), absolute, cotangent.double().abs())
    merged = replace(layer, up_weight=layer.up_weight.abs() + 2 * rank)  # factors are below 2: bounds |B| @ |A|
    factor = kernel_cases.rounding(merged) + 4 * rank * torch.finfo(torch.float32).eps
    for name, value in actual.items():
        assert value.dtype == dtype
        assert_right(value.cpu(), baseline[name], exact[name], size[name], factor, name)


@pytest.mark.parametrize(("form", "rank"), list(zip(FORMS, (4, 8, 16, 24) * 2, strict=True)))
def test_equals_dense_weights_in_every_form(form, rank, device):
    check(kernel_cases.layer("odd_sizes", form), torch.float32, device, rank)


@pytest.mark.parametrize("routing", sorted(set(ROUTINGS) - {"nan_token", "odd_sizes"}))
def test_equals_dense_weights_in_every_routing(routing, device):
    check(kernel_cases.layer(routing, "silu", bias=True), torch.float32, device, 4)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("form", "rank"), [("silu", 16), ("gpt_oss", 24), ("relu2_ungated", 8)])
def test_as_good_as_plain_torch(form, rank, dtype, device):
    check(kernel_cases.layer("balanced", form), dtype, device, rank)


def test_up_and_down_may_have_different_ranks(device):
    check(kernel_cases.layer("balanced", "silu"), torch.float32, device, 4, 24)


@pytest.mark.parametrize("missing", ["up", "down"])
def test_one_of_two_adapters(missing, device):
    """None is as a pair of zeros, bit by bit, and has no gradient."""
    layer, factors = prepared("gpt_oss", device)
    zeros = {name: torch.zeros_like(factor) for name, factor in factors.items() if name.startswith(missing)}
    wanted = results(ours, layer, factors | zeros, torch.ones_like(layer.hidden))
    rest = {name: factor for name, factor in factors.items() if name not in zeros}

    def with_none(layer: Layer, rest: dict) -> torch.Tensor:
        return ours(layer, {name: rest.get(name) for name in FACTORS})

    out = results(with_none, layer, rest, torch.ones_like(layer.hidden))
    assert all(torch.equal(value, wanted[name]) for name, value in out.items())


def prepared(form: str, device, rank: int = 4) -> tuple[Layer, dict]:
    layer = kernel_cases.layer("balanced", form).to(torch.float32, device)
    return layer, cast(random_factors(layer, rank), torch.float32, device)


def test_results_repeat_bit_by_bit(device):
    layer, factors = prepared("gpt_oss", device)
    first, second = (results(ours, layer, factors, torch.ones_like(layer.hidden)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_factors_may_have_any_strides(monkeypatch, device):
    """PEFT keeps B with the experts as the fastest dimension; kernels get its copy, and could read it as it is."""
    layer, factors = prepared("silu", device)
    wanted = results(ours, layer, factors, torch.ones_like(layer.hidden))
    factors = {
        name: factor.permute(1, 2, 0).contiguous().permute(2, 0, 1) if name.endswith("_b") else factor
        for name, factor in factors.items()
    }
    for _ in range(2):
        actual = results(ours, layer, factors, torch.ones_like(layer.hidden))
        assert all(torch.equal(actual[name], wanted[name]) for name in wanted)
        monkeypatch.setattr(LowRankPair, "contiguous", lambda pair: pair)


def test_zero_adapter_changes_nothing(device):
    layer, factors = prepared("silu", device)
    factors |= {name: torch.zeros_like(factors[name]) for name in ("up_b", "down_b")}
    out = ours(layer, factors)
    torch.testing.assert_close(out, kernel_cases.plain_layer(layer))
    with torch.no_grad():
        assert torch.equal(ours(layer, factors), out)


# What is computed and allocated


@functools.cache
def every_gradient(device) -> dict[str, torch.Tensor]:
    layer, factors = prepared("gpt_oss", device)
    return results(ours, layer, factors, torch.ones_like(layer.hidden))


@pytest.mark.parametrize("name", TRAINED)
def test_only_the_wanted_gradient_is_computed(name, monkeypatch, device):
    layer, factors = prepared("gpt_oss", device)
    wanted = every_gradient(device)[name]
    shapes = []

    def record(*args, **kwargs):
        gradient = layer_steps_launch(*args, **kwargs)
        shapes.append(gradient.shape)
        return gradient

    layer_steps_launch = layer_steps.launch_weight_gradient
    monkeypatch.setattr(layer_steps, "launch_weight_gradient", record)
    leaf = (factors | {"hidden": layer.hidden, "weights": layer.weights})[name].detach().requires_grad_()
    if name in FACTORS:
        ours(layer, factors | {name: leaf}).sum().backward()
    else:
        ours(replace(layer, **{name: leaf}), factors).sum().backward()
    assert torch.equal(leaf.grad, wanted)
    assert shapes == ([leaf.shape] if name in FACTORS else [])


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any torch operation makes."""

    elements = 0
    # no new memory; the last is how the interpreter wraps its copies of kernel arguments, which are bytes (uint8)
    VIEWS = (
        torch.ops.aten.transpose.int,
        torch.ops.aten.permute.default,
        torch.ops.aten.set_.source_Storage_storage_offset,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.uint8 and func not in self.VIEWS:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_the_weights_size_ever_exists(device):
    """Neither W + BA nor its gradient: with many experts and few tokens everything is smaller than one weight."""
    layer, rank = kernel_cases.layer("balanced", "silu"), 4
    experts = 24
    up, down = (weight[:1].repeat(experts, 1, 1) for weight in (layer.up_weight, layer.down_weight))
    few = {name: getattr(layer, name)[:4] for name in ("hidden", "index", "weights")}
    layer = replace(layer, up_weight=up, down_weight=down, **few).to(torch.float32, device)
    factors = cast(random_factors(layer, rank), torch.float32, device)
    call = layer.call(kernel_cases.low_rank_of(factors, SCALES))
    with LargestResult() as forward:
        _, kept = low_rank._forward(call, True)
    with LargestResult() as backward:
        gradients = low_rank._backward(torch.ones_like(layer.hidden), call, kept, AdapterWants(*[True] * 6))
    assert len(gradients) == 6
    assert 0 < forward.elements < min(up.numel(), down.numel())
    assert 0 < backward.elements < min(up.numel(), down.numel())


def test_saved_bytes_are_the_pre_activation_and_the_low_rank_rows(device):
    layer, factors = prepared("silu", device)
    given = {tensor.data_ptr() for tensor in (layer.index, *layer.tensors().values(), *factors.values())}
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(layer, {name: factor.requires_grad_() for name, factor in factors.items()})
    new = {tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in given}
    (N, (E, _, P, _)) = layer.index.numel(), sizes(layer)
    assert new == {(N, P), (N, 4), (N,), (E,), (size_of_maps(N, E),)}


# The op as torch sees it


def test_opcheck(device):
    layer, factors = prepared("gpt_oss", device)
    layer = replace(layer, hidden=layer.hidden[:3], index=layer.index[:3], weights=layer.weights[:3])
    call = flatten(layer.call(kernel_cases.low_rank_of(factors, SCALES)))
    leaves = {name: factor.clone().requires_grad_() for name, factor in factors.items()}
    trained = flatten(layer.call(kernel_cases.low_rank_of(leaves, SCALES)))
    torch.library.opcheck(torch.ops.hf_moe.triton_experts_lora, (*trained, True))
    _, *kept = torch.ops.hf_moe.triton_experts_lora(*call, True)
    for wants in ([True] * 6, [False, False, True, False, True, False]):
        arguments = (torch.ones_like(layer.hidden), *kept, *call, wants)
        torch.library.opcheck(torch.ops.hf_moe.triton_experts_lora_backward, arguments)


def test_compiles_whole_with_the_same_results(device):
    layer, factors = prepared("silu", device)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    eager = results(ours, layer, factors, torch.ones_like(layer.hidden))
    actual = results(compiled, layer, factors, torch.ones_like(layer.hidden))
    assert all(torch.equal(actual[name], eager[name]) for name in eager)


def test_errors_name_value_rule_and_way_out(device):
    layer, factors = prepared("silu", device)
    with pytest.raises(ValueError, match=r"base under an adapter is frozen, but up_weight requires grad: call"):
        ours(replace(layer, up_weight=layer.up_weight.requires_grad_()), factors)
    layer.up_weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"up_a must be \[4, R, 16\] and up_b \[4, 48, R\] with R >= 1, or both"):
        ours(layer, factors | {"up_b": factors["up_b"][:, :, :2]})
    with pytest.raises(ValueError, match="with R >= 1"):
        ours(layer, factors | {"up_a": factors["up_a"][:, :0], "up_b": factors["up_b"][:, :, :0]})
    with pytest.raises(ValueError, match=r"or both None, got None and \(4, 16, 4\)"):
        ours(layer, factors | {"down_a": None})
    with pytest.raises(ValueError, match=r"one dtype, got .*down_b float16"):
        ours(layer, factors | {"down_b": factors["down_b"].half()})
