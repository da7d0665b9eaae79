"""Every family's decisions are heard once, as the experts get them, with the mask of the tokens."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_moe.models.moe_layers import moe_layers
from hf_moe.models.watch_routing import watch_routing
from tiny_models import FAMILIES, build_tiny
from tiny_moe import hf_moe_model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_hands_over_what_its_experts_get(family):
    model, inputs = build_tiny(family)
    given, heard = [], []
    hooks = [
        layer.experts.register_forward_hook(lambda module, args, output: given.append(args))
        for layer in moe_layers(model)
    ]
    with torch.no_grad(), watch_routing(model, heard.append) as layers:
        model(**inputs)
    for hook in hooks:
        hook.remove()
    assert [event.layer.name for event in heard] == [layer.name for layer in layers]
    for event, (hidden_states, index, weights) in zip(heard, given, strict=True):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).shape[0]
        assert event.index.shape == event.weights.shape == (tokens, event.layer.top_k)
        assert torch.equal(event.index, index.reshape(event.index.shape))
        assert torch.equal(event.weights, weights.reshape(event.index.shape))
        assert not event.is_recomputation
        if event.logits is not None:
            assert event.logits.shape[0] == tokens
            assert event.logits.shape[1] >= event.layer.num_experts


def test_padding_is_told_from_tokens():
    model = hf_moe_model()
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    heard = []
    with watch_routing(model, heard.append):
        model(input_ids=ids, attention_mask=mask)
        model(ids, mask)  # by position
        model(input_ids=ids)
    masks = [event.mask for event in heard]
    layers = len(moe_layers(model))
    assert all(torch.equal(found, mask.flatten().bool()) for found in masks[: 2 * layers])
    assert masks[2 * layers :] == [None] * layers


def test_generate_gives_each_new_token_its_own_mask():
    model = hf_moe_model().eval()
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    heard = []
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with watch_routing(wrapped, heard.append):
        wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    first = heard[0].layer.name
    masks = [event.mask for event in heard if event.layer.name == first]
    assert torch.equal(masks[0], mask.flatten().bool())
    assert [len(found) for found in masks[1:]] == [2] * (len(masks) - 1)
    assert len(masks) == 3
    assert all(found.all() for found in masks[1:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_says_so(reentrant):
    model, inputs = build_tiny("olmoe")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    heard = []
    with watch_routing(model, heard.append):
        model(**inputs).logits.sum().backward()
    layers = len(moe_layers(model))
    assert [event.is_recomputation for event in heard] == [False] * layers + [True] * layers


def test_nothing_is_left_behind():
    model = hf_moe_model()
    heard = []
    with pytest.raises(RuntimeError, match="stop"), watch_routing(model, heard.append):
        raise RuntimeError("stop")
    model(input_ids=torch.arange(6)[None])
    assert heard == []


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="no MoE layer"), watch_routing(torch.nn.Linear(2, 2), print):
        pass
