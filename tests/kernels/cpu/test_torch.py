"""The CPU operators under opcheck, torch.compile and gradient checkpointing; the grouped linear."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from hf_moe.kernels.cpu import cpu_experts, cpu_grouped_linear, unavailable_reason
from hf_moe.kernels.cpu import ops as cpu_ops
from hf_moe.kernels.cpu.build import load_kernels
from hf_moe.kernels.layer_call import DENSE_ADAPTED_CALL, DENSE_CALL, ExpertForm, ExpertWeights, LayerCall, flatten

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_call(dtype=torch.float32, tokens=12, requires_grad=True) -> LayerCall:
    hidden, weights = torch.randn(tokens, 32), torch.rand(tokens, 2)
    up, down = torch.randn(4, 48, 32) / 6, torch.randn(4, 32, 24) / 5
    index = torch.rand(tokens, 4).argsort(-1)[:, :2]
    hidden, weights, up, down = (
        tensor.to(dtype).requires_grad_(requires_grad) for tensor in (hidden, weights, up, down)
    )
    return LayerCall(hidden, index, weights, ExpertWeights(up, None, down, None), 4, ExpertForm("silu"))


def test_the_compiled_operators_take_a_call_in_its_flat_form():
    load_kernels()
    ops = torch.ops.hf_moe_cpu
    assert f"({DENSE_CALL}, bool keep)" in str(ops.experts_forward.default._schema)
    assert f"{DENSE_CALL}, bool[6] need)" in str(ops.experts_backward.default._schema)
    assert f"({DENSE_ADAPTED_CALL}, bool keep)" in str(ops.experts_lora_forward.default._schema)
    assert f"{DENSE_ADAPTED_CALL}, bool[6] need)" in str(ops.experts_lora_backward.default._schema)


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_of_the_experts(keep):
    call = random_call(requires_grad=keep)
    opcheck(torch.ops.hf_moe.cpu_experts, (*flatten(call), keep))


def test_opcheck_of_the_experts_backward():
    call = flatten(random_call(requires_grad=False))
    out, pre = torch.ops.hf_moe.cpu_experts(*call, True)
    wants = [True, True, True, False, True, False]
    opcheck(torch.ops.hf_moe.cpu_experts_backward, (torch.randn_like(out), pre, *call, wants))


def test_opcheck_of_the_grouped_linear():
    rows, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((10, 16), (3, 8, 16), (3, 8)))
    end = torch.tensor([4, 4, 9], dtype=torch.int32)
    opcheck(torch.ops.hf_moe.cpu_grouped_linear, (rows, weight, bias, end, False))
    given = (torch.randn(10, 8), rows.detach(), weight.detach(), end, False, [True, True, True])
    opcheck(torch.ops.hf_moe.cpu_grouped_linear_backward, given)


def leaves_of(call: LayerCall) -> list[torch.Tensor]:
    return [call.hidden_TH, call.weights_TK, call.experts.up, call.experts.down]


def gradients(function, call: LayerCall) -> list[torch.Tensor]:
    out = function(call)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves_of(call))]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    call = random_call()
    compiled = torch.compile(cpu_experts, fullgraph=True, backend=backend, dynamic=False)
    for actual, expected in zip(gradients(compiled, call), gradients(cpu_experts, call), strict=True):
        assert torch.equal(actual, expected)


def test_compiles_with_dynamic_shapes():
    compiled = torch.compile(cpu_experts, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 12, 40):
        call = random_call(tokens=tokens)
        for actual, expected in zip(gradients(compiled, call), gradients(cpu_experts, call), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    call = random_call()

    def run(*tensors: torch.Tensor) -> torch.Tensor:  # a reentrant checkpoint sees tensors that it is given alone
        hidden_TH, weights_TK, up, down = tensors
        experts = call.experts._replace(up=up, down=down)
        return cpu_experts(call._replace(hidden_TH=hidden_TH, weights_TK=weights_TK, experts=experts))

    expected = gradients(cpu_experts, call)
    out = checkpoint(run, *leaves_of(call), use_reentrant=reentrant)
    out.square().sum().backward()  # torch.autograd.grad does not work through a reentrant one
    for one, other in zip([out, *(leaf.grad for leaf in leaves_of(call))], expected, strict=True):
        assert torch.equal(one, other)


def plain_grouped_linear(rows, weight, bias, end, transposed):
    parts, start = [], 0
    for expert, stop in enumerate(end.tolist()):
        part = rows[start:stop] @ (weight[expert] if transposed else weight[expert].T)
        parts.append(part if bias is None else part + bias[expert])
        start = stop
    parts.append(parts[0].new_zeros(len(rows) - start, parts[0].shape[1]))
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ends", [[3, 3, 40, 60, 70], [0, 0, 0, 0, 0], [77, 77, 77, 77, 77]], ids=str)
def test_grouped_linear_matches_float64(ends, transposed, dtype):
    shape = (5, 40, 36) if transposed else (5, 36, 40)
    values = [torch.randn(shape).bfloat16() for shape in ((77, 40), shape, (5, 36))]
    end, results = torch.tensor(ends, dtype=torch.int32), []
    for function, kind in ((cpu_grouped_linear, dtype), (plain_grouped_linear, torch.float64)):
        leaves = [value.to(kind).requires_grad_() for value in values]
        out = function(*leaves, end, transposed)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(kind)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for actual, exact in zip(*results, strict=True):
        # one rounding of the result, and a sum of at most 77 products in float32
        bound = (
            torch.finfo(dtype).eps * exact.abs() + 80 * 77 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        )
        assert ((actual.double() - exact).abs() <= bound).all()
        assert actual[70:].abs().sum() == 0 or ends[-1] == 77 or len(actual) != 77


@pytest.mark.parametrize("ends", [[5, 3], [5, 11]])
def test_ends_that_cannot_be_are_an_error(ends):
    with pytest.raises(IndexError, match=r"expert_end\[1\]"):
        cpu_grouped_linear(torch.randn(10, 16), torch.randn(2, 8, 16), None, torch.tensor(ends), False)


def test_runs_inside_another_parallel_region():
    """Several Python threads at once, each with torch's threads."""
    from concurrent.futures import ThreadPoolExecutor

    call = random_call(requires_grad=False)
    expected = cpu_experts(call)
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(lambda _: cpu_experts(call), range(16)):
            assert torch.equal(actual, expected)


def test_public_names():
    assert cpu_ops.cpu_experts is cpu_experts
