"""MoE models whose experts do not go through transformers' interface: all that needs layers says so."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from hf_moe.adapters.expert_lora import expert_lora_config
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.select_experts import select_experts
from hf_moe.layers.unseen_experts import required_layers, unseen_experts
from hf_moe.layers.watch_routing import watch_routing
from hf_moe.observability.explain import explain
from hf_moe.training.balancing.checks import BalancingError, balanced_layers
from hf_moe.training.balancing.config import BalancingConfig
from tiny_models import build_tiny
from tiny_unseen import SMALL, UNSEEN


def test_every_family_without_the_interface_is_here():
    experts = re.compile(r"^class \w*(Experts|MoE|Moe|SparseMLP)\w*\((nn\.)?Module(Dict|List)?\)", re.M)
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = file.read_text()
        if experts.search(text) and not re.search("^@use_experts_implementation", text, re.M):
            found.add(file.parent.name)
    names = {build.__name__ for build in UNSEEN} - {"switch"} | {"switch_transformers"}
    assert found - {"aria"} <= names  # aria's experts: until transformers 5.17


@pytest.mark.parametrize("build", UNSEEN, ids=lambda build: build.__name__)
def test_every_command_names_them(build):
    with torch.device("meta"):
        model = build()
    explained = explain(model)
    assert explained.active_parameters is None
    (warning,) = explained.warnings
    assert warning == unseen_experts(model, [])
    assert type(model).__name__ in warning
    assert "outside of transformers' experts interface" in warning
    assert "active per token not known" in str(explained)
    for needs_layers in (
        required_layers,
        expert_lora_config,
        freeze_router,
        lambda model: select_experts(model, [[1, 2, 3]]),
        lambda model: watch_routing(model, print).__enter__(),
    ):
        with pytest.raises(ValueError, match="outside of transformers' experts interface") as raised:
            needs_layers(model)
        assert "Mixture-of-Experts model" not in str(raised.value)
    with pytest.raises(BalancingError, match="outside of transformers' experts interface"):
        balanced_layers(model, BalancingConfig(aux_loss_coef=0.01))


def test_experts_of_code_that_records_no_router_are_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    assert "(0-1.experts)" in str(unseen_experts(nn.Sequential(Block(), Block()), []))
    assert unseen_experts(nn.Sequential(nn.Linear(4, 4)), []) is None
    seen, _ = build_tiny("qwen3_moe")
    seen.more = Block()
    assert "(more.experts)" in explain(seen).warnings[0]
    assert explain(seen).active_parameters is None


def test_a_config_that_speaks_of_experts_which_are_not_there():
    with torch.device("meta"):
        model = transformers.DogeForCausalLM(transformers.DogeConfig(**SMALL))
    assert "config says num_experts=16384: either it is built dense, or" in explain(model).warnings[0]
