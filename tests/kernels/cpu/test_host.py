"""The CPU engine's operators under opcheck, torch.compile and gradient checkpointing; the grouped linear."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from hf_moe.kernels.cpu import cpu_experts, cpu_grouped_linear, why_not
from hf_moe.kernels.cpu import ops as cpu_ops

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SETTINGS = ("silu", 1.0, float("inf"), 0.0, True, False, False)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def arguments(dtype=torch.float32, tokens=12, requires_grad=True):
    hidden, weights = torch.randn(tokens, 32), torch.rand(tokens, 2)
    up, down = torch.randn(4, 48, 32) / 6, torch.randn(4, 32, 24) / 5
    index = torch.rand(tokens, 4).argsort(-1)[:, :2]
    hidden, weights, up, down = (
        tensor.to(dtype).requires_grad_(requires_grad) for tensor in (hidden, weights, up, down)
    )
    return hidden, index, weights, up, None, down, None, 4, *SETTINGS


@pytest.mark.parametrize("keep_pre", [True, False])
def test_opcheck_of_the_experts(keep_pre):
    given = arguments(requires_grad=keep_pre)
    opcheck(torch.ops.hf_moe.cpu_experts, (*given, keep_pre))


def test_opcheck_of_the_experts_backward():
    given = arguments(requires_grad=False)
    out, pre = torch.ops.hf_moe.cpu_experts(*given, True)
    need = [True, True, True, False, True, False]
    opcheck(torch.ops.hf_moe.cpu_experts_backward, (torch.randn_like(out), pre, *given, need))


def test_opcheck_of_the_grouped_linear():
    rows, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((10, 16), (3, 8, 16), (3, 8)))
    end = torch.tensor([4, 4, 9], dtype=torch.int32)
    opcheck(torch.ops.hf_moe.cpu_grouped_linear, (rows, weight, bias, end, False))
    given = (torch.randn(10, 8), rows.detach(), weight.detach(), end, False, [True, True, True])
    opcheck(torch.ops.hf_moe.cpu_grouped_linear_backward, given)


def gradients(function, given):
    leaves = [given[i] for i in (0, 2, 3, 5)]
    out = function(*given)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(backend):
    given = arguments()
    compiled = torch.compile(cpu_experts, fullgraph=True, backend=backend, dynamic=False)
    for actual, expected in zip(gradients(compiled, given), gradients(cpu_experts, given), strict=True):
        assert torch.equal(actual, expected)


def test_compiles_with_dynamic_shapes():
    compiled = torch.compile(cpu_experts, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 12, 40):
        given = arguments(tokens=tokens)
        for actual, expected in zip(gradients(compiled, given), gradients(cpu_experts, given), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    given = arguments()
    expected = gradients(cpu_experts, given)
    actual = (
        gradients(lambda *args: checkpoint(cpu_experts, *args, use_reentrant=reentrant), given)
        if not reentrant
        else None
    )
    if reentrant:  # torch.autograd.grad does not work through it
        out = checkpoint(cpu_experts, *given, use_reentrant=True)
        out.square().sum().backward()
        actual = [out, *(given[i].grad for i in (0, 2, 3, 5))]
    for one, other in zip(actual, expected, strict=True):
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

    given = arguments(requires_grad=False)
    expected = cpu_experts(*given)
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(lambda _: cpu_experts(*given), range(16)):
            assert torch.equal(actual, expected)


def test_public_names():
    assert cpu_ops.cpu_experts is cpu_experts
