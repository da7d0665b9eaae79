"""Our experts implementations against the class's own forward, for every native family: output and every gradient.

The exact result is the family's own eager code in float64. In float64 ours must equal it to rounding, in bfloat16 be
at most twice as far from it as the family's eager code in bfloat16 (`assert_as_good_as`), in float32 the same plus the
rounding of sums of this length. The last test prints the table.
"""

import importlib.util
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor, nn

import triton_interpreter
from hf_moe.experts.activation import find_activation
from hf_moe.experts.contract import has_post_expert_norm
from numerics import assert_as_good_as
from tiny_models import FAMILIES, build_tiny, experts_class

# their gates, norms or sums compute in float32 whatever the dtype
FLOAT32_INSIDE = ("beam", "inkling2", "inkling2_loop", "muse_spark", "openai_privacy_filter")
IMPLEMENTATIONS = ("hf_moe", "hf_moe_grouped", "hf_moe_reference")
TOKENS, TOP_K = 13, 2


@dataclass(frozen=True)
class Call:
    """Arguments of an experts forward, and the gradient of its output."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    grad: Tensor


def routed(hidden_size: int, index: Tensor) -> Call:
    generator = torch.Generator().manual_seed(1)
    tokens, slots = index.shape
    weights = torch.rand(tokens, slots, generator=generator)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    return Call(hidden.bfloat16().float(), index, weights, torch.randn(tokens, hidden_size, generator=generator))


def random_index(num_experts: int, tokens: int, slots: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :slots]


# the named routings of tests/numerics.py, for any number of experts
ROUTINGS = {
    "balanced": lambda E: torch.arange(2 * E).view(E, 2) % E,
    "random": lambda E: random_index(E, TOKENS, TOP_K),
    "one_expert_takes_all": lambda E: torch.full((TOKENS, 1), E // 2),
    "last_expert_empty": lambda E: random_index(E - 1, TOKENS, TOP_K),
    "no_tokens": lambda E: torch.zeros(0, TOP_K, dtype=torch.int64),
    "one_token": lambda E: random_index(E, 1, TOP_K),
    "every_expert": lambda E: random_index(E, 5, E),
    "repeated_indices": lambda E: random_index(E, TOKENS, 1).repeat(1, 2),
}


def tiny_experts(family: str) -> nn.Module:
    model, _ = build_tiny(family)
    experts = next(module for module in model.modules() if type(module) is experts_class(family))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
            parameter.copy_(parameter.bfloat16())
    return experts.requires_grad_(True)


def geometry(experts: nn.Module) -> tuple[int, int, int]:
    """Number of experts, hidden size, expert width."""
    num_experts, rows, columns = experts.down_proj.shape
    return (num_experts, columns, rows) if experts.is_transposed else (num_experts, rows, columns)


def run(experts: nn.Module, implementation: str, call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, and the gradients of hidden states, weights and every parameter."""
    experts.to(dtype).config._experts_implementation = implementation
    experts.zero_grad(set_to_none=True)
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = call.hidden.to(dtype, copy=True).requires_grad_()
    weights = call.weights.to(weights_dtype, copy=True).requires_grad_()
    out = experts(hidden, call.index, weights)
    assert out.dtype == dtype
    leaves = {"hidden": hidden, "weights": weights, **dict(experts.named_parameters())}
    # eager leaves what no token reached without a gradient
    gradients = torch.autograd.grad(
        (out + 0 * sum(leaf.sum() for leaf in leaves.values())).to(dtype), list(leaves.values()), call.grad.to(dtype)
    )
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact_run(experts: nn.Module, call: Call) -> dict[str, Tensor]:
    return {name: value.double() for name, value in run(experts, "eager", call, torch.float64).items()}


def assert_close(
    actual: Tensor, baseline: Tensor, exact: Tensor, terms: int, what: str, dtype: torch.dtype = torch.float32
) -> None:
    """Twice the baseline's distance, plus the rounding of a float32 sum of `terms` terms as large as the result."""
    if dtype == torch.bfloat16:
        assert_as_good_as(actual.bfloat16(), baseline.bfloat16(), exact)
        return
    error = (actual.double() - exact).abs().max().item()
    largest = exact.abs().max().item()
    allowed = 2 * (baseline.double() - exact).abs().max().item() + terms * torch.finfo(torch.float32).eps * largest
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def float64_tolerance(family: str) -> float:
    return 1e-4 if family in FLOAT32_INSIDE else 1e-10


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_dtype(family, implementation):
    experts = tiny_experts(family)
    num_experts, hidden_size, width = geometry(experts)
    call = routed(hidden_size, ROUTINGS["random"](num_experts))
    exact = exact_run(experts, call)
    tolerance = float64_tolerance(family)
    for name, actual in run(experts, implementation, call, torch.float64).items():
        torch.testing.assert_close(actual, exact[name], rtol=tolerance, atol=tolerance)
    baseline = run(experts, "eager", call, torch.float32)
    terms = hidden_size + width + TOKENS + TOP_K
    for name, actual in run(experts, implementation, call, torch.float32).items():
        assert_close(actual, baseline[name], exact[name], terms, name)
    baseline = run(experts, "eager", call, torch.bfloat16)
    for name, actual in run(experts, implementation, call, torch.bfloat16).items():
        assert_close(actual, baseline[name], exact[name], terms, name, torch.bfloat16)


# one of each variant of transformers' contract, as far as the installed transformers has it
VARIANTS = [
    family for family in ("mixtral", "gpt_oss", "nemotron_h", "muse_spark", "inkling2", "aria") if family in FAMILIES
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install -e '.[triton]'")
@pytest.mark.parametrize(
    "family", [family if family in VARIANTS else pytest.param(family, marks=pytest.mark.long) for family in FAMILIES]
)
def test_every_family_through_triton(family):
    """On a GPU the compiled kernels, elsewhere their interpreter, which is slow: by default one of each variant."""
    device = triton_interpreter.device()
    if triton_interpreter.is_on():
        triton_interpreter.repair()
    experts = tiny_experts(family)
    num_experts, hidden_size, width = geometry(experts)
    call = routed(hidden_size, random_index(num_experts, 6, TOP_K))
    exact = exact_run(experts, call)
    terms = hidden_size + width + TOKENS + TOP_K
    for dtype in (torch.float32, torch.bfloat16):
        baseline = run(experts, "eager", call, dtype)
        on_device = Call(*(getattr(call, field.name).to(device) for field in fields(call)))
        actual = run(experts.to(device), "hf_moe_triton", on_device, dtype)
        experts.cpu()
        for name, value in actual.items():
            assert_close(value.cpu(), baseline[name], exact[name], terms, name, dtype)


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_named_routings(family, routing, implementation):
    experts = tiny_experts(family)
    num_experts, hidden_size, _ = geometry(experts)
    call = routed(hidden_size, ROUTINGS[routing](num_experts))
    exact = exact_run(experts, call)
    for dtype, tolerance in ((torch.float64, float64_tolerance(family)), (torch.float32, 1e-4)):
        for name, actual in run(experts, implementation, call, dtype).items():
            torch.testing.assert_close(actual.double(), exact[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_slots_of_other_processes_compute_nothing(family, implementation):
    """Under expert parallelism the id `num_experts`, weight 0, stands for what another process computes."""
    experts = tiny_experts(family)
    num_experts, hidden_size, _ = geometry(experts)
    elsewhere = torch.rand(TOKENS, TOP_K, generator=torch.Generator().manual_seed(3)) < 0.4
    elsewhere[2] = True
    here = routed(hidden_size, random_index(num_experts, TOKENS, TOP_K))
    # eager knows no sentinels in some families: any expert with weight 0 is the same but for that weight's gradient
    zeroed = replace(here, weights=here.weights.masked_fill(elsewhere, 0.0))
    exact = exact_run(experts, zeroed)
    exact["weights"] = exact["weights"].masked_fill(elsewhere, 0.0)
    experts._is_expert_parallel = True
    sentinels = replace(zeroed, index=here.index.masked_fill(elsewhere, num_experts))
    tolerance = float64_tolerance(family)
    for name, actual in run(experts, implementation, sentinels, torch.float64).items():
        torch.testing.assert_close(actual.double(), exact[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("wrong", "allowed"), [(-1, 8), (8, 8), (9, 8), (9, 9), (1000, 8)])
def test_ids_out_of_range_are_an_error(implementation, wrong, allowed):
    experts = tiny_experts("mixtral")
    experts._is_expert_parallel = allowed == 9
    call = routed(32, random_index(8, TOKENS, TOP_K))
    call.index[4, 1] = wrong
    with pytest.raises(IndexError, match=rf"expert id {wrong} of token 4 is not in \[0, {allowed}\)"):
        run(experts, implementation, call, torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_broken_token_breaks_no_other(implementation):
    experts = tiny_experts("mixtral")
    call = routed(32, random_index(8, TOKENS, TOP_K))
    clean = run(experts, implementation, call, torch.float32)
    call.hidden[3] = float("nan")
    broken = run(experts, implementation, call, torch.float32)
    others = torch.arange(TOKENS) != 3
    for name in ("out", "hidden", "weights"):
        assert torch.equal(broken[name][others], clean[name][others])
        assert broken[name][3].isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_every_run(implementation, dtype):
    experts = tiny_experts("gpt_oss")
    call = routed(32, random_index(8, 64, TOP_K))
    first = run(experts, implementation, call, dtype)
    for _ in range(3):
        for name, value in run(experts, implementation, call, dtype).items():
            assert torch.equal(value, first[name]), name


def test_table_of_families(capsys):
    """Printed: what was compared, by family."""
    rows = []
    for family in FAMILIES:
        experts = tiny_experts(family)
        num_experts, hidden_size, _ = geometry(experts)
        call = routed(hidden_size, ROUTINGS["random"](num_experts))
        exact = exact_run(experts, call)
        actual = run(experts, "hf_moe", call, torch.float64)
        error = max((actual[name] - exact[name]).abs().max().item() for name in exact)
        activation = find_activation(experts)
        runs = "steps" if activation is None or has_post_expert_norm(experts) else f"fused, {activation}"
        rows.append(f"{family:52s} {error:8.1e}  {runs}")
    with capsys.disabled():
        print(f"\n{len(rows)} of {len(FAMILIES)} native families covered: largest difference to eager in float64")
        print("\n".join(rows))
