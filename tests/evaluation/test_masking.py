"""A masked expert is as good as pruned: the model without its rows in the router and in the weights."""

import copy

import pytest
import torch
from torch import nn

from hf_moe.evaluation.masking import MaskError, mask_experts
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.layers.watch_routing import watch_routing
from tiny_hf_moe import random_ids
from tiny_models import build_tiny
from tiny_moe import hf_moe_model, qwen_model

# softmax, sigmoid with groups and a bias, no normalisation, biased logits, null experts, a table of token ids
FAMILIES = ("deepseek_v3", "deepseek_v4", "gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen3_next")


def pruned(model: nn.Module, expert: int) -> nn.Module:
    """The same model with one expert less in every layer."""
    smaller = copy.deepcopy(model)
    for layer in moe_layers(smaller):
        keep = [i for i in range(layer.num_experts) if i != expert]
        for module, names in ((layer.router, ("weight",)), (layer.experts, ("gate_up_proj", "down_proj"))):
            for name in names:
                setattr(module, name, nn.Parameter(getattr(module, name).detach()[keep]))
        layer.experts.num_experts = len(keep)
        layer.router.num_experts = len(keep)
    return smaller


@torch.no_grad()
@pytest.mark.parametrize("make", [hf_moe_model, qwen_model, lambda: hf_moe_model(router_scoring="sigmoid")])
def test_equals_the_model_without_the_expert(make):
    model, ids = make(), random_ids()
    expected = pruned(model, 3)(input_ids=ids).logits
    before = model(input_ids=ids).logits
    with mask_experts(model, {layer.name: [3] for layer in moe_layers(model)}):
        masked = model(input_ids=ids).logits
    torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-6)
    assert (masked - before).abs().max() > 1e-4
    assert torch.equal(model(input_ids=ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_gives_weight_to_a_masked_expert(family):
    model, inputs = build_tiny(family)
    weight = {"before": 0.0, "masked": 0.0}
    state = "before"

    def add(routing):
        weight[state] += float(routing.weights[routing.index == 2].abs().sum())

    with watch_routing(model, add):
        model(**inputs)
    state = "masked"
    with mask_experts(model, {layer.name: [2] for layer in moe_layers(model)}), watch_routing(model, add):
        model(**inputs)
    assert weight["before"] > 0
    assert weight["masked"] == 0


@torch.no_grad()
def test_one_layer_alone_and_null_experts():
    model, ids = hf_moe_model(num_null_experts=4), random_ids()
    name = moe_layers(model)[1].name
    chosen: dict[str, set[int]] = {}

    def remember(routing):
        chosen.setdefault(routing.layer.name, set()).update(routing.index.flatten().tolist())

    with mask_experts(model, {name: [0, 1, 2]}), watch_routing(model, remember):
        model(input_ids=ids)
    assert not chosen.pop(name) & {0, 1, 2}
    assert all(experts & {0, 1, 2} for experts in chosen.values())


@torch.no_grad()
def test_a_router_that_does_not_choose_by_logits_is_found_out():
    model, ids = hf_moe_model(), random_ids()
    layer = moe_layers(model)[0]
    # as if a table chose: whatever the logits, the same experts with the same weights
    layer.router.register_forward_hook(
        lambda module, args, out: out._replace(
            top_k_index=torch.zeros_like(out.top_k_index), top_k_weights=torch.full_like(out.top_k_weights, 0.5)
        )
    )
    with mask_experts(model, {layer.name: [0]}), pytest.raises(MaskError, match="still gives weight to a masked"):
        model(input_ids=ids)
    with mask_experts(model, {layer.name: [1]}):
        model(input_ids=ids)


@torch.no_grad()
def test_nothing_stays_behind_after_an_error_inside_the_router():
    model, ids = hf_moe_model(), random_ids()
    layer = moe_layers(model)[0]
    before = model(input_ids=ids).logits

    def fail(module, args):
        raise ArithmeticError

    with mask_experts(model, {layer.name: [0]}):
        broken = layer.router.register_forward_pre_hook(fail)
        with pytest.raises(ArithmeticError):
            model(input_ids=ids)
        broken.remove()
        # a product as wide as the number of experts, outside of any router
        assert (torch.ones(1, 4) @ torch.ones(4, 8)).isfinite().all()
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("masked", "message"),
    [
        ({"no.layer": [0]}, "no MoE layer is called 'no.layer'"),
        ({"model.layers.0.mlp": [8]}, r"ids in \[0, 7\], got \[8\]"),
        ({"model.layers.0.mlp": [-1]}, r"got \[-1\]"),
        ({"model.layers.0.mlp": range(8)}, "all 8 experts"),
    ],
)
def test_what_cannot_be_masked_is_refused(masked, message):
    with pytest.raises(ValueError, match=message), mask_experts(hf_moe_model(), masked):
        pass
