"""Experts on the CPU under low-rank adapters against dense experts with weights W + scale * B @ A in float64."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_cases
import numerics
from hf_moe.kernels.cpu import cpu_experts, cpu_experts_lora, unavailable_reason
from hf_moe.kernels.layer_call import flatten
from kernel_cases import FORMS, Layer, assert_right
from numerics import ROUTINGS

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

SCALES = (0.5, 2.0)
FACTORS = ("up_a", "up_b", "down_a", "down_b")
TRAINED = ("hidden", "weights", *FACTORS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sizes(layer: Layer) -> tuple[int, int, int, int]:
    """E, H, P, I."""
    E, P, H = (layer.up_weight.transpose(1, 2) if layer.form.transposed else layer.up_weight).shape
    return E, H, P, layer.down_weight.shape[1 if layer.form.transposed else 2]


def random_factors(layer: Layer, rank: int, down_rank: int | None = None) -> dict[str, Tensor]:
    """float32, exact in 16 bits; the larger the rank, the smaller, so that activations do not saturate."""
    (E, H, P, width), down_rank = sizes(layer), down_rank or rank
    shapes = ((E, rank, H), (E, P, rank), (E, down_rank, width), (E, H, down_rank))
    generator = torch.Generator().manual_seed(3)
    factors = {name: torch.randn(shape, generator=generator) for name, shape in zip(FACTORS, shapes, strict=True)}
    return {name: (factor / 4).bfloat16().float() for name, factor in factors.items()}


def cast(factors: dict, dtype: torch.dtype) -> dict:
    return {name: factor.detach().to(dtype) for name, factor in factors.items()}


def as_peft_keeps(factors: dict) -> dict:
    """Views of A [R * E, in] and B [out, R * E]."""
    views = {}
    for name, factor in factors.items():
        if name.endswith("a"):
            E, rank, inner = factor.shape
            views[name] = factor.reshape(E * rank, inner).clone().reshape(E, rank, inner)
        else:
            E, out, rank = factor.shape
            kept = factor.permute(1, 2, 0).reshape(out, rank * E)
            views[name] = kept.reshape(out, rank, E).permute(2, 0, 1)
    return views


def ours(layer: Layer, factors: dict) -> Tensor:
    return cpu_experts_lora(layer.call(kernel_cases.low_rank_of(factors, SCALES)))


def dense(layer: Layer, factors: dict, absolute: bool = False) -> Tensor:
    """Plain torch with the adapters added to the weights."""
    weights = {"up_weight": layer.up_weight, "down_weight": layer.down_weight}
    for name, scale in zip(("up", "down"), SCALES, strict=True):
        if f"{name}_a" in factors:
            addition = scale * factors[f"{name}_b"] @ factors[f"{name}_a"]
            addition = addition.transpose(1, 2) if layer.form.transposed else addition
            weights[f"{name}_weight"] = weights[f"{name}_weight"] + addition
    return kernel_cases.plain_layer(replace(layer, **weights), absolute)


def results(function, layer: Layer, factors: dict, cotangent: Tensor | None = None) -> dict[str, Tensor]:
    """Output of `function(layer, factors)` and gradients of everything that is trained."""
    factors = {name: factor.detach().requires_grad_() for name, factor in factors.items()}
    hidden, weights = (tensor.detach().requires_grad_() for tensor in (layer.hidden, layer.weights))
    out = function(replace(layer, hidden=hidden, weights=weights), factors)
    cotangent = torch.ones_like(out) if cotangent is None else cotangent.to(out)
    gradients = torch.autograd.grad(out, [hidden, weights, *factors.values()], cotangent)
    return {"out": out.detach(), **dict(zip(("hidden", "weights", *factors), gradients, strict=True))}


def check(layer: Layer, dtype: torch.dtype, factors: dict[str, Tensor]) -> None:
    cotangent = torch.randn(layer.hidden.shape, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    actual = results(ours, layer.to(dtype), cast(factors, dtype), cotangent)
    exact = results(dense, layer.to(torch.float64), cast(factors, torch.float64), cotangent)
    baseline = results(dense, layer.to(dtype), cast(factors, dtype), cotangent)
    absolute = {name: factor.double().abs() for name, factor in factors.items()}
    absolute_dense = functools.partial(dense, absolute=True)
    size = results(absolute_dense, kernel_cases.absolute_layer(layer), absolute, cotangent.double().abs())
    rank = max([factor.shape[1] for name, factor in factors.items() if name.endswith("a")], default=0)
    merged = replace(layer, up_weight=layer.up_weight.abs() + 2 * rank)  # factors are below 2: bounds |B| @ |A|
    factor = kernel_cases.rounding(merged) + 4 * rank * torch.finfo(torch.float32).eps
    for name, value in actual.items():
        assert value.dtype == dtype
        assert value.is_contiguous()
        if dtype == torch.float64:
            value, bound = value.double(), factor * 2.0**-28 * size[name].nan_to_num(0.0) + 1e-300
            numerics.assert_within(value, exact[name], bound, name)
        else:
            assert_right(value, baseline[name], exact[name], size[name], factor, name)


def random_layer(tokens: int, experts: int, slots: int, hidden_size: int, width: int, form: str = "silu") -> Layer:
    case, spec = numerics._random_case(tokens, experts, slots, hidden_size, width), FORMS[form]
    up = case.gate_up if spec.gated else case.gate_up[:, :width]
    up, down = (w.transpose(1, 2).contiguous() if spec.transposed else w for w in (up, case.down))
    return Layer(case.hidden, case.index, case.weights, up, None, down, None, spec)


# Against float64


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("form", FORMS)
def test_equals_dense_weights_in_every_form(form, rank):
    layer = kernel_cases.layer("odd_sizes", form)
    check(layer, torch.float32, random_factors(layer, rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("routing", sorted(set(ROUTINGS) - {"nan_token"}))
def test_equals_dense_weights_in_every_routing(routing, dtype):
    layer = kernel_cases.layer(routing, "silu", bias=True)
    check(layer, dtype, random_factors(layer, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 16, 40])
@pytest.mark.parametrize("form", ["silu", "gpt_oss", "relu2_ungated"])
def test_as_good_as_plain_torch(form, rank, dtype):
    if form == "gpt_oss" and dtype in (torch.bfloat16, torch.float16) and rank > 3:
        pytest.skip("rounded pre-activations cross the clamp, where the gradient jumps")
    if form == "relu2_ungated" and dtype == torch.bfloat16 and rank == 1:
        pytest.skip("a low-rank row of one value is rounded once, where plain torch's W + BA averages 16 roundings")
    layer = kernel_cases.layer("balanced", form)
    check(layer, dtype, random_factors(layer, rank))


# sizes of tiles and tasks, and rows that several tasks of one expert share
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 9, 17, 33, 300])
def test_every_row_count(tokens, transposed, dtype):
    layer = random_layer(tokens, 3, 1, 68, 36, "gelu_transposed" if transposed else "silu")
    layer = replace(layer, index=torch.zeros_like(layer.index))
    check(layer, dtype, random_factors(layer, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["silu", "gelu_tanh_interleaved", "silu_ungated_transposed"])
@pytest.mark.parametrize("shape", [(33, 31), (130, 70), (600, 40)], ids=str)
def test_widths_that_fit_no_tile(shape, form, dtype):
    layer = random_layer(24, 3, 2, *shape, form)
    check(layer, dtype, random_factors(layer, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts", [1, 3, 16, 21, 40])
@pytest.mark.parametrize(("tokens", "rank"), [(3, 16), (60, 3), (60, 20)])
def test_factors_may_lie_as_peft_keeps_them(experts, tokens, rank, dtype):
    layer = random_layer(tokens, experts, min(experts, 3), 52, 36).to(dtype)
    factors = cast(random_factors(layer, rank), dtype)
    expected, actual = results(ours, layer, factors), results(ours, layer, as_peft_keeps(factors))
    for name, value in actual.items():
        if dtype in (torch.bfloat16, torch.float16):
            torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.05 * expected[name].abs().max().item())
        else:
            bound = 1e-4 if dtype == torch.float32 else 1e-12
            assert (value - expected[name]).abs().max() <= bound * expected[name].abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_alignment_do_not_matter(dtype):
    layer = random_layer(40, 4, 2, 64, 48).to(dtype)
    factors = cast(random_factors(layer, 6), dtype)
    expected = ours(layer, factors)
    odd = {}
    for name, factor in factors.items():
        room = torch.full((factor.numel() * 2 + 1,), float("nan"), dtype=dtype)
        odd[name] = room[1:].view(*factor.shape, 2)[..., 1].copy_(factor)
    for given in (odd, {name: factor.mT.contiguous().mT for name, factor in factors.items()}):
        tolerance = 0.02 if dtype in (torch.bfloat16, torch.float16) else 1e-5
        torch.testing.assert_close(ours(layer, given), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("pair", ["up", "down"])
@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_one_of_two_adapters(pair, form):
    layer = kernel_cases.layer("balanced", form)
    factors = random_factors(layer, 4)
    check(layer, torch.float32, {name: factor for name, factor in factors.items() if name.startswith(pair)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_adapters_it_is_the_frozen_layer_bit_by_bit(dtype):
    layer = random_layer(33, 4, 2, 64, 48).to(dtype)
    expected = results(lambda layer, _: cpu_experts(layer.call()), layer, {})
    actual = results(ours, layer, {})
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_up_and_down_may_have_different_ranks():
    layer = kernel_cases.layer("balanced", "silu")
    check(layer, torch.float32, random_factors(layer, 4, 19))


def test_zero_adapters_change_nothing():
    layer = kernel_cases.layer("balanced", "silu")
    factors = random_factors(layer, 4)
    factors |= {name: torch.zeros_like(factors[name]) for name in ("up_b", "down_b")}
    with torch.no_grad():
        assert torch.equal(ours(layer, factors), cpu_experts(layer.call()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_with_nan_spoils_no_other(dtype):
    layer = kernel_cases.layer("nan_token").to(dtype)
    out = ours(layer, cast(random_factors(layer, 4), dtype))
    assert out[3].isnan().all()
    assert out[[t for t in range(8) if t != 3]].isfinite().all()


# What is computed and kept


@functools.cache
def every_gradient() -> dict[str, Tensor]:
    layer = kernel_cases.layer("balanced", "gpt_oss")
    return results(ours, layer, random_factors(layer, 4))


@pytest.mark.parametrize("name", TRAINED)
def test_only_the_wanted_gradient_is_computed(name, monkeypatch):
    wanted = every_gradient()[name]
    layer = kernel_cases.layer("balanced", "gpt_oss")
    factors = random_factors(layer, 4)
    op, seen = torch.ops.hf_moe_cpu.experts_lora_backward, []
    original = op.default
    monkeypatch.setattr(op, "default", lambda *args: seen.append(original(*args)) or seen[-1])
    leaf = (factors | {"hidden": layer.hidden, "weights": layer.weights})[name].detach().requires_grad_()
    if name in FACTORS:
        ours(layer, factors | {name: leaf}).sum().backward()
    else:
        ours(replace(layer, **{name: leaf}), factors).sum().backward()
    assert torch.equal(leaf.grad, wanted)
    assert [gradient.numel() > 0 for gradient in seen[0]] == [other == name for other in TRAINED]


def test_saved_bytes_are_the_pre_activation_and_the_low_rank_rows():
    layer = kernel_cases.layer("balanced", "silu")
    factors = {name: factor.requires_grad_() for name, factor in random_factors(layer, 3, 4).items()}
    given = {t.data_ptr() for t in (*layer.tensors().values(), layer.index, *factors.values())}
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(layer, factors)
    N, P = layer.index.numel(), sizes(layer)[2]
    assert {tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in given} == {(N, P), (N, 3), (N, 4)}


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any torch operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_the_weights_size_ever_exists():
    layer = random_layer(4, 24, 2, 64, 48)
    factors = random_factors(layer, 2)
    leaves = {name: factor.requires_grad_() for name, factor in as_peft_keeps(factors).items()}
    with LargestResult() as largest:
        out = ours(layer, leaves)
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    assert 0 < largest.elements < min(layer.up_weight.numel(), layer.down_weight.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal_with_two_threads(dtype):
    layer = random_layer(96, 8, 3, 96, 160).to(dtype)
    factors = as_peft_keeps(cast(random_factors(layer, 7), dtype))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = [results(ours, layer, factors) for _ in range(6)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


# Errors


@pytest.mark.parametrize("bad", [6, -1, 2**40])
def test_an_id_out_of_range_is_an_error(bad):
    layer = kernel_cases.layer("balanced", "silu")
    index = layer.index.clone()
    index[5, 1] = bad
    with pytest.raises(IndexError, match=rf"expert id {bad} of token 5 is not in \[0, 5\)"):
        ours(replace(layer, index=index), random_factors(layer, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"up_b": f["up_b"][:, :, :2]}, r"up_a must be \[4, R, 16\] and up_b \[4, 48, R\] .*or both None"),
        (lambda f: {"down_a": None}, r"or both None, got None and \(4, 16, 4\)"),
        (lambda f: {"down_a": f["down_a"][0]}, r"down_a must be \[4, R, 24\]"),
        (lambda f: {"up_a": f["up_a"][:, :0], "up_b": f["up_b"][:, :, :0]}, "with R >= 1"),
        (lambda f: {"down_b": f["down_b"].half()}, "down_b must be torch.float32 like the hidden states"),
        (lambda f: {"up_a": f["up_a"].mT}, r"up_a must be \[4, R, 16\]"),
    ],
)
def test_wrong_factors_are_named(change, message):
    layer = kernel_cases.layer("balanced", "silu")
    factors = random_factors(layer, 4)
    with pytest.raises(ValueError, match=message):
        ours(layer, factors | change(factors))


@pytest.mark.parametrize("name", ["up_weight", "up_bias", "down_weight", "down_bias"])
def test_the_base_must_be_frozen(name):
    layer = kernel_cases.layer("balanced", "gpt_oss")
    factors = random_factors(layer, 4)
    layer = replace(layer, **{name: getattr(layer, name).requires_grad_()})
    with pytest.raises(ValueError, match=f"base under an adapter is frozen, but {name} requires grad: call"):
        ours(layer, factors)
    with torch.no_grad():
        assert ours(layer, factors).isfinite().all()


# The op as torch sees it


@pytest.mark.parametrize("missing", ["", "up", "down"])
def test_opcheck(missing):
    layer = kernel_cases.layer("balanced", "gpt_oss")
    factors = {n: f for n, f in random_factors(layer, 3).items() if not missing or not n.startswith(missing)}
    leaves = {name: factor.clone().requires_grad_() for name, factor in factors.items()}
    call = flatten(layer.call(kernel_cases.low_rank_of(factors, SCALES)))
    trained = flatten(layer.call(kernel_cases.low_rank_of(leaves, SCALES)))
    opcheck(torch.ops.hf_moe.cpu_experts_lora, (*trained, True))
    opcheck(torch.ops.hf_moe.cpu_experts_lora, (*call, False))
    out, *kept = torch.ops.hf_moe.cpu_experts_lora(*call, True)
    every = [True, True, *(name in factors for name in FACTORS)]
    for wants in (every, [False, False, *every[2:]], [True, False, False, False, False, False]):
        opcheck(torch.ops.hf_moe.cpu_experts_lora_backward, (torch.ones_like(out), *kept, *call, wants))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_the_same_results(backend):
    layer = kernel_cases.layer("balanced", "silu")
    factors = random_factors(layer, 4)
    compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=False)
    eager, actual = results(ours, layer, factors), results(compiled, layer, factors)
    assert all(torch.equal(actual[name], eager[name]) for name in eager)
