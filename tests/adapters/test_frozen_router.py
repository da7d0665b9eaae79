"""A router is frozen only if nothing can change it, and every way to change it is found."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from hf_moe.adapters.frozen_router import (
    RouterNotFrozenError,
    freeze_router,
    router_hash,
    verify_adapter_without_router,
    verify_router_frozen,
)
from hf_moe.models.moe_layers import moe_layers
from tiny_moe import EXPERT_PARAMETERS, MODELS, hf_moe_model, with_expert_lora


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def test_freeze_stops_gradients_into_the_routers_only(model):
    freeze_router(model)
    model.train()
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    routers = {id(parameter) for layer in moe_layers(model) for parameter in layer.router.parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in routers), name


def test_the_hash_survives_adapters_saving_and_loading(model, tmp_path):
    expected = router_hash(model)
    model.save_pretrained(tmp_path / "model")
    tuned = with_expert_lora(model)
    assert freeze_router(tuned) == expected
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    assert router_hash(loaded) == expected


def test_expert_lora_leaves_the_router_frozen(model):
    tuned = with_expert_lora(model)
    assert verify_router_frozen(tuned) == router_hash(model)


def nudge(router):
    router.weight.data.view(-1)[-1] += 1e-6


def cast(router):
    router.weight.data = router.weight.data.to(torch.bfloat16)


def swap(router):
    router.weight.data = router.weight.data.flip(0)


def buffer(router):
    router.register_buffer("e_score_correction_bias", torch.zeros(8))


@pytest.mark.parametrize("change", [nudge, cast, swap, buffer])
def test_every_change_changes_the_hash(model, change):
    expected = freeze_router(model)
    change(moe_layers(model)[-1].router)
    assert router_hash(model) != expected
    with pytest.raises(RouterNotFrozenError, match=f"sha256 [0-9a-f]+, expected {expected}"):
        verify_router_frozen(model, expected)


def test_routers_of_two_layers_cannot_be_exchanged(model):
    first, second = (layer.router for layer in moe_layers(model)[:2])
    expected = router_hash(model)
    first.weight.data, second.weight.data = second.weight.data.clone(), first.weight.data.clone()
    assert router_hash(model) != expected


def test_a_selection_bias_is_part_of_the_hash():
    model = hf_moe_model(router_scoring="sigmoid", router_bias=True)
    expected = router_hash(model)
    moe_layers(model)[0].router.e_score_correction_bias[0] += 0.5
    assert router_hash(model) != expected


def test_a_router_that_requires_a_gradient_is_refused(model):
    with pytest.raises(RouterNotFrozenError, match=r"model.layers.0.mlp.weight|layers.0.mlp.* requires a gradient"):
        verify_router_frozen(model)


ADAPTED = {
    "target_parameters": {"target_parameters": [*EXPERT_PARAMETERS, "mlp.gate.weight"]},
    "modules_to_save": {"modules_to_save": ["gate"]},
}


@pytest.mark.parametrize("case", ADAPTED)
def test_an_adapter_on_the_router_is_refused(model, case):
    tuned = with_expert_lora(model, **ADAPTED[case])
    for parameter in tuned.parameters():
        parameter.requires_grad_(False)  # so that only the structure can give it away
    with pytest.raises(
        RouterNotFrozenError, match=r"trains the router of .*mlp\. Take the router out of target_modules"
    ):
        verify_router_frozen(tuned)
    with pytest.raises(RouterNotFrozenError):
        freeze_router(tuned)


def test_an_adapter_on_a_linear_inside_a_router_is_refused():
    model = hf_moe_model()
    router = moe_layers(model)[1].router
    router.proj = nn.Linear(4, 4)
    tuned = with_expert_lora(model, target_modules=["proj"])
    with pytest.raises(RouterNotFrozenError):
        freeze_router(tuned)


def test_a_saved_adapter_holds_no_router(model, tmp_path):
    with_expert_lora(model).save_pretrained(tmp_path)
    verify_adapter_without_router(tmp_path, model)


@pytest.mark.parametrize("case", ADAPTED)
def test_a_saved_adapter_with_a_router_is_refused(model, case, tmp_path):
    tuned = with_expert_lora(model, **ADAPTED[case])
    tuned.save_pretrained(tmp_path)
    with pytest.raises(RouterNotFrozenError, match=r"holds '.*gate.*', a router's"):
        verify_adapter_without_router(tmp_path, tuned)


def test_a_model_without_routers_is_refused():
    for check in (freeze_router, verify_router_frozen, router_hash):
        with pytest.raises(ValueError, match="Linear has no MoE layer"):
            check(nn.Linear(2, 2))


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = hf_moe_model()
    with pytest.raises(ValueError, match="meta device"):
        router_hash(model)
