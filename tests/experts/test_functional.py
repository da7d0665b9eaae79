"""Gated experts given as tensors run through the same backends as modules, with the same results."""

import pytest
import torch

import hf_moe
from hf_moe.experts import backends
from hf_moe.experts.functional import GatedExperts, run_gated_experts
from hf_moe.experts.request import Backend, Request
from kernel_cases import DTYPES, assert_right, layer, layer_results, layer_sizes, rounding
from numerics import ROUTINGS

IMPLEMENTATIONS = ("eager", None, "grouped_mm", "hf_moe", "hf_moe_grouped", "hf_moe_reference")


def results(case, cotangent_TH, implementation):
    """Output and gradients of every tensor."""
    case = case.differentiable()
    out_TH = run_gated_experts(
        implementation, GatedExperts(), case.up_weight, case.down_weight, case.hidden, case.index, case.weights
    )
    gradients = torch.autograd.grad(out_TH, list(case.tensors().values()), cotangent_TH.to(out_TH.dtype))
    return {"out": out_TH.detach(), **dict(zip(case.tensors(), gradients, strict=True))}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name not in ("sentinels", "nan_token")])
def test_close_to_float64(routing, dtype, implementation):
    case = layer(routing)
    cotangent_TH = torch.randn(case.hidden.shape)
    exact, sizes = layer_results(case.to(torch.float64), cotangent_TH.double()), layer_sizes(case, cotangent_TH)
    baseline = layer_results(case.to(dtype), cotangent_TH)
    actual = results(case.to(dtype), cotangent_TH, implementation)
    for name in exact:
        assert_right(actual[name], baseline[name], exact[name], sizes[name], rounding(case), name)


def test_the_models_implementation_decides():
    experts, down = GatedExperts(), torch.zeros(4, 16, 24)
    hidden, index, weights = torch.zeros(3, 16), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    call = (experts, torch.zeros(4, 48, 16), down, hidden, index, weights)
    with pytest.raises(ValueError, match=r"'hf_moe_cpu' cannot run GatedExperts: .* on meta: use 'hf_moe'"):
        run_gated_experts("hf_moe_cpu", experts, call[1].to("meta"), down.to("meta"), *call[3:])
    with pytest.raises(IndexError):
        run_gated_experts("hf_moe", *call[:4], index + 4, weights)


def test_kernels_of_transformers_are_never_chosen(monkeypatch):
    """They read an experts module of transformers, which this is not."""
    monkeypatch.setenv("HF_MOE_DELEGATE", "sonicmoe,deepgemm")
    for name in ("sonicmoe", "deepgemm"):
        monkeypatch.setitem(backends.BACKENDS, name, Backend(name))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    request = Request(GatedExperts(), "dense", torch.bfloat16, torch.device("cuda", 0), (16, 24))
    assert backends.choose(request).name == "sonicmoe"
    assert backends.resolve("hf_moe", *request._replace(adapted=True)) == "hf_moe_grouped"


def test_they_are_no_layer_of_a_model():
    module = torch.nn.Module()
    module.experts = GatedExperts()
    assert hf_moe.moe_layers(module) == []
    assert list(module.parameters()) == []
