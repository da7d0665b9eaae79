"""Gated experts given as tensors run through the same engines as modules, with the same results."""

import pytest
import torch

import hf_moe
from hf_moe.experts import engines
from hf_moe.experts.functional import GatedExperts, run_gated_experts
from hf_moe.experts.host import HOST_REFUSALS
from kernel_cases import DTYPES, assert_right, layer, layer_results, layer_sizes, rounding
from numerics import ROUTINGS

IMPLEMENTATIONS = ("eager", None, "grouped_mm", "hf_moe", "hf_moe_grouped")


def results(case, cotangent_TH, implementation):
    """Output and gradients of every tensor."""
    case = case.differentiable()
    experts = GatedExperts(case.down_weight.shape[1], case.down_weight.shape[2])
    out_TH = run_gated_experts(
        implementation, experts, case.up_weight, case.down_weight, case.hidden, case.index, case.weights
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
    experts, down = GatedExperts(16, 24), torch.zeros(4, 16, 24)
    hidden, index, weights = torch.zeros(3, 16), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    call = (experts, torch.zeros(4, 48, 16), down, hidden, index, weights)
    with pytest.raises(ValueError, match=r"'hf_moe_cpu' cannot run GatedExperts: .* on meta: use 'hf_moe'"):
        run_gated_experts("hf_moe_cpu", experts, call[1].to("meta"), down.to("meta"), *call[3:])
    with pytest.raises(IndexError):
        run_gated_experts("hf_moe", *call[:4], index + 4, weights)


def test_kernels_of_the_host_are_never_chosen(monkeypatch):
    """They read an experts module of the host, which this is not."""
    monkeypatch.setenv("HF_MOE_DELEGATE", "sonicmoe,deepgemm")
    for name in ("sonicmoe", "deepgemm"):
        monkeypatch.setitem(HOST_REFUSALS, name, lambda *_: None)
    monkeypatch.setattr(engines, "triton_refuses", lambda *_: "a test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    cuda = torch.device("cuda", 0)
    assert engines.choose(GatedExperts(16, 24), torch.bfloat16, cuda).name == "sonicmoe"
    assert engines.resolve("hf_moe", GatedExperts(16, 24), torch.bfloat16, cuda, False, True) == "hf_moe_grouped"


def test_they_are_no_layer_of_a_model():
    module = torch.nn.Module()
    module.experts = GatedExperts(16, 24)
    assert hf_moe.moe_layers(module) == []
    assert list(module.parameters()) == []
