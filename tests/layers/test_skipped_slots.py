"""Slots without an expert: our flag, transformers' flag, and models whose own code sets only the latter."""

import pytest
import torch

from hf_moe.layers.moe_layers import check_index_range, moe_layers
from hf_moe.layers.skipped_slots import is_expert_parallel, let_skip_slots, may_skip_slots, restore_skip_flags
from hf_moe.layers.watch_routing import watch_routing
from tiny_hf_moe import random_ids
from tiny_moe import hf_moe_model, qwen_model

SKIPPING = {
    "null_experts": {"num_null_experts": 2},
    "top_p": {"routing": "top_p", "router_top_p": 0.5},
    "capacity": {"capacity_factor": 0.5},
}


def experts_of(model):
    return [layer.experts for layer in moe_layers(model)]


def decisions(model):
    found = []
    with watch_routing(model, lambda routing: found.append((routing.index, routing.weights))), torch.no_grad():
        out = model(random_ids()).logits
    return [out, *(tensor for pair in found for tensor in pair)]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "hf_moe", "hf_moe_grouped"])
@pytest.mark.parametrize("options", SKIPPING)
def test_code_of_a_checkpoint_that_sets_transformers_flag_alone_runs_as_before(options, implementation):
    model = hf_moe_model(**SKIPPING[options])
    model.set_experts_implementation(implementation)
    expected = decisions(model)
    for layer in moe_layers(model):
        assert may_skip_slots(layer.experts)
        assert not is_expert_parallel(layer.experts, layer.router)
        del layer.experts.may_skip_slots
        assert may_skip_slots(layer.experts)
        assert not is_expert_parallel(layer.experts, layer.router)
        check_index_range(layer, torch.tensor([[layer.num_experts]]))
    for actual, value in zip(decisions(model), expected, strict=True):
        assert torch.equal(actual, value)


def test_experts_of_which_a_part_is_here_are_parallel():
    layer = moe_layers(qwen_model())[0]
    assert not is_expert_parallel(layer.experts, layer.router)
    layer.experts._is_expert_parallel = True
    layer.experts.num_experts //= 2
    assert is_expert_parallel(layer.experts, layer.router)


def test_flags_come_back():
    (experts, _) = experts_of(qwen_model())
    before = dict(vars(experts))
    flags = let_skip_slots(experts)
    assert may_skip_slots(experts)
    restore_skip_flags(experts, flags)
    assert vars(experts) == before
