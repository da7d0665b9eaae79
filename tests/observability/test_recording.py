"""Recorded counts are those of the experts' calls, once for each token, in every family and every way of running."""

import math
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_moe.layers.moe_layers import moe_layers
from hf_moe.models.modeling_hf_moe import HfMoeModel
from hf_moe.observability.recording import record_routing
from hf_moe.observability.replay import replay_routing
from hf_moe.observability.routing_trace import RoutingTrace
from tiny_hf_moe import encoder_config
from tiny_models import FAMILIES, build_tiny
from tiny_moe import hf_moe_model, qwen_model, with_expert_lora
from torchrun import torchrun

IDS = torch.arange(1, 49).view(4, 12)
# they send text and images to experts of their own, or take no ids: counts only
MANY = IDS.repeat(6, 1)  # enough tokens to be added at once, not gathered
NOT_BY_TOKEN = ("ernie4_5_vl_moe", "qwen3_omni_moe:Qwen3OmniMoeTalkerTextExperts")


def called_with(model):
    """By layer what its experts are called with, the hard way."""
    calls = {layer.plain_name: [] for layer in moe_layers(model)}
    for layer in moe_layers(model):
        layer.experts.register_forward_pre_hook(
            lambda module, args, kwargs, name=layer.plain_name: calls[name].append(
                [tensor.detach() for tensor in (*args, *kwargs.values())[1:3]]
            ),
            with_kwargs=True,
        )
    return calls


def expected(calls, size, keep=None):
    """Counts, weights and pairs by plain loops."""
    counts, mass, pairs = Counter(), Counter(), Counter()
    for index, weights in calls:
        index, weights = index.reshape(-1, index.shape[-1]), weights.reshape(-1, index.shape[-1])
        for token, (experts, given) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
            if keep is not None and not keep[token]:
                continue
            counts.update(experts)
            for expert, weight in zip(experts, given, strict=True):
                mass[expert] += weight
            chosen = set(experts)
            pairs.update((one, other) for one in chosen for other in chosen if one != other)
    return (
        [counts[expert] for expert in range(size)],
        pytest.approx([mass[expert] for expert in range(size)], rel=1e-4, abs=1e-6),
        {pair: count for pair, count in pairs.items() if max(pair) < size},
    )


def check(trace, model, calls, keep=None):
    for layer in moe_layers(model):
        found = trace.statistics(layer.plain_name)
        counts, mass, pairs = expected(calls[layer.plain_name], layer.num_experts, keep)
        assert found.counts.tolist() == counts
        assert found.weight_mass.tolist() == mass
        apart = found.coactivation - torch.diag(found.counts)
        assert {(i, j): int(apart[i, j]) for i, j in apart.nonzero().tolist()} == pairs
        assert found.counts.sum() + found.empty_slots == found.tokens * layer.top_k


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_and_replayed(family):
    model, inputs = build_tiny(family)
    inputs["attention_mask"][0, :3] = 0
    by_token = family not in NOT_BY_TOKEN
    keep = None if family == "ernie4_5_vl_moe" else inputs["attention_mask"].flatten().bool().tolist()
    calls = called_with(model)
    with torch.no_grad():
        with record_routing(model, "tokens" if by_token else "counts") as trace:
            wanted = model(**inputs)[0]
        check(trace, model, calls, keep)
        if by_token:
            assert trace.tokens.num_tokens == 13
            with record_routing(model, "tokens") as again, replay_routing(model, trace):
                replayed = model(**inputs)[0]
            assert torch.equal(replayed, wanted)
            for name in trace.layers:
                assert (again.tokens.layer(name).experts == trace.tokens.layer(name).experts).all()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_backends_do_not_matter(implementation):
    model, inputs = build_tiny("qwen3_moe", experts_implementation=implementation)
    model.set_experts_implementation(implementation)
    calls = called_with(model)
    with torch.no_grad(), record_routing(model) as trace:
        model(**inputs)
    check(trace, model, calls)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(reentrant):
    model, inputs = build_tiny("olmoe")
    with record_routing(model) as trace:
        model(**inputs)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with record_routing(model, "tokens") as recomputed:
        model(**inputs).logits.sum().backward()
        model(**inputs).logits.sum().backward()
    for name in trace.layers:
        assert torch.equal(recomputed.statistics(name).counts, 2 * trace.statistics(name).counts)
    assert recomputed.tokens.num_tokens == 2 * 16


def test_gathered_tokens_are_those_added_at_once():
    model = hf_moe_model(num_null_experts=4)
    mask = torch.ones_like(MANY)
    mask[0, :5] = 0
    calls = called_with(model)
    with torch.no_grad(), record_routing(model) as at_once:
        model(input_ids=MANY, attention_mask=mask)
    check(at_once, model, calls, mask.flatten().bool().tolist())
    with torch.no_grad(), record_routing(model) as gathered:
        model(input_ids=MANY[:1], attention_mask=mask[:1])
        for ids in MANY[1:].split(1):
            model(input_ids=ids)
    for name in at_once.layers:
        one, other = at_once.statistics(name), gathered.statistics(name)
        assert torch.equal(one.counts, other.counts)
        assert torch.equal(one.coactivation, other.coactivation)
        assert (one.tokens, one.dropped, one.empty_slots) == (other.tokens, other.dropped, other.empty_slots)
        assert (one.entropy_sum, one.margin_sum) == pytest.approx((other.entropy_sum, other.margin_sum), rel=1e-4)


@pytest.mark.slow
def test_a_compiled_model():
    model = qwen_model()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        with record_routing(compiled, "tokens") as trace:
            compiled(input_ids=IDS)
        assert trace.statistics(trace.layers[0]).tokens == 48
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        compiled(input_ids=IDS)
        with pytest.raises(RuntimeError, match="before its first call"), record_routing(compiled):
            compiled(input_ids=IDS)
    torch._dynamo.reset()


def test_generate_counts_prompt_and_new_tokens_once():
    model = with_expert_lora(hf_moe_model())
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with record_routing(model, "tokens") as trace:
        made = model.generate(
            input_ids=IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    # the last new token is never read
    lengths = [12 - 5 + 5, 17, 17, 17]
    assert made.shape == (4, 18)
    assert {trace.statistics(name).tokens for name in trace.layers} == {sum(lengths)}
    rows = list(trace.tokens.rows())
    assert [len(row.token_ids) for row in rows] == lengths
    assert rows[0].token_ids.tolist() == made[0, 5:-1].tolist()
    assert rows[3].token_ids.tolist() == made[3, :-1].tolist()
    with torch.no_grad(), record_routing(model, "tokens") as whole:
        model(input_ids=made[1:2, :-1])
    row = next(whole.tokens.rows())
    assert all((row.experts[name] == rows[1].experts[name]).all() for name in trace.layers)


@pytest.mark.parametrize("ids", [IDS, MANY], ids=["few", "many"])
def test_what_runs_in_inference_mode_or_autocast_adds_up(ids):
    model = hf_moe_model()
    with record_routing(model) as trace:
        with torch.inference_mode():
            model(input_ids=ids)
        model(input_ids=ids)
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids)
    for name in trace.layers:
        found = trace.statistics(name)
        assert found.counts.sum() == 3 * ids.numel() * 2
        assert found.coactivation.sum() == 2 * found.counts.sum()
        assert torch.equal(found.coactivation.diagonal(), found.counts)


def test_pairs_are_whole_under_autocast():
    model = hf_moe_model()
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.zero_()  # all tokens take the same two experts
    odd = IDS[:1, :11].repeat(47, 1)
    with torch.autocast("cpu", torch.bfloat16), record_routing(model) as trace:
        model(input_ids=odd)
    for name in trace.layers:
        assert sorted(trace.statistics(name).coactivation.flatten().tolist())[-4:] == [517] * 4


def test_probabilities_give_entropy_and_margin():
    model = hf_moe_model()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    logits = model(input_ids=IDS, attention_mask=mask, output_router_logits=True).router_logits
    with record_routing(model) as trace:
        model(input_ids=IDS, attention_mask=mask)
    for name, scores in zip(trace.layers, logits, strict=True):
        probabilities = scores[mask.flatten().bool()].double().softmax(-1)
        two = probabilities.topk(2).values
        found = trace.statistics(name)
        entropy = torch.special.entr(probabilities).sum(-1).mean() / math.log(8)
        assert found.router_entropy == pytest.approx(entropy.item(), rel=1e-5)
        assert found.margin == pytest.approx((two[:, 0] - two[:, 1]).mean().item(), rel=1e-4)
        assert found.scored_tokens == found.tokens == 44


def test_unknown_scores_are_reported_not_guessed():
    model = hf_moe_model()
    layer = moe_layers(model)[1]
    layer.router.register_forward_hook(
        lambda module, args, output: output._replace(top_k_weights=torch.rand_like(output.top_k_weights))
    )
    with record_routing(model) as trace:
        model(input_ids=IDS)
    metrics = trace.metrics()
    assert math.isnan(metrics[f"router_entropy/{layer.plain_name}"])
    assert not math.isnan(metrics["router_entropy/mean"])
    assert trace.model_facts["router_scores"][layer.plain_name] is None
    assert trace.model_facts["router_scores"][trace.layers[0]]["scores"] == "softmax"


def test_scores_that_change_their_meaning_are_no_longer_trusted():
    model = hf_moe_model()
    with record_routing(model) as trace:
        model(input_ids=MANY)
        for layer in moe_layers(model):
            layer.router.config.norm_topk_prob = False
        model(input_ids=MANY)
    assert trace.statistics(trace.layers[0]).tokens == 2 * MANY.numel()
    assert math.isnan(trace.metrics()["router_entropy/mean"])


def test_nan_in_a_router_is_warned_of(tmp_path):
    model = hf_moe_model()
    with torch.no_grad():
        moe_layers(model)[2].router.weight[0, 0] = torch.nan

    def record():
        with record_routing(model) as trace:
            model(input_ids=IDS)
        return trace

    with pytest.warns(UserWarning, match=r"not finite .* for 48 tokens in model\.layers\.2\.mlp:"):
        trace = record()
    assert [trace.statistics(name).scored_tokens for name in trace.layers] == [48, 48, 0]
    trace.save(tmp_path / "trace")
    assert math.isnan(RoutingTrace.load(tmp_path / "trace").statistics(trace.layers[2]).margin)


def test_drops_null_experts_and_unused_slots():
    model = hf_moe_model(num_null_experts=4, capacity_factor=0.5).train()
    calls = called_with(model)
    choices = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda module, args, output: choices.append(output.decision.choice))
    with record_routing(model) as trace:
        model(input_ids=IDS)
    check(trace, model, calls)
    for name, choice in zip(trace.layers, choices, strict=True):
        found = trace.statistics(name)
        null = int((choice >= 8).sum())
        assert found.dropped == 96 - int(found.counts.sum()) - null > 0
        assert found.empty_slots == null + found.dropped
        assert found.scored_tokens == found.tokens
    assert trace.metrics()["drop_share/mean"] > 0


def test_native_routers_do_not_tell_drops():
    model, inputs = build_tiny("mixtral")
    with record_routing(model) as trace:
        model(**inputs)
    assert trace.statistics(trace.layers[0]).dropped is None
    assert trace.statistics(trace.layers[0]).empty_slots == 0


def test_experts_that_choose_their_tokens():
    torch.manual_seed(0)
    model = HfMoeModel(encoder_config(routing="expert_choice")).eval()
    with record_routing(model) as trace:
        model(input_ids=IDS)
    for name in trace.layers:
        assert trace.statistics(name).counts.tolist() == [12] * 8
        assert trace.statistics(name).tokens == 48


def test_domains_may_nest_and_be_read_while_recording():
    model = hf_moe_model()
    with record_routing(model) as trace:
        with trace.domain("law"):
            model(input_ids=IDS[:1])
            with trace.domain("code"):
                model(input_ids=IDS[:2])
            assert trace.statistics(trace.layers[0], "code").tokens == 24
            model(input_ids=IDS[:1])
        model(input_ids=IDS)
    assert trace.domains == ["law", "code"]
    tokens = {domain: trace.statistics(trace.layers[0], domain).tokens for domain in ("law", "code", None)}
    assert tokens == {"law": 24, "code": 24, None: 96}
    model(input_ids=IDS)
    assert trace.statistics(trace.layers[0]).tokens == 96, "counted after the end"


@contextmanager
def counted_searches():
    """The calls of `moe_layers` while the block runs, whoever makes them."""
    searches = []
    sys.setprofile(lambda frame, event, _: searches.append(event) if frame.f_code is moe_layers.__code__ else None)
    try:
        yield searches
    finally:
        sys.setprofile(None)


def test_the_layers_are_searched_once():
    """Recording searched the model three times: for itself, for `explain` and for `watch_routing`."""
    model = hf_moe_model()
    with counted_searches() as searches, record_routing(model, "tokens") as trace:
        model(input_ids=IDS)
    assert searches.count("call") == 1
    with counted_searches() as searches, replay_routing(model, trace):
        model(input_ids=IDS)
    assert searches.count("call") == 1


def test_names_have_no_prefixes_of_wrappers():
    model = hf_moe_model()
    plain = [layer.plain_name for layer in moe_layers(model)]
    with record_routing(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) as trace:
        model(input_ids=IDS)
    assert trace.layers == plain
    assert trace.model_facts["model_class"] == "HfMoeForCausalLM"
    assert (trace.model_facts["experts"], trace.model_facts["top_k"], trace.model_facts["layers"]) == (8, 2, 3)


def test_layers_of_different_sizes():
    model = hf_moe_model(per_layer_config={1: {"num_experts": 4}})
    calls = called_with(model)
    with record_routing(model, "tokens") as trace:
        model(input_ids=IDS)
    check(trace, model, calls)
    assert trace.model_facts["experts"] == [8, 4, 8]


def test_a_recording_that_saw_nothing_says_so():
    model = hf_moe_model()
    with pytest.raises(RuntimeError, match="no token reached a router"), record_routing(model):
        pass
    with pytest.raises(ValueError, match="no MoE layer"), record_routing(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match="detail must be"), record_routing(model, "all"):
        pass
    with pytest.raises(ValueError, match="audit=True is for"), record_routing(model, audit=True):
        pass


def test_an_error_in_the_model_leaves_what_was_recorded():
    model = hf_moe_model()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    traces = []

    def interrupted():
        with record_routing(model, "tokens") as trace:
            traces.append(trace)
            model(input_ids=IDS)
            model(input_ids=IDS[:1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    trace = traces[0]
    assert trace.statistics(trace.layers[0]).tokens == 60
    assert trace.tokens.num_tokens == 48, "the forward that nothing followed is not complete for sure"
    assert len(list(trace.tokens.rows())) == 4
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_reduce_only_after_the_end_and_once():
    model = hf_moe_model()
    with record_routing(model) as trace:
        model(input_ids=IDS)
        with pytest.raises(RuntimeError, match="after the recording has ended"):
            trace.reduce()
    trace.reduce()  # one process: nothing to add
    assert trace.statistics(trace.layers[0]).tokens == 48
    with pytest.raises(RuntimeError, match="reduced before"):
        trace.reduce()


@pytest.mark.slow
def test_processes_add_up(tmp_path):
    torchrun(Path(__file__).with_name("traced_processes.py"), str(tmp_path))
    model = hf_moe_model()
    with record_routing(model) as wanted:
        with wanted.domain("even"):
            model(input_ids=IDS[::2])
        with wanted.domain("odd"):
            model(input_ids=IDS[1::2])
    for rank in range(2):
        found = RoutingTrace.load(tmp_path / f"trace-{rank}")
        assert found.domains == wanted.domains
        for domain in (None, "even", "odd"):
            for name in wanted.layers:
                one, other = found.statistics(name, domain), wanted.statistics(name, domain)
                assert torch.equal(one.counts, other.counts)
                assert torch.equal(one.coactivation, other.coactivation)
                assert one.entropy_sum == pytest.approx(other.entropy_sum)
