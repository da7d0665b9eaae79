"""Every family's decisions are heard once, as the experts get them, with the mask of the tokens."""

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_moe.layers.moe_layers import moe_layers
from hf_moe.layers.watch_routing import watch_routing
from hf_moe.models.modeling_hf_moe import CACHE, HfMoeModel
from tiny_hf_moe import encoder_config
from tiny_models import FAMILIES, build_tiny
from tiny_moe import hf_moe_model, qwen_model


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


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_the_hidden_states_go_through_what_the_listener_returns(family):
    model, inputs = build_tiny(family)
    given = []
    moe_layers(model)[1].experts.register_forward_hook(
        lambda module, args, kwargs, output: given.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model(**inputs)
    first = moe_layers(model)[1].name
    with watch_routing(model, lambda routing: torch.Tensor.neg if routing.layer.name == first else None):
        model(**inputs)
    assert torch.equal(given[1], -given[0])


def test_the_experts_get_what_the_listener_returns():
    model, inputs = build_tiny("olmoe")
    given = []
    moe_layers(model)[1].experts.register_forward_hook(lambda module, args, output: given.append(args))
    name = moe_layers(model)[1].name

    def choose_the_first(routing):
        if routing.layer.name == name:
            return torch.zeros_like(routing.index), routing.weights * 2
        return None

    heard = []
    with watch_routing(model, choose_the_first), watch_routing(model, heard.append):
        model(**inputs)
    _, index, weights = given[0]
    assert not index.any()
    assert heard[1].weights.equal(weights.reshape(heard[1].weights.shape)), "who listens later hears what is used"
    assert heard[0].index.any()
    too_few = watch_routing(model, lambda routing: (routing.index[:1], routing.weights[:1]))
    with too_few, pytest.raises(ValueError, match="their routing cannot be replaced"):
        model(**inputs)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("build", [hf_moe_model, qwen_model])
def test_what_the_model_was_called_with(build, name):
    model = build().eval()
    if name not in inspect.signature(model.forward).parameters:
        pytest.skip(f"{type(model).__name__} of this transformers has no argument {name}")
    ids = torch.arange(8).view(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    heard = []
    with torch.no_grad(), watch_routing(model, heard.append):
        cache = model(input_ids=ids, attention_mask=mask)[CACHE]
        grown = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        model(input_ids=ids[:, :1], attention_mask=grown, **{name: cache})
        model(inputs_embeds=torch.zeros(2, 4, 32))
        model(input_ids=ids[:, :1], **{name: cache})
    calls = [event.call for event in heard[:: len(moe_layers(model))]]
    assert heard[0].call is heard[1].call
    assert torch.equal(calls[0].input_ids, ids)
    assert [call.shape for call in calls] == [(2, 4), (2, 1), (2, 4), (2, 1)]
    assert [call.cached for call in calls] == [0, 4, 0, 5]
    assert calls[1].token_mask(2).tolist() == [True, True]
    assert calls[0].token_mask(6) is None, "a layer that sees other rows"
    assert calls[2].input_ids is None


def test_choices_before_the_capacity_and_of_null_experts():
    model = hf_moe_model(num_null_experts=4, capacity_factor=0.5).train()
    heard = []
    with watch_routing(model, heard.append):
        model(input_ids=torch.arange(24).view(2, 12))
    for event in heard:
        used = event.index < 8
        assert torch.equal(event.index[used], event.choice[used])
        assert ((event.choice < 8) & ~used).any(), "dropped"
        assert ((event.choice >= 8) & ~used).any(), "null"


def test_experts_that_choose_tokens_are_heard_by_token():
    model = build_encoder()
    heard = []
    with watch_routing(model, heard.append):
        model(input_ids=torch.arange(24).view(2, 12))
    assert [event.index.shape for event in heard] == [(24, 8)] * 3


def build_encoder():
    torch.manual_seed(0)
    return HfMoeModel(encoder_config(routing="expert_choice")).eval()


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
