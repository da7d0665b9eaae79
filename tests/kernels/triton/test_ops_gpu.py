"""The ops on a GPU at the sizes of real layers: against float64, without a sync, in a CUDA graph, past 2^31 elements.

Shape suffixes: T tokens, K slots per token, E experts, H hidden, I expert width, P pre-activation width, R rank.
"""

import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

import kernel_cases
from hf_moe.kernels.layer_call import ExpertForm, LowRank, LowRankPair
from hf_moe.kernels.triton.ops import triton_experts, triton_experts_lora, triton_grouped_linear
from kernel_cases import Layer, assert_right
from numerics import assert_as_good_as

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gives_memory_back():
    """To the other processes of the same GPU."""
    yield
    torch.cuda.empty_cache()


SWIGLU = ExpertForm("silu")
GPT_OSS = ExpertForm("silu", 1.702, 7.0, 1.0, transposed=True, interleaved=True)


@dataclass(frozen=True)
class Model:
    hidden_size: int
    width: int
    num_experts: int
    slots: int
    form: ExpertForm = SWIGLU
    bias: bool = False


MODELS = {
    "qwen3_30b_a3b": Model(2048, 768, 128, 8),
    "olmoe_1b_7b": Model(2048, 1024, 64, 8),
    # fewer experts than these have: the float64 gradients of four processes must fit at once
    "mixtral_8x7b_half": Model(4096, 14336, 4, 2),
    "deepseek_v3_sixteenth": Model(7168, 2048, 16, 8),
    "gpt_oss_20b": Model(2880, 2880, 32, 4, GPT_OSS, bias=True),
    "ragged": Model(1000, 360, 24, 3, ExpertForm("gelu_tanh", interleaved=True), True),
}


def layer_of(model: Model, tokens: int, dtype: torch.dtype, seed: int = 0) -> Layer:
    """Random layer on the GPU; ids are skewed, so that experts have very different numbers of rows."""
    generator = torch.Generator("cuda").manual_seed(seed)
    E, H, width, form = model.num_experts, model.hidden_size, model.width, model.form
    P = 2 * width if form.gated else width

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype) * scale

    up_shape, down_shape = ((E, H, P), (E, width, H)) if form.transposed else ((E, P, H), (E, H, width))
    skew = torch.linspace(0, 3, E, device="cuda")
    scores = torch.rand(tokens, E, generator=generator, device="cuda") + skew * (seed % 2)
    weights, index = scores.topk(model.slots, dim=-1)
    return Layer(
        normal(tokens, H),
        index,
        weights.softmax(-1).to(dtype),
        normal(*up_shape, scale=1 / math.sqrt(H)),
        normal(E, P) if model.bias else None,
        normal(*down_shape, scale=1 / math.sqrt(width)),
        normal(E, H) if model.bias else None,
        form,
    )


def results(layer: Layer, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = layer.differentiable()
    out = triton_experts(leaves.call())
    gradients = torch.autograd.grad(out, list(leaves.tensors().values()), cotangent)
    return {"out": out.detach(), **dict(zip(leaves.tensors(), gradients, strict=True))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, 700, 4096])
@pytest.mark.parametrize("model", MODELS)
def test_output_and_gradients_are_as_good_as_plain_torch(model, tokens, dtype):
    layer = layer_of(MODELS[model], tokens, dtype, seed=tokens % 2)
    cotangent = torch.randn_like(layer.hidden)
    actual = results(layer, cotangent)
    again = results(layer, cotangent)
    assert all(torch.equal(actual[name], again[name]) for name in actual)
    del again
    baseline = kernel_cases.layer_results(layer, cotangent)
    exact = kernel_cases.layer_results(layer.to(torch.float64, "cuda"), cotangent)
    for name, value in actual.items():
        assert_as_good_as(value, baseline[name], exact.pop(name))


@pytest.mark.parametrize("model", ["ragged", "small"])
def test_float32_within_its_rounding_bound(model):
    model = MODELS.get(model, Model(512, 256, 8, 2))
    layer = layer_of(replace(model, num_experts=8), 300, torch.float32)
    cotangent = torch.randn_like(layer.hidden)
    actual = {name: value.cpu() for name, value in results(layer, cotangent).items()}
    layer, cotangent = layer.to(torch.float32, "cpu"), cotangent.cpu()
    exact = kernel_cases.layer_results(layer.to(torch.float64), cotangent)
    sizes, factor = kernel_cases.layer_sizes(layer, cotangent), kernel_cases.rounding(layer)
    for name, value in actual.items():
        assert_right(value, value, exact[name], sizes[name], factor, name)


@pytest.mark.parametrize("tokens", [1, 8, 17, 512])  # decode ends at 16, 8 and 8 tokens
@pytest.mark.parametrize("model", ["qwen3_30b_a3b", "gpt_oss_20b", "ragged"])
def test_inference_is_as_good_as_plain_torch(model, tokens):
    """Few rows take the decode kernels, more the sorted ones."""
    layer = layer_of(MODELS[model], tokens, torch.bfloat16)
    out = triton_experts(layer.call())
    exact = kernel_cases.plain_layer(layer.to(torch.float64, "cuda"))
    assert_as_good_as(out, kernel_cases.plain_layer(layer), exact)


def test_nothing_waits_for_the_gpu():
    layer = layer_of(MODELS["qwen3_30b_a3b"], 512, torch.bfloat16)
    few = layer_of(MODELS["qwen3_30b_a3b"], 4, torch.bfloat16)
    results(layer, layer.hidden)  # compiles
    triton_experts(few.call())
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(layer, layer.hidden)
        triton_experts(layer.call())
        triton_experts(few.call())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 8, 512])
def test_inference_in_a_cuda_graph_follows_new_inputs(tokens):
    model = MODELS["qwen3_30b_a3b"]
    layer, other = layer_of(model, tokens, torch.bfloat16, seed=0), layer_of(model, tokens, torch.bfloat16, seed=1)
    triton_experts(layer.call())  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_experts(layer.call())
    for name in ("hidden", "index", "weights"):
        getattr(layer, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(out, triton_experts(layer.call()))


def test_training_in_a_cuda_graph_follows_new_inputs():
    model = MODELS["olmoe_1b_7b"]
    layer, other = (layer_of(model, 512, torch.bfloat16, seed=seed) for seed in (0, 1))
    cotangent = torch.randn_like(layer.hidden)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # ids that are not there yet may be out of range
    with torch.cuda.stream(side):
        results(layer, cotangent)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(layer, cotangent)
    for name in ("hidden", "index", "weights"):
        getattr(layer, name).copy_(getattr(other, name))
    graph.replay()
    eager = results(layer, cotangent)
    assert all(torch.equal(captured[name], eager[name]) for name in eager)


def test_ids_out_of_range_stop_the_program():
    """A device assertion ends a process's use of the GPU, so another process makes it."""
    code = (
        "import torch; from hf_moe.kernels.triton.routing import sort_rows;"
        "sort_rows(torch.tensor([[0, 4]], device='cuda'), 4, 4);"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "assert" in done.stderr, done.stderr


@pytest.mark.parametrize("wrong", [-1, 128, 2**40])
def test_ids_out_of_range_make_a_token_nan_where_rows_are_few(wrong):
    layer = layer_of(MODELS["qwen3_30b_a3b"], 4, torch.bfloat16)
    right = triton_experts(layer.call())
    layer.index[2, 5] = wrong
    out = triton_experts(layer.call()._replace(num_ids=128))
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3]], right[[0, 1, 3]])


def test_weights_past_two_to_the_31_elements():
    experts, size = 160, 4096
    weight = torch.empty(experts, size, size, dtype=torch.bfloat16, device="cuda")
    weight[-1].normal_(std=1 / 64)
    assert weight.numel() > 2**31
    rows = torch.randn(64, size, dtype=torch.bfloat16, device="cuda")
    expert_end = torch.zeros(experts, dtype=torch.int32, device="cuda")
    expert_end[-1] = 64
    for transposed in (False, True):
        dense = weight[-1] if transposed else weight[-1].T
        out = triton_grouped_linear(rows, weight, None, expert_end, transposed)
        assert_as_good_as(out, rows @ dense, rows.double() @ dense.double())


def test_rows_past_two_to_the_31_elements():
    num_rows, size = 1_100_000, 2048
    rows = torch.zeros(num_rows, size, dtype=torch.bfloat16, device="cuda")
    rows[-500:].normal_()
    assert rows.numel() > 2**31
    weight = torch.randn(2, size, size, dtype=torch.bfloat16, device="cuda") / 45
    expert_end = torch.tensor([num_rows - 300, num_rows], dtype=torch.int32, device="cuda")
    out = triton_grouped_linear(rows, weight, None, expert_end, False)
    assert not out[:-500].any()
    for expert, part in ((0, slice(-500, -300)), (1, slice(-300, None))):
        dense = weight[expert].T
        assert_as_good_as(out[part], rows[part] @ dense, rows[part].double() @ dense.double())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one():
    layer = layer_of(MODELS["ragged"], 100, torch.bfloat16)
    wanted = results(layer, layer.hidden)
    elsewhere = layer.to(torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        actual = results(elsewhere, elsewhere.hidden)
    assert all(torch.equal(actual[name].to("cuda:0"), wanted[name]) for name in wanted)


# Adapters


def random_factors(layer: Layer, model: Model, rank: int) -> list[torch.Tensor]:
    E, H, width = model.num_experts, model.hidden_size, model.width
    P = 2 * width if model.form.gated else width
    shapes = ((E, rank, H), (E, P, rank), (E, rank, width), (E, H, rank))
    like = {"device": "cuda", "dtype": layer.hidden.dtype}
    return [torch.randn(shape, **like) / math.sqrt(max(shape)) for shape in shapes]


def merged(layer: Layer, factors: list[torch.Tensor], scale: float) -> Layer:
    up_a, up_b, down_a, down_b = factors
    additions = [scale * up_b @ up_a, scale * down_b @ down_a]
    if layer.form.transposed:
        additions = [addition.transpose(1, 2) for addition in additions]
    return replace(layer, up_weight=layer.up_weight + additions[0], down_weight=layer.down_weight + additions[1])


def lora_results(function, layer: Layer, factors: list, cotangent: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (layer.hidden, layer.weights, *factors)]
    out = function(replace(layer, hidden=leaves[0], weights=leaves[1]), leaves[2:])
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out))]


def adapted(layer: Layer, factors: list[torch.Tensor]) -> torch.Tensor:
    up_a, up_b, down_a, down_b = factors
    return triton_experts_lora(layer.call(LowRankPair(LowRank(up_a, up_b, 2.0), LowRank(down_a, down_b, 2.0))))


@pytest.mark.parametrize("rank", [8, 16, 24, 64])
@pytest.mark.parametrize("model", ["qwen3_30b_a3b", "gpt_oss_20b", "ragged"])
def test_adapters_are_as_good_as_dense_weights(model, rank):
    model = MODELS[model]
    layer = layer_of(model, 1024, torch.bfloat16)
    factors, cotangent = random_factors(layer, model, rank), torch.randn_like(layer.hidden)

    def dense(layer: Layer, factors: list) -> torch.Tensor:
        return kernel_cases.plain_layer(merged(layer, factors, 2.0))

    actual = lora_results(adapted, layer, factors, cotangent)
    baseline = lora_results(dense, layer, factors, cotangent)
    doubles = [factor.double() for factor in factors]
    exact = lora_results(dense, layer.to(torch.float64, "cuda"), doubles, cotangent)
    for ours, torchs, true in zip(actual, baseline, exact, strict=True):
        assert_as_good_as(ours, torchs, true)


def test_adapters_need_less_memory_than_one_dense_gradient():
    model = MODELS["qwen3_30b_a3b"]
    layer = layer_of(model, 1024, torch.bfloat16)
    factors, cotangent = random_factors(layer, model, 16), torch.randn_like(layer.hidden)
    lora_results(adapted, layer, factors, cotangent)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lora_results(adapted, layer, factors, cotangent)
    weight_bytes = layer.up_weight.numel() * layer.up_weight.element_size()
    assert torch.cuda.max_memory_allocated() - before < weight_bytes / 2
