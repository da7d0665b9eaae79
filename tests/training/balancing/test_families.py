"""Every family's routers get a gradient from both losses; the bias that is updated is one that shifts the choice."""

import pytest
import torch
import transformers
from packaging.version import parse

from hf_moe.layers.watch_routing import watch_routing
from hf_moe.training.balancing.bias_update import correction_bias
from hf_moe.training.balancing.checks import BalancingError, balanced_layers
from hf_moe.training.balancing.mixin import BalancingConfig, _BalancingRun
from hf_moe.training.balancing.terms import BalancingTerms
from tiny_models import FAMILIES, build_tiny

UNRECOGNIZED = {"phimoe", "inkling"}
PROBABILITIES = {"gemma4", "diffusion_gemma"}
SHARE = torch.tensor(1.0)


def losses_of(model, inputs, config):
    terms = BalancingTerms(config, balanced_layers(model, config))
    with watch_routing(model, terms.add):
        model(**inputs)
    return terms.losses(SHARE)


def returns_logits(model, inputs):
    events = []
    with torch.no_grad(), watch_routing(model, events.append):
        model(**inputs)
    return all(event.logits is not None and event.logits.shape[-1] >= event.layer.num_experts for event in events)


def trained_routers(model, config):
    return {
        layer.name: [p for p in layer.router.parameters() if p.requires_grad]
        for layer in balanced_layers(model, config)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_its_losses_and_gradients(family):
    model, inputs = build_tiny(family)
    model.train()
    scores = "sigmoid" if family in UNRECOGNIZED else None
    z_loss = 0.0 if family in PROBABILITIES else 1.0
    config = BalancingConfig(aux_loss_coef=1.0, aux_loss_scope="layer", z_loss_coef=z_loss, scores=scores)
    if not returns_logits(model, inputs):
        assert parse(transformers.__version__) < parse("5.23")
        with pytest.raises(BalancingError, match="returns no logits of all experts"):
            losses_of(model, inputs, config)
        return
    losses = losses_of(model, inputs, config)
    # a sum of load times probability over X experts; random routers on few tokens are neither balanced nor collapsed
    assert 0.9 < losses["aux_loss"] < 4
    for term, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameters in trained_routers(model, config).items():
            assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters), (term, name)


def gradients(model, inputs, config):
    """Of the squared output and the balancing losses, as a training makes them."""
    run = _BalancingRun(config)
    run.open(model)
    model.zero_grad()
    torch.manual_seed(0)  # noise and dropout
    output = model(**inputs)
    loss = run.terms.attach(output[0].float().square().mean())
    (loss + run.terms.weighted_sum(run.terms.losses(SHARE))).backward()
    run.close()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_alike_under_reentrant_checkpointing(family):
    model, inputs = build_tiny(family)
    if not returns_logits(model, inputs):
        pytest.skip("this transformers returns no logits: refused, see above")
    model.train()
    scores = "sigmoid" if family in UNRECOGNIZED else None
    config = BalancingConfig(aux_loss_coef=1.0, aux_loss_scope="layer", scores=scores)
    expected = gradients(model, inputs, config)
    for value in inputs.values():  # of a model that takes embeddings
        value.requires_grad_(value.is_floating_point())
    try:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        model(**inputs)[0].float().square().mean().backward()
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"not in transformers itself: {error}")
    actual = gradients(model, inputs, config)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()) + 1e-8)


@pytest.mark.parametrize("family", sorted(UNRECOGNIZED & set(FAMILIES)))
def test_an_unrecognised_rule_is_refused(family):
    model, inputs = build_tiny(family)
    with pytest.raises(BalancingError, match=r"not recognised .*scores='softmax'"):
        losses_of(model.train(), inputs, BalancingConfig(aux_loss_coef=1.0))


@pytest.mark.parametrize("family", sorted(PROBABILITIES & set(FAMILIES)))
def test_the_z_loss_of_probabilities_is_refused(family):
    model, inputs = build_tiny(family)
    with pytest.raises(BalancingError, match="returns probabilities, not logits"):
        losses_of(model.train(), inputs, BalancingConfig(z_loss_coef=1.0))


# what the models' sources call a bias of the choice, independent of the package's own list
BIAS_NAMES = ("correction_bias", "expert_bias", "balancing_bias")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_of_every_family_shifts_the_choice_alone(family):
    """A large bias sends every token to an expert; a family without one is refused."""
    model, inputs = build_tiny(family)
    config = BalancingConfig(bias_update_rate=0.1)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not any(name.rpartition(".")[2].startswith(BIAS_NAMES) or "correction_bias" in name for name, _ in tensors):
        with pytest.raises(BalancingError, match="keeps no correction bias"):
            balanced_layers(model, config)
        return
    layers = {layer.name: layer for layer in balanced_layers(model, config)}
    for layer in layers.values():
        bias = correction_bias(model, layer)[1]
        bias.zero_()
        bias.view(-1)[3] = 100.0
    events = []
    with torch.no_grad(), watch_routing(model, events.append):
        model(**inputs)
    assert {event.layer.name for event in events} >= layers.keys()
    for event in events:
        if event.layer.name in layers:
            assert (event.index == 3).any(-1).all(), event.layer.name
            assert event.weights.abs().max() < 50  # the bias is no part of them
