"""Experts on the CPU against float64: every layout, activation and dtype over named routings, with every gradient."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import numerics
from hf_moe import reference
from hf_moe.kernels.cpu import cpu_experts, cpu_experts_lora, cpu_grouped_linear, unavailable_reason
from hf_moe.kernels.layer_call import ExpertForm, ExpertWeights, LayerCall, LowRank, LowRankPair, flatten
from numerics import ROUTINGS

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

NAMES = ("hidden", "weights", "up_weight", "up_bias", "down_weight", "down_bias")
INFINITE = math.inf


@dataclass(frozen=True)
class Layer:
    """Settings that distinguish the native families; the defaults are most models'."""

    activation: str = "silu"
    alpha: float = 1.0
    limit: float = INFINITE
    offset: float = 0.0
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False

    @property
    def form(self) -> ExpertForm:
        settings = (self.activation, self.alpha, self.limit, self.offset)
        return ExpertForm(*settings, self.gated, self.transposed, self.interleaved)


LAYERS = {
    "swiglu": Layer(),
    "gpt_oss": Layer("silu", 1.702, 7.0, 1.0, transposed=True, interleaved=True, bias=True),
    "small_clamp": Layer("silu", 1.0, 0.75, 0.5),
    "geglu_bias": Layer("gelu", bias=True),
    "geglu_tanh_transposed": Layer("gelu_tanh", transposed=True),
    "interleaved": Layer("silu", interleaved=True),
    "relu2_ungated": Layer("relu2", gated=False),
    "relu_ungated_transposed_bias": Layer("relu", gated=False, transposed=True, bias=True),
    "gelu_ungated": Layer("gelu", gated=False),
}


def arguments_of(case: numerics.ExpertsCase, layer: Layer) -> dict[str, Tensor | None]:
    """float32 arguments of the operator in the layer's layout; their values are exact in bfloat16."""
    experts, pre, hidden = case.gate_up.shape
    up, down = case.gate_up, case.down
    if not layer.gated:
        up = up[:, : pre // 2]
    generator = torch.Generator().manual_seed(1)
    up_bias = torch.randn(experts, up.shape[1], generator=generator).bfloat16().float() / 2
    down_bias = torch.randn(experts, hidden, generator=generator).bfloat16().float() / 2
    if layer.transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    return {
        "hidden": case.hidden,
        "weights": case.weights,
        "up_weight": up,
        "up_bias": up_bias if layer.bias else None,
        "down_weight": down,
        "down_bias": down_bias if layer.bias else None,
    }


def activate(pre_NP: Tensor, layer: Layer) -> Tensor:
    functions = {
        "silu": lambda x: x * torch.sigmoid(layer.alpha * x),
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
    }
    if not layer.gated:
        return functions[layer.activation](pre_NP)
    gate, up = (pre_NP[..., ::2], pre_NP[..., 1::2]) if layer.interleaved else pre_NP.chunk(2, -1)
    up = up.clamp(-layer.limit, layer.limit) + layer.offset
    return up * functions[layer.activation](gate.clamp(max=layer.limit))


def plain(arguments: dict[str, Tensor | None], index_TK: Tensor, layer: Layer) -> Tensor:
    """Plain torch, expert after expert, in the arguments' dtype; ids from E on are skipped."""
    hidden, weights, up, up_bias, down, down_bias = (arguments[name] for name in NAMES)
    out = torch.zeros_like(hidden)
    for expert in range(len(up)):
        token, slot = torch.where(index_TK == expert)
        pre = hidden[token] @ (up[expert] if layer.transposed else up[expert].T)
        act = activate(pre if up_bias is None else pre + up_bias[expert], layer)
        y = act @ (down[expert] if layer.transposed else down[expert].T)
        y = (y if down_bias is None else y + down_bias[expert]) * weights[token, slot, None].to(y.dtype)
        out = out.index_add(0, token, y)
    return out


def ours(arguments: dict[str, Tensor | None], index_TK: Tensor, layer: Layer) -> Tensor:
    hidden, weights, *experts = (arguments[name] for name in NAMES)
    return cpu_experts(LayerCall(hidden, index_TK, weights, ExpertWeights(*experts), len(experts[0]) + 1, layer.form))


def run(experts, arguments, index_TK, layer, dtype) -> dict[str, Tensor]:
    """The output and the gradients of `(output * cotangent).sum()`."""
    leaves = {
        name: None if value is None else value.detach().to(dtype).requires_grad_() for name, value in arguments.items()
    }
    out = experts(leaves, index_TK, layer)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(dtype)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(out, list(given.values()), cotangent)
    return {"out": out.detach(), **dict(zip(given, gradients, strict=True))}


def assert_close(actual: dict[str, Tensor], baseline: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """16-bit: at most twice plain torch's error. float32, float64: at most eight times, with a floor of rounding."""
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        if value.dtype in (torch.bfloat16, torch.float16):
            numerics.assert_as_good_as(value, baseline[name], exact[name])
            continue
        assert torch.equal(value.isnan(), exact[name].isnan()), name
        if not value.numel():
            continue
        largest = exact[name].nan_to_num(0.0).abs().max()
        error = (value.double() - exact[name]).nan_to_num(0.0).abs().max()
        # a sum of at most 64 products here, and activations within 4 units in the last place
        assert error <= 80 * torch.finfo(value.dtype).eps * largest + 1e-30, (name, error, largest)


def as_exact(case: numerics.ExpertsCase, layer: Layer, dtype: torch.dtype):
    arguments = arguments_of(case, layer)
    results = [run(ours, arguments, case.index, layer, dtype)]
    results += [run(plain, arguments, case.index, layer, kind) for kind in (dtype, torch.float64)]
    return results


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name != "nan_token"])
@pytest.mark.parametrize("layer", LAYERS)
def test_output_and_gradients_match_float64(layer, routing, dtype):
    if layer == "small_clamp" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("rounded pre-activations cross the clamp, where the gradient jumps")
    assert_close(*as_exact(ROUTINGS[routing](), LAYERS[layer], dtype))


def test_the_plain_torch_of_these_tests_agrees_with_the_reference():
    case = ROUTINGS["odd_sizes"]().to(torch.float64)
    arguments = {name: None if v is None else v.double() for name, v in arguments_of(case, Layer()).items()}
    expected = reference.experts(case.hidden, case.index, case.weights, case.gate_up, case.down)
    torch.testing.assert_close(plain(arguments, case.index, Layer()), expected)


# few rows are multiplied as they lie, from 5 on they are packed; 8, 16, 32 and 256 are sizes of tiles and tasks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 17, 33, 250, 300])
def test_every_row_count(tokens, transposed, dtype):
    case = numerics._random_case(tokens, 3, 1, hidden_size=68, width=36)
    case = replace(case, index=torch.zeros_like(case.index))
    assert_close(*as_exact(case, Layer(transposed=transposed, bias=True), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(8, 7), (33, 31), (130, 70), (64, 200)], ids=str)
@pytest.mark.parametrize("layer", ["swiglu", "gpt_oss", "interleaved"])
def test_widths_that_fit_no_tile(layer, sizes, dtype):
    case = numerics._random_case(24, 3, 2, hidden_size=sizes[0], width=sizes[1])
    assert_close(*as_exact(case, LAYERS[layer], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_with_nan_spoils_no_other(dtype):
    case = ROUTINGS["nan_token"]()
    arguments = {name: v if v is None else v.to(dtype) for name, v in arguments_of(case, Layer()).items()}
    out = ours(arguments, case.index, Layer())
    assert out[3].isnan().all()
    assert out[[t for t in range(8) if t != 3]].isfinite().all()


def test_routing_weights_may_be_float32_beside_bfloat16_rows():
    case = ROUTINGS["balanced"]()
    arguments = {name: v if v is None else v.bfloat16() for name, v in arguments_of(case, Layer()).items()}
    expected = ours(arguments, case.index, Layer())
    weights = arguments["weights"].float().requires_grad_()
    actual = ours({**arguments, "weights": weights}, case.index, Layer())
    assert torch.equal(actual, expected)
    actual.sum().backward()
    assert weights.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_strides_and_alignment_of_weights_do_not_matter(transposed, dtype):
    layer = Layer(transposed=transposed)
    case = numerics._random_case(40, 4, 2, hidden_size=64, width=48)
    arguments = {name: v if v is None else v.to(dtype) for name, v in arguments_of(case, layer).items()}
    expected = ours(arguments, case.index, layer)
    hidden_wide = torch.full((40, 100), math.nan, dtype=dtype)
    hidden_wide[:, 3:67] = arguments["hidden"]
    views = dict(arguments, hidden=hidden_wide[:, 3:67])
    for name in ("up_weight", "down_weight"):
        weight = arguments[name]
        room = torch.full((weight.numel() * 2 + 1,), math.nan, dtype=dtype)
        slices = room[1:].view(weight.shape[0], 2, *weight.shape[1:])[:, 1]  # unaligned, half of the experts' memory
        slices.copy_(weight)
        views[name] = slices
    assert torch.equal(ours(views, case.index, layer), expected)
    swapped = dict(arguments, up_weight=arguments["up_weight"].transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(ours(swapped, case.index, layer), expected)
    strided = dict(arguments, down_weight=torch.stack([arguments["down_weight"]] * 2, -1)[..., 0])
    torch.testing.assert_close(ours(strided, case.index, layer), expected)


@pytest.mark.parametrize("trained", [(), *[(name,) for name in NAMES]], ids=str)
def test_only_wanted_gradients_are_computed(trained, monkeypatch):
    case, layer = ROUTINGS["balanced"](), Layer(bias=True)
    arguments = arguments_of(case, layer)
    full = run(ours, arguments, case.index, layer, torch.float32)
    leaves = {name: v.clone().requires_grad_(name in trained) for name, v in arguments.items()}
    op, seen = torch.ops.hf_moe_cpu.experts_backward, []
    original = op.default
    monkeypatch.setattr(op, "default", lambda *args: seen.append(original(*args)) or seen[-1])
    out = ours(leaves, case.index, layer)
    assert out.requires_grad == bool(trained)
    if not trained:
        return
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    out.backward(cotangent)
    for name, gradient in zip(NAMES, seen[0], strict=True):
        assert (gradient.numel() > 0) == (name in trained), name
    for name in trained:
        assert torch.equal(leaves[name].grad, full[name]), name


def test_saves_hidden_and_pre_activations_only():
    case, layer = numerics._random_case(32, 4, 2, hidden_size=64, width=48), Layer()
    arguments = {name: v if v is None else v.requires_grad_() for name, v in arguments_of(case, layer).items()}
    given = {v.data_ptr() for v in (*arguments.values(), case.index) if v is not None}
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(arguments, case.index, layer)
    assert sum(nbytes for pointer, nbytes in saved.items() if pointer not in given) == 64 * 96 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal_with_two_threads(dtype):
    case, layer = numerics._random_case(96, 8, 3, hidden_size=96, width=160), Layer()
    arguments = arguments_of(case, layer)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = [run(ours, arguments, case.index, layer, dtype) for _ in range(6)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("bad", "num_ids"), [(4, 4), (5, 5), (-1, 5), (2**40, 5)])
def test_an_id_out_of_range_is_an_error(bad, num_ids):
    case = ROUTINGS["balanced"]()
    hidden, weights, up, _, down, _ = arguments_of(case, Layer()).values()
    index = case.index.clone()
    index[5, 1] = bad
    with pytest.raises(IndexError, match=rf"expert id {bad} of token 5 is not in \[0, {num_ids}\)"):
        cpu_experts(
            LayerCall(hidden, index, weights, ExpertWeights(up, None, down, None), num_ids, ExpertForm("silu"))
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_weight": torch.zeros(4, 48, 17)}, r"up_weight must have shape \(4, 48, 16\), got \(4, 48, 17\)"),
        ({"down_weight": torch.zeros(4, 16, 24).double()}, "down_weight must be torch.float32"),
        ({"up_bias": torch.zeros(4, 47)}, r"up_bias must have shape \(4, 48\)"),
        ({"weights": torch.zeros(16, 3)}, r"index must have shape \(16, 3\)"),
        ({"hidden": torch.zeros(16, 16, dtype=torch.int32)}, "hidden states must be float32"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    case = ROUTINGS["balanced"]()
    with pytest.raises(ValueError, match=message):
        ours({**arguments_of(case, Layer()), **change}, case.index, Layer())


def test_an_unknown_activation_is_an_error():
    case = ROUTINGS["balanced"]()
    with pytest.raises(ValueError, match=r"activation must be one of silu, gelu.*'mish'"):
        ours(arguments_of(case, Layer()), case.index, Layer("mish"))


def calls_of_every_operator(hidden: int, width: int, transposed: bool):
    """Each public operator, forward and backward, on two experts with matrices of these sizes."""
    E, T, K, R = 2, 3, 1, 2

    def weights(out: int, inner: int):
        return torch.zeros((E, inner, out) if transposed else (E, out, inner))

    experts = ExpertWeights(weights(2 * width, hidden), None, weights(hidden, width), None)
    up_factors = LowRank(torch.zeros(E, R, hidden), torch.zeros(E, 2 * width, R), 1.0)
    factors = LowRankPair(up_factors, LowRank(torch.zeros(E, R, width), torch.zeros(E, hidden, R), 1.0))
    routing = torch.zeros(T, K, dtype=torch.int64), torch.ones(T, K)
    call = LayerCall(torch.zeros(T, hidden), *routing, experts, E, ExpertForm("silu", transposed=transposed))
    adapted = call._replace(low_rank=factors)
    pre, low = torch.zeros(T * K, 2 * width), torch.zeros(T * K, R)
    grad, ends = torch.zeros(T, hidden), torch.tensor([1, 3], dtype=torch.int32)
    ops = torch.ops.hf_moe
    dense_wants, lora_wants = [True, True, True, False, True, False], [True] * 6
    yield lambda: cpu_experts(call)
    yield lambda: ops.cpu_experts_backward(grad, pre, *flatten(call), dense_wants)
    yield lambda: cpu_experts_lora(adapted)
    yield lambda: ops.cpu_experts_lora_backward(grad, pre, low, low, *flatten(adapted), lora_wants)
    rows = torch.zeros(T, width)
    yield lambda: cpu_grouped_linear(rows, experts.down, None, ends, transposed)
    yield lambda: ops.cpu_grouped_linear_backward(grad, rows, experts.down, ends, transposed, [True] * 3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(0, 8), (8, 0)])
def test_matrices_without_rows_or_columns_are_an_error(hidden, width, transposed):
    """They used to end the process in a division by zero."""
    for call in calls_of_every_operator(hidden, width, transposed):
        with pytest.raises(ValueError, match=r"must have at least one row and one column, got .*0.* of at least 1"):
            call()
    for call in calls_of_every_operator(8, 8, transposed):
        call()
