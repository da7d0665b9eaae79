"""Relative norms against those of the whole weights."""

import copy
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

from hf_moe.adapters.adapter_experts import AdapterExpertsConfig
from hf_moe.adapters.esft import SelectedExperts
from hf_moe.comparison import weights as module
from hf_moe.comparison.weights import is_exact, sample_weights, weight_drift
from hf_moe.layers.moe_layers import moe_layers
from tiny_lora import adapted, build
from tiny_moe import hf_moe_model, qwen_model


def drift(base, new):
    one, two = sample_weights(base), sample_weights(new)
    return {name: weight_drift(one[name], two[name]) for name in one}


def relative(before, after):
    return float((after.double() - before.double()).norm() / before.double().norm())


def stacks(layer):
    return torch.cat([layer.experts.gate_up_proj.flatten(1), layer.experts.down_proj.flatten(1)], 1).detach()


@pytest.fixture(params=[hf_moe_model, qwen_model])
def pair(request):
    base = request.param()
    new = copy.deepcopy(base)
    with torch.no_grad():
        for layer in moe_layers(new):
            layer.experts.down_proj[3] += 0.05
            layer.router.weight *= 1.1
    return base, new


def test_drift_is_the_relative_norm_of_the_change(pair):
    base, new = pair
    for before, after, found in zip(moe_layers(base), moe_layers(new), drift(base, new).values(), strict=True):
        one, two = stacks(before), stacks(after)
        assert found.router == pytest.approx(0.1, rel=1e-5)
        assert found.experts == pytest.approx(relative(one, two), rel=1e-6)
        singly = [relative(one[expert], two[expert]) for expert in range(8)]
        assert found.by_expert.tolist() == pytest.approx(singly, rel=1e-6)
        assert found.by_expert.nonzero().flatten().tolist() == [3]
        assert found.left_out == ()
    assert is_exact(sample_weights(base))


def test_a_sample_is_near_the_truth(monkeypatch):
    # one expert alone changes, by noise
    monkeypatch.setattr(module, "SAMPLE", 64)
    base = hf_moe_model(moe_intermediate_size=64, hidden_size=64, num_hidden_layers=1)
    new = copy.deepcopy(base)
    with torch.no_grad():
        moe_layers(new)[0].experts.gate_up_proj[2] += 0.01 * torch.randn(128, 64)
    (found,) = drift(base, new).values()
    assert not is_exact(sample_weights(base))
    truth = relative(stacks(moe_layers(base)[0]), stacks(moe_layers(new)[0]))
    assert found.experts == pytest.approx(truth, rel=0.3)
    assert found.by_expert.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("family", ["hf_moe", "qwen3_moe"])
def test_an_adapter_counts_as_its_merged_weights(family):
    base, _ = build(family)
    new = adapted(base)
    merged = copy.deepcopy(new).merge_and_unload()
    wanted, found = drift(base, merged), drift(base, new)
    assert wanted.keys() == found.keys()
    for name in wanted:
        assert wanted[name].experts > 0.01
        assert found[name].experts == pytest.approx(wanted[name].experts, rel=1e-5)
        assert found[name].router == 0
    with new.disable_adapter():
        assert all(layer.experts == 0 for layer in drift(base, new).values())


def test_adapted_and_copied_routers_count():
    from peft import LoraConfig, get_peft_model

    base = hf_moe_model()
    copied = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    found = drift(base, copied)
    assert [layer.router for layer in found.values()] == pytest.approx([0.5] * len(found))


def test_trained_slices_count():
    base = hf_moe_model()
    sliced = copy.deepcopy(base)
    layer = moe_layers(sliced)[0]
    parent, _, child = layer.experts_name.rpartition(".")
    wrapper = SelectedExperts(layer.experts, [1, 5])
    setattr(sliced.get_submodule(parent), child, wrapper)
    with torch.no_grad():
        wrapper.trained_slices.down_proj += 1.0
    found = next(iter(drift(base, sliced).values()))
    assert found.by_expert.nonzero().flatten().tolist() == [1, 5]


@pytest.mark.skipif(Version(version("peft")) < Version("0.21"), reason="adapter experts need peft 0.21")
def test_adapter_experts_leave_the_base_experts_as_they_are():
    from peft import get_peft_model

    base = hf_moe_model()
    config = AdapterExpertsConfig(num_adapter_experts=2, adapter_width=8)
    extended = get_peft_model(copy.deepcopy(base), config)
    assert all(layer.experts == 0 for layer in drift(base, extended).values())


def test_unreadable_weights_are_left_out_with_a_reason():
    base, other = hf_moe_model(), hf_moe_model(num_experts=4)
    found = next(iter(drift(base, other).values()))
    assert (found.router, found.experts, found.by_expert) == (None, None, None)
    assert "Drift of the experts is left out: their weights differ in shape." in found.left_out
    packed = copy.deepcopy(base)
    for layer in moe_layers(packed):
        values = layer.experts.down_proj.data.to(torch.uint8)
        layer.experts.down_proj = torch.nn.Parameter(values, requires_grad=False)
    found = next(iter(drift(base, packed).values()))
    assert found.experts is None
    assert found.router == 0
    assert found.left_out == ("Drift of the experts is left out: they are stored as uint8, quantised.",)
