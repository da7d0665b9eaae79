"""The differentiable ops of a layer: outputs and every gradient against float64, and what they keep and compute."""

import functools
from dataclasses import replace

import pytest
import torch

import kernel_cases
from hf_moe.kernels.layer_call import flatten
from hf_moe.kernels.triton import layer as layer_steps
from hf_moe.kernels.triton import ops, routing
from hf_moe.kernels.triton.hybrid import triton_hybrid_experts
from hf_moe.kernels.triton.ops import triton_experts, triton_grouped_linear
from hf_moe.kernels.triton.routing import require_gpu, size_of_maps
from kernel_cases import DTYPES, FORMS, Layer, assert_right
from numerics import ROUTINGS

# each routing with one form; every form runs on odd sizes and sentinels besides
PAIRS = list(zip(ROUTINGS, 2 * list(FORMS), strict=False))
PAIRS += [("odd_sizes", form) for form in FORMS] + [("sentinels", "gpt_oss"), ("sentinels", "relu2_ungated")]


def run(layer: Layer, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of every tensor."""
    leaves = layer.differentiable()
    out = triton_experts(leaves.call())
    gradients = torch.autograd.grad(out, list(leaves.tensors().values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves.tensors(), gradients, strict=True))}


def check(layer: Layer, dtype: torch.dtype, device):
    cotangent = torch.randn(layer.hidden.shape).bfloat16().float()
    actual = run(layer.to(dtype, device), cotangent.to(device, dtype))
    exact = kernel_cases.layer_results(layer.to(torch.float64), cotangent)
    baseline = kernel_cases.layer_results(layer.to(dtype), cotangent)
    sizes, factor = kernel_cases.layer_sizes(layer, cotangent), kernel_cases.rounding(layer)
    for name, value in actual.items():
        assert value.dtype == dtype
        assert_right(value.cpu(), baseline[name], exact[name], sizes[name], factor, name)


@pytest.mark.parametrize(("routing", "form"), sorted(set(PAIRS) - {("nan_token", dict(PAIRS)["nan_token"])}))
def test_output_and_gradients_match_float64(routing, form, device):
    check(kernel_cases.layer(routing, form), torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_are_as_good_as_plain_torch(form, dtype, device):
    check(kernel_cases.layer("balanced", form), dtype, device)


def test_nan_stays_in_its_token(device):
    layer = kernel_cases.layer("nan_token", "silu").to(torch.float32, device)
    results = run(layer, torch.ones_like(layer.hidden))
    for name in ("out", "hidden"):
        assert torch.equal(results[name].isnan().any(1), layer.hidden.isnan().any(1))


@pytest.mark.parametrize("op", [triton_experts, triton_hybrid_experts])
def test_a_token_with_a_wrong_id_is_nan_where_assertions_are_off(op, monkeypatch, device):
    monkeypatch.setattr(routing, "_require_ids", lambda *arguments: None)
    monkeypatch.setattr(ops, "DECODE_ROWS_PER_EXPERT", 0)
    layer = kernel_cases.layer("sentinels", "gpt_oss").to(torch.float32, device)
    index = layer.index.clone()
    index[2, 1], index[5, 0] = -1, 1 << 40
    wrong = torch.isin(torch.arange(len(index), device=device), torch.tensor([2, 5], device=device))
    assert torch.equal(op(replace(layer, index=index).call()).isnan(), wrong[:, None].expand_as(layer.hidden))


@pytest.mark.parametrize("op", [triton_experts, triton_hybrid_experts])
def test_ids_and_weights_may_be_a_column_of_more(op, device):
    layer = kernel_cases.layer("one_expert_takes_all", "gpt_oss").to(torch.float32, device)
    index = (layer.index + torch.arange(len(layer.index), device=device)[:, None]) % 4
    results = []
    for columns in ((index, layer.weights), (index.repeat(1, 3)[:, :1], kernel_cases.amid_nan(layer.weights))):
        leaves = replace(layer, index=columns[0], weights=columns[1]).differentiable()
        out = op(leaves.call())
        results.append([out, *torch.autograd.grad(out.sum(), list(leaves.tensors().values()))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_weights_of_routing_may_be_float32_under_16_bit_rows(device):
    layer = kernel_cases.layer("balanced", "silu").to(torch.bfloat16, device)
    layer = replace(layer, weights=layer.weights.float())
    results = run(layer, torch.ones_like(layer.hidden))
    assert results["weights"].dtype == torch.float32
    narrow = run(replace(layer, weights=layer.weights.bfloat16()), torch.ones_like(layer.hidden))
    assert torch.equal(results["out"], narrow["out"])


@pytest.mark.parametrize("form", ["silu", "gpt_oss"])
def test_results_repeat_bit_by_bit(form, device):
    layer = kernel_cases.layer("sentinels", form).to(torch.float32, device)
    first, second = (run(layer, torch.ones_like(layer.hidden)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# What is computed and kept


def counted(monkeypatch, module, name: str) -> list[dict]:
    """Keyword arguments of every call of a launcher, which still runs."""
    calls, launch = [], getattr(module, name)

    def record(*args, **kwargs):
        calls.append(kwargs)
        return launch(*args, **kwargs)

    monkeypatch.setattr(module, name, record)
    return calls


@functools.cache
def every_gradient(device) -> dict[str, torch.Tensor]:
    layer = kernel_cases.layer("balanced", "gpt_oss").to(torch.float32, device)
    return run(layer, torch.ones_like(layer.hidden))


@pytest.mark.parametrize("name", ["hidden", "weights", "up_weight", "up_bias", "down_weight", "down_bias"])
def test_only_the_wanted_gradient_is_computed(name, monkeypatch, device):
    layer = kernel_cases.layer("balanced", "gpt_oss").to(torch.float32, device)
    wanted = every_gradient(device)[name]
    products = counted(monkeypatch, layer_steps, "launch_weight_gradient")
    sums = counted(monkeypatch, layer_steps, "launch_bias_gradient")
    leaf = getattr(layer, name).detach().requires_grad_()
    triton_experts(replace(layer, **{name: leaf}).call()).sum().backward()
    assert torch.equal(leaf.grad, wanted)
    assert len(products) == name.endswith("_weight")
    assert len(sums) == name.endswith("_bias")


def test_inference_keeps_nothing(monkeypatch, device):
    monkeypatch.setattr(ops, "DECODE_ROWS_PER_EXPERT", 0)
    layer = kernel_cases.layer("balanced", "silu").to(torch.float32, device)
    wanted = run(layer, torch.ones_like(layer.hidden))["out"]
    calls = counted(monkeypatch, ops, "launch_up")
    assert torch.equal(triton_experts(layer.call()), wanted)
    with torch.no_grad():
        assert torch.equal(triton_experts(layer.differentiable().call()), wanted)
    assert [call["store_pre"] for call in calls] == [False, False]


def test_few_rows_without_gradients_take_the_decode_kernels(monkeypatch, device):
    monkeypatch.setattr(ops, "DECODE_ROWS_PER_EXPERT", 6)
    calls = counted(monkeypatch, ops, "launch_decode")
    layer = kernel_cases.layer("sentinels", "gpt_oss").to(torch.float32, device)
    assert layer.index.numel() == 6 * layer.up_weight.shape[0]
    out = triton_experts(layer.call())
    assert len(calls) == 1
    torch.testing.assert_close(out, run(layer, torch.ones_like(layer.hidden))["out"])
    many = replace(layer, hidden=layer.hidden.repeat(4, 1), index=layer.index.repeat(4, 1))
    triton_experts(replace(many, weights=layer.weights.repeat(4, 1)).call())
    assert len(calls) == 1


def test_saved_are_the_arguments_the_order_and_the_pre_activation(device):
    layer = kernel_cases.layer("balanced", "gpt_oss").to(torch.float32, device).differentiable()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        triton_experts(layer.call())
    arguments = {tensor.data_ptr() for tensor in (layer.index, *layer.tensors().values())}
    new = [tensor for tensor in saved if tensor.data_ptr() not in arguments]
    (N, E), P = (layer.index.numel(), layer.num_experts), layer.up_weight.shape[2]
    assert sorted((tuple(tensor.shape), tensor.dtype) for tensor in new) == sorted(
        [((N, P), torch.float32), *(((size,), torch.int32) for size in (N, E, size_of_maps(N, E)))],
        key=lambda pair: pair[0],
    )


# The ops as torch sees them


def few_tokens(device) -> Layer:
    layer = kernel_cases.layer("balanced", "gpt_oss").to(torch.float32, device)
    return replace(layer, hidden=layer.hidden[:3], index=layer.index[:3], weights=layer.weights[:3])


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_of_the_forward(keep, device):
    layer = few_tokens(device)
    layer = layer.differentiable() if keep else layer
    torch.library.opcheck(torch.ops.hf_moe.triton_experts, (*flatten(layer.call()), keep))


def test_opcheck_of_the_backward(device):
    layer = few_tokens(device)
    _, pre, *order = torch.ops.hf_moe.triton_experts(*flatten(layer.call()), True)
    for wants in ([True] * 6, [True, False, False, True, True, False]):
        arguments = (torch.ones_like(layer.hidden), pre, *order, *flatten(layer.call()), wants)
        torch.library.opcheck(torch.ops.hf_moe.triton_experts_backward, arguments)


def test_gradient_of_an_op_that_kept_nothing_raises(device):
    layer = kernel_cases.layer("balanced", "silu").to(torch.float32, device).differentiable()
    with pytest.raises(RuntimeError, match="keeps nothing for backward with keep=False"):
        torch.ops.hf_moe.triton_experts(*flatten(layer.call()), False)[0].sum().backward()


def test_compiles_whole_with_the_same_results(device):
    layer = kernel_cases.layer("balanced", "gpt_oss").to(torch.float32, device)
    eager = run(layer, torch.ones_like(layer.hidden))
    leaves = layer.differentiable()
    compiled = torch.compile(triton_experts, fullgraph=True, backend="aot_eager")
    out = compiled(leaves.call())
    out.sum().backward()
    assert torch.equal(out, eager["out"])
    for name, tensor in leaves.tensors().items():
        assert torch.equal(tensor.grad, eager[name])
    with torch.no_grad():
        torch.testing.assert_close(compiled(layer.call()), eager["out"])


def test_gradients_through_a_checkpoint(device):
    layer = kernel_cases.layer("balanced", "silu").to(torch.float32, device)
    wanted, leaves = run(layer, torch.ones_like(layer.hidden)), layer.differentiable()
    torch.utils.checkpoint.checkpoint(triton_experts, leaves.call(), use_reentrant=False).sum().backward()
    for name, tensor in leaves.tensors().items():
        assert torch.equal(tensor.grad, wanted[name])


# Refusals


def test_errors_name_value_rule_and_way_out(interpreter):
    layer = kernel_cases.layer("sentinels", "silu")
    call, (up, _, down, *_) = layer.call(), layer.call().experts
    with pytest.raises(ValueError, match=r"one dtype, got hidden bfloat16, up_weight float32.*Cast"):
        triton_experts(call._replace(hidden_TH=layer.hidden.bfloat16()))
    with pytest.raises(ValueError, match=r"\(4, 48, 16\) and \(4, 16, 24\) do not fit hidden size 16, gated=False"):
        triton_experts(call._replace(form=layer.form._replace(gated=False)))
    with pytest.raises(ValueError, match=r"index \[T, K\] and weights \[T, K\] are needed"):
        triton_experts(call._replace(index_TK=layer.index[:, :1]))
    for keep in (True, False):
        with pytest.raises(IndexError, match=r"expert ids must be in \[0, 4\), got 4"):
            triton_experts(call._replace(hidden_TH=layer.hidden.clone().requires_grad_(keep), num_ids=4))
    with pytest.raises(ValueError, match=r"activation must be one of silu.*got 'mish'"):
        triton_experts(call._replace(form=layer.form._replace(activation="mish")))
    experts = call.experts._replace(up=up[..., :0], down=down[:, :0])
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0: give the layer one"):
        triton_experts(call._replace(hidden_TH=layer.hidden[:, :0], experts=experts))
    spread = torch.empty(7168, 2048, 256, device="meta").permute(2, 0, 1)  # experts innermost
    with pytest.raises(ValueError, match=r"a matrix of down_weight may be spread over 2\^31 elements at most, got 37"):
        layer_steps.require_span(up_weight=spread[:, :2], down_weight=spread)
    with pytest.raises(ValueError, match="expert_width must be at least 1, got 0"):
        triton_experts(call._replace(experts=call.experts._replace(up=up[:, :0], down=down[..., :0])))


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(RuntimeError, match="need tensors on a GPU"):
        triton_experts(kernel_cases.layer("balanced", "silu").call())
    with pytest.raises(RuntimeError, match="need tensors on a GPU"):
        require_gpu(torch.zeros(1))


# One linear map


def linear_case(transposed: bool, dtype: torch.dtype, device) -> list[torch.Tensor]:
    """rows [11, 20], weight, bias of 3 experts (one of them empty) and the ends; the last 2 rows are no expert's."""
    shape = (3, 20, 12) if transposed else (3, 12, 20)
    tensors = [torch.randn(11, 20), torch.randn(shape), torch.randn(3, 12)]
    tensors = [tensor.bfloat16().to(device, dtype).requires_grad_() for tensor in tensors]
    return [*tensors, torch.tensor([4, 4, 9], dtype=torch.int32, device=device)]


def plain_linear(rows, weight, bias, expert_end, transposed) -> torch.Tensor:
    parts, start = [], 0
    for expert, end in enumerate(expert_end.tolist()):
        parts.append(rows[start:end] @ (weight[expert] if transposed else weight[expert].T) + bias[expert])
        start = end
    return torch.cat([*parts, rows.new_zeros(len(rows) - start, bias.shape[1])])


def linear_results(function, rows, weight, bias, expert_end, transposed, dtype) -> list[torch.Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (rows, weight, bias)]
    out = function(*leaves, expert_end, transposed)
    cotangent = torch.arange(out.numel()).view(out.shape).remainder(7).sub(3).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_and_gradients_match_float64(transposed, dtype, device):
    case = linear_case(transposed, dtype, device)
    actual = linear_results(triton_grouped_linear, *case, transposed, dtype)
    baseline = linear_results(plain_linear, *case, transposed, dtype)
    exact = linear_results(plain_linear, *case, transposed, torch.float64)
    for ours, torchs, true in zip(actual, baseline, exact, strict=True):
        size = torch.full_like(true, 20 * 3 * 4 * 4)  # terms times the largest factors
        ours, torchs, true, size = (tensor.cpu() for tensor in (ours, torchs, true, size))
        assert_right(ours, torchs, true, size, torch.finfo(torch.float32).eps)


def test_linear_computes_wanted_gradients_only(monkeypatch, device):
    products = counted(monkeypatch, layer_steps, "launch_weight_gradient")
    rows, weight, _, expert_end = linear_case(False, torch.float32, device)
    triton_grouped_linear(rows, weight.detach(), None, expert_end, False).sum().backward()
    assert rows.grad is not None
    assert not products


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_the_linear_ops(transposed, device):
    case = linear_case(transposed, torch.float32, device)
    torch.library.opcheck(torch.ops.hf_moe.triton_grouped_linear, (*case, transposed))
    rows, weight, _, expert_end = (tensor.detach() for tensor in case)
    arguments = (torch.ones(11, 12, device=device), rows, weight, expert_end, transposed, [True, True, True])
    torch.library.opcheck(torch.ops.hf_moe.triton_grouped_linear_backward, arguments)


def test_linear_compiles_whole(device):
    case = linear_case(False, torch.float32, device)
    compiled = torch.compile(triton_grouped_linear, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        linear_results(compiled, *case, False, torch.float32),
        linear_results(triton_grouped_linear, *case, False, torch.float32),
        strict=True,
    ):
        assert torch.equal(ours, eager)


def test_linear_errors(device):
    rows, weight, bias, expert_end = linear_case(False, torch.float32, device)
    with pytest.raises(ValueError, match=r"expert_end must be int32, got torch.int64: convert it with .int()"):
        triton_grouped_linear(rows, weight, bias, expert_end.long(), False)
    with pytest.raises(ValueError, match=r"with transposed=True do not fit"):
        triton_grouped_linear(rows, weight, bias, expert_end, True)
    with pytest.raises(ValueError, match="inner_width must be at least 1, got 0"):
        triton_grouped_linear(rows[:, :0], weight[..., :0], bias, expert_end, False)
    with pytest.raises(ValueError, match="outer_width must be at least 1, got 0"):
        triton_grouped_linear(rows, weight[:, :0], None, expert_end, False)
