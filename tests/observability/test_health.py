"""The collapse cases, each recognised on six families; and what metrics alone do not show."""

import math

import pytest
import torch

from collapsed_routers import FAMILIES, neighbours, observe, steer, tiny, tokens
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.observability.health import diagnose
from hf_moe.observability.layer_statistics import LayerStatistics


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


def test_a_healthy_router(model):
    health = diagnose(observe(model, tokens()))
    assert (health.verdict, health.pattern, health.findings) == ("healthy", None, ())
    assert health.healthy


def test_all_tokens_on_one_expert_in_every_layer(model):
    steer(model, [neighbours(2)] * len(moe_layers(model)), 12)
    health = diagnose(observe(model, tokens()))
    assert (health.verdict, health.pattern) == ("collapsed", "same_expert")
    assert "busiest: 2, 3" in str(health) or "busiest: 3, 2" in str(health)


def test_each_layer_on_an_expert_of_its_own_is_seen_where_pooling_is_blind(model):
    layers = len(moe_layers(model))
    steer(model, [neighbours(2 * layer) for layer in range(layers)], 12)
    health = diagnose(observe(model, tokens()))
    assert (health.verdict, health.pattern) == ("collapsed", "own_expert")
    assert len(health.findings) == layers


def test_one_collapsed_layer_among_healthy_ones(model):
    layers = moe_layers(model)
    # the last: what a collapsed layer writes moves the ones after it
    steer(model, [*[()] * (len(layers) - 1), neighbours(4)], 12)
    health = diagnose(observe(model, tokens()))
    assert (health.verdict, health.pattern) == ("collapsed", "some_layers")
    assert [finding.layer for finding in health.findings] == [layers[-1].plain_name]


def test_dead_experts(model):
    layers = len(moe_layers(model))
    steer(model, [neighbours(6)] * layers, -12)
    health = diagnose(observe(model, tokens()))
    assert health.verdict == "dead_experts"
    assert len(health.findings) == layers
    assert all(finding.message.endswith(": 6, 7.") for finding in health.findings)


def test_a_slow_collapse_is_seen_before_it_is_complete(model):
    layers = len(moe_layers(model))
    history, verdicts = [], []
    for _ in range(16):
        now = observe(model, tokens())
        verdicts.append(diagnose(now, history).verdict)
        history.append(now)
        steer(model, [neighbours(0)] * layers, 0.2)
    assert verdicts[0] == "healthy"
    assert "collapsing" in verdicts
    assert verdicts.index("collapsing") < (verdicts.index("collapsed") if "collapsed" in verdicts else 16)


def test_steady_routing_with_noise_is_not_called_collapsing(model):
    history = [observe(model, tokens().roll(shift, 0)[: 15 - shift % 2]) for shift in range(8)]
    assert diagnose(history[-1], history[:-1]).verdict == "healthy"


# ---- from metrics alone


def layer(counts, top_k=1, name="0", **values):
    counts = torch.tensor(counts)
    weights = counts.double() * torch.linspace(0.5, 1, len(counts)).double()
    given = {"tokens": int(counts.sum()) // top_k, "weight_mass": weights, **values}
    return LayerStatistics(name, len(counts), top_k, counts=counts, **given)


def test_one_expert_chosen_by_nearly_all_is_named_beside_evenly_used_others():
    health = diagnose([layer([1000, *[143] * 7], top_k=2)])
    assert health.verdict == "one_takes_most"
    assert "expert 0 is chosen by 100% of the tokens (even: 25%)" in str(health)


def test_few_tokens_suffice_for_a_collapse_but_not_for_dead_experts():
    assert diagnose([layer([3, 2, 3, 0, 1, 2, 3, 2])]).verdict == "unknown"
    assert diagnose([layer([0, 30, 0, 0, 0, 0, 0, 1])]).verdict == "collapsed"
    assert diagnose([layer([1, 0, 0, 0, 0, 0, 0, 0])]).verdict == "unknown"
    assert diagnose([layer([0] * 8)]).verdict == "unknown"
    same = str(diagnose([layer([3, 2, 3, 0, 1, 2, 3, 2], name=name) for name in "ab"]))
    assert "Too few tokens to judge in all 2 layers: 16 tokens were seen" in same
    assert same.count("were seen") == 1, "what all layers share is told once"


def test_constant_weights_of_one_expert_per_token_give_no_gradient():
    counts = [200, 300, 250, 250]
    health = diagnose([layer(counts, weight_mass=torch.tensor(counts).double())])
    assert health.verdict == "no_gradient"
    assert "norm_topk_prob=False" in str(health)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad):
    assert diagnose([layer([500, 500], weight_mass=torch.tensor([1.0, bad]).double())]).verdict == "invalid"


def test_drops_are_named():
    assert diagnose([layer([500, 400], tokens=1200, empty_slots=300, dropped=300)]).verdict == "dropping"
    assert diagnose([layer([500, 400], tokens=1200, empty_slots=300)]).verdict == "healthy"


def test_experts_that_are_rarely_chosen_are_named_and_no_fault():
    rare, even = [500, 500, 500, 500, 30, 40], [400] * 6
    health = diagnose([layer(even, name="a"), layer(rare, name="b"), layer([500] * 5 + [40], name="c")])
    assert health.healthy
    assert health.rarely_chosen == {"b": (4, 5), "c": (5,)}
    assert health.note() == (
        "Rarely chosen (less than an eighth of an even load) in these 2,540 tokens: 2 experts of b (4, 5), and some "
        "of 1 more layer. They may serve other text."
    )
    assert str(health).endswith(health.note())
    assert diagnose([layer(even)]).note() == ""
    # no note beside a fault
    assert diagnose([layer(rare), layer([500, 500, 0, 500], name="d")]).note() == ""


def test_the_gravest_comes_first_then_the_worst_layer():
    dead = [[500] * (8 - i) + [0] * i for i in (1, 3, 2, 1, 1, 1)]
    layers = [layer(counts, name=f"layers.{i}.mlp") for i, counts in enumerate(dead)]
    health = diagnose([*layers, layer([1, 2000, 1, 1], name="layers.6.mlp")])
    assert [finding.kind for finding in health.findings] == ["collapsed", *["dead_experts"] * 6]
    assert [finding.layer[7] for finding in health.findings] == ["6", "1", "2", "0", "3", "4", "5"]
    lines = str(health).split("\n")
    assert lines[0].startswith("The router has collapsed")
    start = lines.index("Dead experts in 6 of 7 layers, worst first:")
    assert lines[start + 1] == "  layer 1: 3 of 8 experts got none of 2,500 tokens: 5, 6, 7."
    assert lines[start + 4 : start + 6] == [
        "  and 3 more layers.",
        "Likely cause: they fell behind early, or the text is of one narrow domain.",
    ]
    assert str(health).count("Likely cause: they fell behind") == 1


def test_bad_input():
    with pytest.raises(ValueError, match="no layer"):
        diagnose([])
    with pytest.raises(ValueError, match="same layers"):
        diagnose([layer([5, 5])], [[layer([5, 5], name="other")]])
