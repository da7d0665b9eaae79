"""The rule from logits to weights, recognised from one forward, gives the weights of the next."""

import pytest
import torch

from hf_moe.layers.router_scores import SCORES, RouterScores, recognize_scores
from hf_moe.layers.watch_routing import watch_routing
from tiny_models import FAMILIES, build_tiny

# sparse mixing with a threshold of its own; weights shared with the experts that every token takes
UNRECOGNIZED = {"phimoe", "inkling"}


def decisions(model, inputs):
    heard = []
    with torch.no_grad(), watch_routing(model, heard.append):
        model(**inputs)
    return heard


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_but_two_is_recognized(family):
    model, inputs = build_tiny(family)
    first = decisions(model, inputs)
    rules = {event.layer.name: recognize_scores(event.logits, event.index, event.weights) for event in first}
    if family in UNRECOGNIZED:
        assert set(rules.values()) == {None}
        return
    assert None not in rules.values()
    # other tokens
    changed = {name: value.flip(0).roll(1, 1) for name, value in inputs.items()}
    for event in decisions(model, changed):
        rule = rules[event.layer.name]
        torch.testing.assert_close(
            rule.weights(event.logits, event.index), event.weights.float(), rtol=1e-4, atol=1e-6
        )
        assert rule.probabilities(event.logits).sum(-1).allclose(torch.ones(len(event.logits)), atol=1e-5)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_rule_is_recognized_from_its_own_weights(scores, normalized, dtype):
    logits = torch.rand(32, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * 3
    index = logits.topk(3).indices
    rule = RouterScores(scores, normalized, 2.5)
    found = recognize_scores(logits, index, rule.weights(logits, index).to(dtype))
    assert (found.scores, found.normalized) == (scores, normalized)
    assert found.factor == pytest.approx(2.5, rel=0.01)


def test_unused_slots_do_not_count():
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    index = logits.topk(2).indices
    weights = RouterScores("softmax", False, 1.0).weights(logits, index)
    index[:5, 1], weights[:5, 1] = 4, 0.0
    assert recognize_scores(logits, index, weights) == RouterScores("softmax", False, 1.0)


def test_weights_that_follow_no_rule_are_not_recognized():
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    assert recognize_scores(logits, logits.topk(2).indices, torch.rand(16, 2)) is None


def test_the_weights_have_the_logits_gradient():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    index = logits.topk(2).indices
    assert torch.autograd.gradcheck(lambda x: RouterScores("sigmoid", True, 2.5).weights(x, index), (logits,))
