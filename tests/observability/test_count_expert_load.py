"""Counts are those of the routers' choices, whatever the family."""

import pytest
import torch
from torch import nn

from hf_moe.layers.moe_layers import moe_layers
from hf_moe.observability.recording import count_expert_load
from tiny_moe import MODELS, hf_moe_model

IDS = torch.arange(48).view(4, 12)


@pytest.mark.parametrize("family", MODELS)
def test_counts_are_the_routers_choices(family):
    model = MODELS[family]()
    expected = [
        logits.topk(2).indices.flatten().bincount(minlength=8)
        for logits in model(input_ids=IDS, output_router_logits=True).router_logits
    ]
    with count_expert_load(model) as load:
        model(input_ids=IDS)
    for counts, wanted in zip(load.counts.values(), expected, strict=True):
        assert counts.tolist() == wanted.tolist()
        assert counts.sum() == IDS.numel() * 2


def test_counts_add_up_until_they_are_cleared():
    model = hf_moe_model()
    with count_expert_load(model) as load:
        model(input_ids=IDS)
        once = {name: counts.clone() for name, counts in load.counts.items()}
        model(input_ids=IDS)
        assert all(torch.equal(load.counts[name], 2 * counts) for name, counts in once.items())
        load.clear()
        model(input_ids=IDS)
    assert all(torch.equal(load.counts[name], counts) for name, counts in once.items())
    model(input_ids=IDS)
    assert all(torch.equal(load.counts[name], counts) for name, counts in once.items()), "counted after the end"


def test_slots_without_an_expert_do_not_count():
    model = hf_moe_model(num_null_experts=8)
    slots = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda module, args, output: slots.append(output.top_k_index))
    with count_expert_load(model) as load:
        model(input_ids=IDS)
    for counts, index in zip(load.counts.values(), slots, strict=True):
        assert counts.sum() == (index < 8).sum() < index.numel()


def test_layers_of_different_sizes_count_each_on_their_own():
    model = hf_moe_model(per_layer_config={1: {"num_experts": 4}})
    with count_expert_load(model) as load:
        model(input_ids=IDS)
    assert [len(counts) for counts in load.counts.values()] == [8, 4, 8]


def test_models_without_routers_are_refused():
    with pytest.raises(ValueError, match="Linear has no MoE layer"), count_expert_load(nn.Linear(2, 2)):
        pass


def test_padding_and_recomputation_do_not_count():
    model = hf_moe_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with count_expert_load(model) as load:
        model(input_ids=IDS, attention_mask=mask).logits.sum().backward()
    assert [int(counts.sum()) for counts in load.counts.values()] == [(48 - 5) * 2] * 3
