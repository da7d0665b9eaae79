"""A replayed model sends each token where it was recorded, and learns from the weights that it gives."""

import pytest
import torch

from hf_moe.layers.moe_layers import moe_layers
from hf_moe.models.modeling_hf_moe import HfMoeModel
from hf_moe.observability.recording import record_routing
from hf_moe.observability.replay import replay_routing
from hf_moe.observability.routing_trace import RoutingTrace
from tiny_hf_moe import encoder_config
from tiny_models import build_tiny
from tiny_moe import hf_moe_model, qwen_model, with_expert_lora

pytest.importorskip("pyarrow")
IDS = torch.arange(1, 49).view(4, 12)
# every way to make weights of scores: softmax over all or over the chosen, sigmoid with groups and bias
PERTURBED = ("olmoe", "mixtral", "gpt_oss", "deepseek_v3")


def record(model, **inputs):
    with torch.no_grad(), record_routing(model, "tokens") as trace:
        model(**(inputs or {"input_ids": IDS}))
    return trace


def perturb(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.add_(torch.randn_like(layer.router.weight) * 0.3)
    return model


def ids_of(trace):
    return [trace.tokens.layer(name).experts.tolist() for name in trace.layers]


@pytest.mark.parametrize("family", PERTURBED)
@pytest.mark.parametrize("weights", ["recomputed", "recorded"])
def test_a_changed_model_routes_as_recorded(family, weights):
    model, inputs = build_tiny(family)
    inputs["attention_mask"][0, :3] = 0
    trace = record(model, **inputs)
    perturb(model)
    assert ids_of(record(model, **inputs)) != ids_of(trace)
    with replay_routing(model, trace, weights=weights):
        replayed = record(model, **inputs)
    assert ids_of(replayed) == ids_of(trace)
    same = [(replayed.tokens.layer(name).weights == trace.tokens.layer(name).weights).all() for name in trace.layers]
    assert same == [weights == "recorded"] * len(same)


def test_recomputed_weights_are_those_of_the_router():
    """Forced to a router's own second and third choice, softmax weights are shared between these."""
    model = qwen_model()
    model.config.norm_topk_prob = True
    for layer in moe_layers(model):
        layer.router.norm_topk_prob = True
    trace = record(model)
    rows = list(trace.tokens.rows())
    wanted = []
    for row in rows:
        for experts in row.experts.values():
            experts[:] = (experts + 1) % 8
    calls = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda module, args, output: wanted.append(output[0]))
        layer.experts.register_forward_hook(lambda module, args, output: calls.append(args))
    with torch.no_grad(), replay_routing(model, rows):
        model(input_ids=IDS)
    for logits, (_, index, weights), name in zip(wanted, calls, trace.layers, strict=True):
        forced = torch.tensor([row.experts[name].tolist() for row in rows]).view(-1, 2)
        assert torch.equal(index, forced)
        probabilities = logits.softmax(-1).gather(-1, forced)
        assert torch.allclose(weights, probabilities / probabilities.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_router_learns_from_recomputed_weights(reentrant):
    model = hf_moe_model(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    trace = record(model)
    perturb(model).train()

    def gradient(**options):
        model.zero_grad()
        with replay_routing(model, trace, **options):
            model(input_ids=IDS, labels=IDS).loss.backward()
        return [layer.router.weight.grad for layer in moe_layers(model)]

    plain = gradient()
    assert all(grad.abs().sum() > 0 for grad in plain)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert all(torch.equal(*pair) for pair in zip(gradient(), plain, strict=True))
    without = gradient(weights="recorded")
    assert all(grad is None or not grad.any() for grad in without), "recorded weights carry no gradient"


def test_other_batches_and_beginnings_of_rows():
    model = hf_moe_model()
    trace = record(model)
    perturb(model)
    mixed = torch.zeros(3, 12, dtype=torch.long)
    mixed[0], mixed[1, 7:], mixed[2] = IDS[3], IDS[1, :5], IDS[0]
    mask = torch.ones_like(mixed)
    mask[1, :7] = 0
    with replay_routing(model, trace):
        replayed = record(model, input_ids=mixed, attention_mask=mask)
    sources = list(trace.tokens.rows())
    for row, (number, length) in zip(replayed.tokens.rows(), [(3, 12), (1, 5), (0, 12)], strict=True):
        for name in trace.layers:
            assert row.experts[name].tolist() == sources[number].experts[name][:length].tolist()


def test_training_on_what_generate_made():
    model = hf_moe_model()
    with record_routing(model, "tokens") as trace:
        made = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    perturb(model)
    too_long = r"at position 16 it has no further token.*unrecorded='own'"
    with pytest.raises(ValueError, match=too_long), replay_routing(model, trace):
        model(input_ids=made)
    with replay_routing(model, trace, unrecorded="own"):
        replayed = record(model, input_ids=made)
    for new, old in zip(replayed.tokens.rows(), trace.tokens.rows(), strict=True):
        assert len(new.token_ids) == len(old.token_ids) + 1
        assert all(new.experts[name][:-1].tolist() == old.experts[name].tolist() for name in trace.layers)


def test_generate_itself_can_be_replayed():
    model = hf_moe_model()
    options = {"input_ids": IDS, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with record_routing(model, "tokens") as trace:
        made = model.generate(**options)
    whole = record(model, input_ids=made)
    with record_routing(model, "tokens") as again, replay_routing(model, whole):
        assert torch.equal(model.generate(**options), made)
    assert ids_of(again) == ids_of(trace)


def test_from_disk_into_another_precision_and_an_adapter(tmp_path):
    model = hf_moe_model()
    record(model).save(tmp_path / "trace")
    trace = RoutingTrace.load(tmp_path / "trace")
    other = with_expert_lora(perturb(hf_moe_model()).to(torch.bfloat16))
    with replay_routing(other, trace):
        assert ids_of(record(other)) == ids_of(trace)


def test_null_experts_and_drops_are_replayed():
    model = hf_moe_model(num_null_experts=4, capacity_factor=0.5).train()
    trace = record(model)
    perturb(model)
    assert trace.statistics(trace.layers[0]).dropped > 0
    with replay_routing(model, trace):
        assert ids_of(record(model)) == ids_of(trace)


def test_other_tokens_are_refused_by_row_and_position():
    model = hf_moe_model()
    trace = record(model)
    other = IDS.clone()
    other[2, 7] = 63
    where = r"row 2 of the call.* row 2 is closest: at position 7 it has token 32.* 63"
    with pytest.raises(ValueError, match=where), replay_routing(model, trace):
        model(input_ids=other)
    with pytest.raises(ValueError, match="call the model with input_ids"), replay_routing(model, trace):
        model(inputs_embeds=torch.zeros(1, 4, 32))


def test_what_cannot_be_replayed_is_refused():
    model = hf_moe_model()
    trace = record(model)
    cases = [
        (qwen_model(), trace, "trace and model differ"),
        (hf_moe_model(num_experts=4), trace, r"'model.layers.0.mlp', 8, 2\) and \('model.layers.0.mlp', 4, 2\)"),
        (model, [], "no recorded row"),
    ]
    with record_routing(model) as counts:
        model(input_ids=IDS)
    cases.append((model, counts, "holds no tokens"))
    with record_routing(model, "tokens", audit=True) as audit:
        model(input_ids=IDS)
    cases.append((model, audit, "an audit holds no token ids"))
    for target, source, message in cases:
        with pytest.raises(ValueError, match=message), replay_routing(target, source):
            pass
    with pytest.raises(ValueError, match="weights must be one of"), replay_routing(model, trace, weights="own"):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_that_choose_their_tokens_are_refused():
    torch.manual_seed(0)
    model = HfMoeModel(encoder_config(routing="expert_choice")).eval()
    trace = record(model)
    with pytest.raises(ValueError, match="their routing cannot be replaced"), replay_routing(model, trace):
        model(input_ids=IDS)


def test_unknown_scores_are_refused_where_they_matter():
    model = hf_moe_model()
    trace = record(model)
    perturb(model)
    moe_layers(model)[0].router.register_forward_hook(
        lambda module, args, output: output._replace(top_k_weights=torch.rand_like(output.top_k_weights))
    )
    with pytest.raises(ValueError, match=r"not recognised.*weights='recorded'"), replay_routing(model, trace):
        model(input_ids=IDS)
    with replay_routing(model, trace, weights="recorded"):
        assert ids_of(record(model)) == ids_of(trace)


def test_checkpointing_after_several_forwards_is_refused():
    model = hf_moe_model()
    trace = record(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with replay_routing(model, trace):
        first = model(input_ids=IDS[:2], labels=IDS[:2]).loss
        with torch.no_grad():
            model(input_ids=IDS[2:])
        first.backward()
        one, two = (model(input_ids=part, labels=part).loss for part in IDS.split(2))
        with pytest.raises(ValueError, match="Call backward before the next forward"):
            (one + two).backward()
