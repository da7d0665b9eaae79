"""Activations are recognised by what they compute: every closed form in use, and nothing that only resembles one."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from hf_moe.experts.activation import ExpertActivation, find_activation
from hf_moe.experts.contract import activation_of
from tiny_models import FAMILIES, build_tiny, experts_class

# all others compute silu(gate) * up
SPECIAL = {
    "deepseek_v4": ExpertActivation("silu", limit=10.0),
    "diffusion_gemma": ExpertActivation("gelu_tanh"),
    "gemma4": ExpertActivation("gelu_tanh"),
    "glm5_next": ExpertActivation("silu", limit=10.0),
    "gpt_oss": ExpertActivation("silu", alpha=1.702, limit=7.0, offset=1.0),
    "hy_v4": ExpertActivation("silu", limit=10.0),
    "hy_v4_vl": ExpertActivation("silu", limit=10.0),
    "inkling2": None,  # soft caps
    "inkling2_loop": None,  # soft caps
    "minimax_m3_vl": ExpertActivation("silu", alpha=1.702, limit=7.0, offset=1.0),
    "nemotron_h": ExpertActivation("relu2"),
    "openai_privacy_filter": ExpertActivation("silu", alpha=1.702, limit=7.0, offset=1.0),
}


def meta_experts(family):
    with torch.device("meta"):
        model, _ = build_tiny(family)
    return next(module for module in model.modules() if type(module) is experts_class(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_of_every_native_family(family):
    assert find_activation(meta_experts(family)) == SPECIAL.get(family, ExpertActivation("silu"))


class Experts(nn.Module):
    """As much of transformers' contract as an activation needs."""

    def __init__(self, apply_gate, has_gate=True, is_concatenated=True, act_fn=F.silu):
        super().__init__()
        self.has_gate, self.is_concatenated, self.act_fn = has_gate, is_concatenated, act_fn
        self._apply_gate = apply_gate


def gated(function, interleaved=False):
    def apply_gate(pre):
        gate, up = (pre[..., ::2], pre[..., 1::2]) if interleaved else pre.chunk(2, -1)
        return function(gate, up)

    return Experts(apply_gate, is_concatenated=not interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "activation",
    [
        ExpertActivation("silu"),
        ExpertActivation("silu", alpha=1.702, limit=7.0, offset=1.0),
        ExpertActivation("silu", alpha=0.5),
        ExpertActivation("gelu", limit=3.5),
        ExpertActivation("gelu_tanh", offset=0.25),
        ExpertActivation("relu"),
        ExpertActivation("relu2", limit=12.0),
    ],
    ids=str,
)
def test_parameters_are_read_off(activation, interleaved):
    assert find_activation(gated(activation, interleaved)) == activation


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2", "silu", "quick_gelu"])
def test_activations_without_a_gate(name):
    found = find_activation(Experts(None, has_gate=False, act_fn=ACT2FN[name]))
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    torch.testing.assert_close(found.function(x), ACT2FN[name](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda gate, up: F.silu(up) * gate,  # the wrong half
        lambda gate, up: F.silu(gate).clamp(max=7.0) * up,  # clamped after the activation (Step-3.7)
        lambda gate, up: F.silu(gate.clamp(-7, 7)) * up.clamp(-7, 7),  # gate bounded from below
        lambda gate, up: F.silu(gate) * up.clamp(-5, 7),
        lambda gate, up: F.silu(gate) * up**2,
        lambda gate, up: torch.tanh(gate) * up,
        lambda gate, up: F.silu(gate) * torch.tanh(up / 30) * 30,
        lambda gate, up: 1.01 * F.silu(gate) * up,
        lambda gate, up: F.dropout(F.silu(gate)) * up,
        lambda gate, up: torch.zeros_like(up),
        lambda gate, up: torch.cat([F.silu(gate) * up, up], -1),
    ],
)
def test_what_no_closed_form_predicts_is_unknown(function):
    assert find_activation(gated(function)) is None


def test_interleaved_code_under_a_concatenated_flag_is_unknown():
    experts = gated(ExpertActivation("silu"), interleaved=True)
    experts.is_concatenated = True
    assert find_activation(experts) is None


@pytest.mark.parametrize("name", ["prelu", "xielu"])
def test_activations_that_learn_are_unknown(name):
    assert find_activation(Experts(None, has_gate=False, act_fn=ACT2FN[name])) is None


def test_an_activation_that_may_read_the_modules_tensors_is_unknown():
    experts = meta_experts("gpt_oss")
    assert activation_of(experts) is not None
    experts.beta = nn.Parameter(torch.ones(()))
    assert activation_of(experts) is None


def test_replaced_numbers_and_activations_are_seen():
    experts = meta_experts("gpt_oss")
    assert activation_of(experts).limit == 7.0
    experts.limit = 5.0
    assert activation_of(experts).limit == 5.0
    mixtral = meta_experts("mixtral")
    assert activation_of(mixtral) == ExpertActivation("silu")
    mixtral.act_fn = ACT2FN["gelu"]
    assert activation_of(mixtral) == ExpertActivation("gelu")


def test_asking_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    find_activation(gated(lambda gate, up: F.dropout(F.silu(gate)) * up))
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_unknown_activation_name_is_an_error():
    with pytest.raises(ValueError, match=r"one of silu, gelu, gelu_tanh, relu, relu2, got 'mish'"):
        ExpertActivation("mish").function(torch.ones(1))


def test_defaults_are_the_plain_gate():
    assert ExpertActivation("silu") == ExpertActivation("silu", 1.0, math.inf, 0.0)
    namespace = SimpleNamespace(gate=torch.randn(5), up=torch.randn(5))
    assert torch.equal(ExpertActivation("silu")(namespace.gate, namespace.up), F.silu(namespace.gate) * namespace.up)
