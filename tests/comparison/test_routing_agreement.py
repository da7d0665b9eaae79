"""Agreement compares sets of experts, and sees every token that goes elsewhere."""

import pytest
import torch

from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.comparison.routing_agreement import RoutingChoices, record_choices, routing_agreement
from hf_moe.layers.moe_layers import moe_layers
from tiny_moe import MODELS, hf_moe_model, with_expert_lora

ROWS = torch.arange(60, dtype=torch.int32).view(5, 12)


def choices(*layers):
    return RoutingChoices(tuple(map(str, range(len(layers)))), tuple(torch.tensor(layer) for layer in layers))


def test_the_share_of_equal_sets_per_layer():
    before = choices([[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1], [0, 1], [0, 1], [0, 1]])
    after = choices([[0, 1], [2, 3], [4, 6], [5, 7]], [[0, 1], [0, 1], [0, 1], [0, 1]])
    assert routing_agreement(before, after) == [0.5, 1.0]


@pytest.mark.parametrize("family", MODELS)
def test_the_order_and_the_batches_do_not_matter(family):
    model = MODELS[family]()
    one, two = record_choices(model, ROWS, batch_size=2), record_choices(model, ROWS, batch_size=5)
    assert routing_agreement(one, two) == [1.0] * len(moe_layers(model))
    expected = [logits.topk(2).indices.sort(-1).values for logits in router_logits(model)]
    assert all(torch.equal(*pair) for pair in zip(two.experts, expected, strict=True))


def router_logits(model):
    with torch.no_grad():
        return model(input_ids=ROWS.long(), output_router_logits=True).router_logits


def test_a_changed_router_shows_in_its_layer():
    model = hf_moe_model()
    before = record_choices(model, ROWS)
    with torch.no_grad():
        moe_layers(model)[2].router.weight.neg_()
    agreement = routing_agreement(before, record_choices(model, ROWS))
    assert agreement[:2] == [1.0, 1.0]
    assert agreement[2] < 0.2


def test_a_frozen_router_is_no_frozen_routing():
    """Adapters on the experts move what later routers see: layer 0 must agree, later layers need not."""
    model = hf_moe_model()
    before = record_choices(model, ROWS)
    tuned = with_expert_lora(model)
    freeze_router(tuned)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    agreement = routing_agreement(before, record_choices(tuned, ROWS))
    assert agreement[0] == 1.0
    assert max(agreement[1:]) < 1.0
    with tuned.disable_adapter():
        assert routing_agreement(before, record_choices(tuned, ROWS)) == [1.0] * 3


def test_the_mode_comes_back_and_hooks_go():
    model = hf_moe_model().train()
    record_choices(model, ROWS)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    record_choices(model, ROWS)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert model.training


def test_other_tokens_are_refused():
    model = hf_moe_model()
    with pytest.raises(ValueError, match="same tokens and layers"):
        routing_agreement(record_choices(model, ROWS), record_choices(model, ROWS[:2]))
