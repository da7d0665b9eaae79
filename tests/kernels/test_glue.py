"""The steps between torch's grouped products, and the layer made of them, against float64.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated).
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernel_cases
from hf_moe.kernels import glue
from hf_moe.kernels.layer import Gate
from hf_moe.kernels.routing import RowOrder, TileMap, sort_rows
from kernel_cases import DTYPES, GATES, Layer, assert_right
from numerics import ROUTINGS

NAN = float("nan")
EPS = torch.finfo(torch.float32).eps
# each routing with one gate; every gate runs with sentinels besides
PAIRS = sorted({*zip(ROUTINGS, 2 * list(GATES), strict=False), *(("sentinels", gate) for gate in GATES)})
PAIRS.remove(next(pair for pair in PAIRS if pair[0] == "nan_token"))


# The steps


def order_of(case: Layer) -> RowOrder:
    return sort_rows(case.index, case.num_experts, case.num_experts + 1)


def poisoned(rows: Tensor, order: RowOrder) -> Tensor:
    """Rows past the last expert's end hold NaN, as a product leaves them unwritten."""
    return torch.cat([rows[: order.expert_end_E[-1]], torch.full_like(rows[order.expert_end_E[-1] :], NAN)])


def gate_of(case: Layer) -> Gate:
    return Gate(**case.gate.options(*Gate._fields))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["sentinels", "odd_sizes", "no_tokens"])
def test_gather_copies_rows_and_zeroes_those_of_no_expert(routing, dtype, device):
    case = kernel_cases.layer(routing).to(dtype, device)
    order, top_k = order_of(case), case.index.shape[1]
    rows_NH = glue.launch_gather_rows(case.hidden, order, top_k)
    expected = case.hidden[order.order_N.long() // top_k]
    expected[order.expert_end_E[-1] :] = 0
    assert torch.equal(rows_NH, expected)
    strided = case.hidden.T.contiguous().T
    assert torch.equal(glue.launch_gather_rows(strided, order, top_k), expected)


@pytest.mark.parametrize("routing", ["sentinels", "odd_sizes", "no_tokens"])
def test_row_of_slot_inverts_the_order(routing, device):
    case = kernel_cases.layer(routing).to(torch.float32, device)
    order = order_of(case)
    expected = torch.full_like(order.order_N, -1)
    end = int(order.expert_end_E[-1])
    expected[order.order_N[:end].long()] = torch.arange(end, dtype=torch.int32, device=device)
    assert torch.equal(glue.launch_row_of_slot(order), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted_biased"])
@pytest.mark.parametrize("routing", ["sentinels", "odd_sizes", "repeated_indices", "no_tokens"])
def test_combine_matches_float64(routing, weighted, dtype, device):
    case = kernel_cases.layer(routing, bias=True).to(dtype, device)
    order, (tokens, top_k) = order_of(case), case.index.shape
    slots_NH = torch.randn(tokens * top_k, case.hidden.shape[1]).to(device, dtype)
    options = {"weights_TK": case.weights, "index_TK": case.index, "bias": case.down_bias} if weighted else {}
    rows_NH = poisoned(slots_NH[order.order_N.long()], order)
    actual = glue.launch_combine_rows(rows_NH, glue.launch_row_of_slot(order), top_k, **options)

    def plain(to: torch.dtype, absolute: bool = False) -> Tensor:
        values, bias, weights = (x.to(to) for x in (slots_NH, case.down_bias, case.weights.reshape(-1, 1)))
        if absolute:
            values, bias, weights = values.abs(), bias.abs(), weights.abs()
        if weighted:
            values = (values + bias[case.index.reshape(-1).clamp(max=len(bias) - 1)]) * weights
        values = values.masked_fill(case.index.reshape(-1, 1) == case.num_experts, 0.0)
        return values.view(tokens, top_k, values.shape[1]).sum(1)

    assert_right(actual, plain(dtype), plain(torch.float64), plain(torch.float64, absolute=True), (top_k + 3) * EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_activation_matches_float64_and_keeps_the_biased_product(gate, dtype, device):
    case = kernel_cases.layer("sentinels", gate).to(dtype, device)
    order, end = order_of(case), int(order_of(case).expert_end_E[-1])
    P = case.up_weight.shape[2 if case.gate.transposed else 1]
    product_NP = torch.randn(case.index.numel(), P).to(device, dtype)
    pre_NP = poisoned(product_NP, order)
    act_NI = glue.launch_activation(pre_NP, order, gate_of(case), case.up_bias)
    expert_N = case.index.reshape(-1)[order.order_N.long()][:end]

    def plain(to: torch.dtype, absolute: bool = False) -> tuple[Tensor, Tensor]:
        pre = product_NP[:end].to(to)
        bias = 0 if case.up_bias is None else case.up_bias[expert_N].to(to)
        pre = pre.abs() + abs(bias) if absolute else pre + bias
        return pre, kernel_cases.activate(pre, case.gate, absolute)

    baseline, exact, sizes = plain(dtype), plain(torch.float64), plain(torch.float64, absolute=True)
    for i, actual in enumerate((pre_NP, act_NI)):
        assert not actual[end:].any()
        assert_right(actual[:end], baseline[i], exact[i], sizes[i], 40 * EPS)


# The layer


def test_programs_may_run_in_any_order(monkeypatch, device):
    """No tile writes rows of another."""
    case = kernel_cases.layer("sentinels", "gpt_oss").to(torch.float32, device)
    forwards, tiles = run(case, torch.ones_like(case.hidden)), glue.tile_map
    monkeypatch.setattr(glue, "tile_map", lambda *args: TileMap(*(part.flip(0) for part in tiles(*args))))
    backwards = run(case, torch.ones_like(case.hidden))
    assert all(torch.equal(backwards[name], forwards[name]) for name in forwards)


def run(case: Layer, cotangent: Tensor) -> dict[str, Tensor]:
    """Output and gradients of every tensor."""
    leaves = case.differentiable()
    out = glue.triton_hybrid_experts(*leaves.arguments())
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


@pytest.mark.parametrize(("routing", "gate"), PAIRS)
def test_output_and_gradients_match_float64(routing, gate, device):
    check(kernel_cases.layer(routing, gate), torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_output_and_gradients_are_as_good_as_plain_torch(gate, dtype, device):
    check(kernel_cases.layer("last_expert_empty", gate), dtype, device)


def test_nan_stays_in_its_token(device):
    case = kernel_cases.layer("nan_token").to(torch.float32, device)
    results = run(case, torch.ones_like(case.hidden))
    for name in ("out", "hidden"):
        assert torch.equal(results[name].isnan().any(1), case.hidden.isnan().any(1))


@pytest.mark.parametrize("name", ["hidden", "weights", "up_weight", "up_bias", "down_weight", "down_bias"])
def test_only_the_wanted_gradient_is_computed(name, monkeypatch, device):
    case = kernel_cases.layer("sentinels", "gpt_oss").to(torch.float32, device)
    wanted = run(case, torch.ones_like(case.hidden))[name]
    products, outer = [], glue._outer_product
    monkeypatch.setattr(glue, "_outer_product", lambda *args: products.append(args) or outer(*args))
    leaf = getattr(case, name).detach().requires_grad_()
    glue.triton_hybrid_experts(*replace(case, **{name: leaf}).arguments()).sum().backward()
    assert torch.equal(leaf.grad, wanted)
    assert len(products) == name.endswith("_weight")


def test_saved_are_the_arguments_the_order_and_the_pre_activation(device):
    case = kernel_cases.layer("balanced", "gpt_oss").to(torch.float32, device).differentiable()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        glue.triton_hybrid_experts(*case.arguments())
    arguments = {tensor.data_ptr() for tensor in case.tensors().values()}
    new = {tuple(tensor.shape): tensor.dtype for tensor in saved if tensor.data_ptr() not in arguments}
    N, E, P = case.index.numel(), case.num_experts, case.up_weight.shape[2]
    assert new == {(N, P): torch.float32, (N,): torch.int32, (E,): torch.int32}


def test_same_bits_from_run_to_run(device):
    case = kernel_cases.layer("repeated_indices", "gpt_oss").to(torch.bfloat16, device)
    first, second = (run(case, torch.ones_like(case.hidden)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def op_arguments(case: Layer, keep: bool) -> tuple:
    arguments = case.arguments()
    return (*arguments[:8], keep, *arguments[8:])


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_of_the_forward(keep, device):
    case = kernel_cases.layer("sentinels", "gpt_oss").to(torch.float32, device)
    case = case.differentiable() if keep else case
    torch.library.opcheck(torch.ops.hf_moe.triton_hybrid_experts, op_arguments(case, keep))


def test_opcheck_of_the_backward(device):
    case = kernel_cases.layer("sentinels", "gpt_oss").to(torch.float32, device)
    _, pre, *order = torch.ops.hf_moe.triton_hybrid_experts(*op_arguments(case, True))
    saved = (case.hidden, case.weights, case.up_weight, case.down_weight, case.down_bias, pre, *order)
    for wants in ([True] * 6, [False, True, True, False, False, True]):
        arguments = (torch.ones_like(case.hidden), *saved, wants, *case.arguments()[8:])
        torch.library.opcheck(torch.ops.hf_moe.triton_hybrid_experts_backward, arguments)


def test_compiles_whole_with_the_same_results(device):
    case = kernel_cases.layer("balanced", "gpt_oss").to(torch.float32, device)
    eager, leaves = run(case, torch.ones_like(case.hidden)), case.differentiable()
    compiled = torch.compile(glue.triton_hybrid_experts, fullgraph=True, backend="aot_eager")
    out = compiled(*leaves.arguments())
    out.sum().backward()
    assert torch.equal(out, eager["out"])
    for name, tensor in leaves.tensors().items():
        assert torch.equal(tensor.grad, eager[name])


def test_rows_that_the_product_refuses_are_an_error_with_a_way_out(device):
    case = kernel_cases.layer("odd_sizes").to(torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"multiples of 8 in torch.bfloat16, got up_weight of shape \(5, 24, 20\)"):
        glue.triton_hybrid_experts(*case.arguments())


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["silu", "gpt_oss"])
def test_real_size(gate, device):
    """A layer of Mixtral's kind, narrow, an expert without rows and sentinels; every gradient."""
    generator = torch.Generator().manual_seed(0)
    E, H, width, tokens, spec = 8, 1024, 1536, 2048, GATES[gate]

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
