"""A router is frozen only if nothing can change it, and every way to change it is found."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_moe.adapters.frozen_router import (
    HASH_FILE,
    RouterNotFrozenError,
    freeze_router,
    report_auxiliary_losses,
    router_hash,
    save_router_hash,
    verify_adapter_base,
    verify_adapter_without_router,
    verify_router_frozen,
)
from hf_moe.layers.moe_layers import moe_layers
from tiny_hf_moe import DECODERS, tiny_config
from tiny_models import build_tiny
from tiny_moe import EXPERT_PARAMETERS, MODELS, hf_moe_model, with_expert_lora
from torchrun import torchrun


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


def rounding(router):
    router.weight.data = router.weight.data.to(torch.bfloat16)


def swap(router):
    router.weight.data = router.weight.data.flip(0)


def buffer(router):
    router.register_buffer("e_score_correction_bias", torch.zeros(8))


@pytest.mark.parametrize("change", [nudge, rounding, swap, buffer])
def test_every_change_changes_the_hash(model, change):
    expected = freeze_router(model)
    change(moe_layers(model)[-1].router)
    assert router_hash(model) != expected
    with pytest.raises(RouterNotFrozenError, match=f"sha256 [0-9a-f]+, expected {expected}"):
        verify_router_frozen(model, expected)


def stored_as(model, dtype):
    for layer in moe_layers(model):
        layer.router.to(dtype)
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hash_is_of_the_values_and_not_of_the_dtype_that_stores_them(family, dtype):
    """transformers 5.24 keeps the routers of 19 families in float32 where 5.23 had the checkpoint's bfloat16."""
    model = build_tiny(family)[0].bfloat16()
    expected = freeze_router(model)
    assert router_hash(stored_as(model, dtype)) == verify_router_frozen(model, expected) == expected


def test_a_float64_that_float32_cannot_hold_counts(model):
    stored_as(model, torch.float64)
    expected = router_hash(model)
    moe_layers(model)[0].router.weight.data[0, 0] *= 1 + 2.0**-50
    assert router_hash(model) != expected


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


# where families keep the bias that corrects the choice: in the router, in a module of it, or in the block
CORRECTIONS = {
    "deepseek_v3": "gate.e_score_correction_bias",
    "glm4_moe": "gate.e_score_correction_bias",
    "ernie4_5_moe": "gate.moe_statics.e_score_correction_bias",
    "minimax_m2": "e_score_correction_bias",
    "hy_v3": "e_score_correction_bias",
    "afmoe": "expert_bias",
    "lfm2_moe": "expert_bias",
    "zaya": "gate.balancing_biases",
    "gpt_oss": "router.bias",
}


@pytest.mark.parametrize("family", CORRECTIONS)
def test_the_hash_covers_the_bias_wherever_a_family_keeps_it(family):
    model, _ = build_tiny(family)
    layer = moe_layers(model)[-1]
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    bias = tensors[f"{layer.name}.{CORRECTIONS[family]}"]
    expected = freeze_router(model)
    assert not bias.requires_grad
    with torch.no_grad():
        bias.view(-1)[3] += 2.0**-10
    assert router_hash(model) != expected


def test_a_trainable_bias_in_the_block_is_refused():
    model, _ = build_tiny("minimax_m2")
    freeze_router(model)
    moe_layers(model)[1].experts.requires_grad_(True)
    block = model.get_submodule(moe_layers(model)[1].name)
    bias = block.e_score_correction_bias
    del block.e_score_correction_bias
    block.e_score_correction_bias = nn.Parameter(bias)
    with pytest.raises(RouterNotFrozenError, match=r"block.e_score_correction_bias requires a gradient"):
        verify_router_frozen(model)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_all_linear_trains_the_router_and_is_refused(family):
    model, _ = build_tiny(family)
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    with pytest.raises(RouterNotFrozenError, match="all-linear"):
        verify_router_frozen(tuned)
    with pytest.raises(RouterNotFrozenError):
        freeze_router(tuned)


@pytest.mark.slow
def test_the_proof_holds_for_routers_that_are_sharded_over_processes(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config(**DECODERS["shared_and_dense"]))
    model.save_pretrained(tmp_path / "model")
    torchrun(Path(__file__).with_name("sharded_routers.py"), str(tmp_path))
    for rank in range(2):
        outcomes = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        for layout, found in outcomes.items():
            # tensor parallelism leaves the router whole
            expected = {"hash": router_hash(model), "sharded": layout != "tp", "trainable": False}
            assert found == {**expected, "same base": True, "change": "found"}, (layout, rank)
        assert {verify_adapter_base(tmp_path / layout, model, strict=True) for layout in outcomes} == {True}


class Flat(nn.Module):
    """FSDP version 1 without its flat parameters: what tells it is the class."""


def test_shards_that_are_no_tensors_of_their_own_are_refused(model, monkeypatch):
    monkeypatch.setattr("hf_moe.adapters.sharded.FullyShardedDataParallel", Flat)
    model.wrapper = Flat()
    with pytest.raises(ValueError, match=r"Use version 2 \(fsdp_config"):
        router_hash(model)
    del model.wrapper
    moe_layers(model)[0].router.weight.ds_status = None
    with pytest.raises(ValueError, match="partitioned by DeepSpeed ZeRO-3"):
        freeze_router(model)


# ---- the record beside an adapter


@pytest.fixture
def adapter(model, tmp_path):
    """The folder of an adapter that was trained on `model`."""
    model.save_pretrained(tmp_path / "model")
    tuned = with_expert_lora(model)
    freeze_router(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    save_router_hash(tmp_path / "adapter", tuned)
    return tmp_path / "adapter"


def load_base(model, adapter, **settings):
    return type(model).from_pretrained(adapter.parent / "model", **settings)


def test_the_base_of_an_adapter_is_recognised(model, adapter):
    base = load_base(model, adapter)
    assert verify_adapter_base(adapter, base, strict=True)
    assert verify_adapter_base(adapter, PeftModel.from_pretrained(base, adapter), strict=True)


def test_another_base_is_refused_or_warned_about(model, adapter):
    base = load_base(model, adapter)
    moe_layers(base)[0].router.weight.data[0, 0] += 2.0**-10
    with pytest.warns(UserWarning, match="the routers differ from those that .*adapter' was trained with"):
        assert not verify_adapter_base(adapter, base)
    with pytest.raises(RouterNotFrozenError, match="Load the base that the adapter was trained on"):
        verify_adapter_base(adapter, base, strict=True)


def test_another_dtype_is_named(model, adapter):
    base = load_base(model, adapter, dtype=torch.bfloat16)
    with pytest.raises(RouterNotFrozenError, match=r"rounded: recorded in float32, here bfloat16\. Load the"):
        verify_adapter_base(adapter, base, strict=True)


def first_form(model):
    """The record of hf_moe before it had versions: dtype and bytes as they lay in memory."""
    digest, dtypes = hashlib.sha256(), set()
    for position, layer in enumerate(moe_layers(model)):
        tensors = dict([*layer.router.named_parameters(), *layer.router.named_buffers()])
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{position} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
    return {"router_sha256": digest.hexdigest(), "routers": 2, "dtype": ", ".join(sorted(dtypes))}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])  # deepseek_v3 has a bias in float32 beside
def test_records_of_the_first_form_are_still_verified(family, tmp_path):
    model = build_tiny(family)[0].bfloat16()
    for layer in moe_layers(model):
        layer.router.register_buffer("bias", torch.full((8,), 1 / 3))
    record = first_form(model)
    (tmp_path / HASH_FILE).write_text(json.dumps(record))
    assert record["router_sha256"] != router_hash(model)
    assert verify_adapter_base(tmp_path, model, strict=True)
    assert verify_adapter_base(tmp_path, stored_as(model, torch.float32), strict=True)
    moe_layers(model)[0].router.weight.data[0, 0] += 2.0**-20
    with pytest.raises(RouterNotFrozenError, match="the routers differ"):
        verify_adapter_base(tmp_path, model, strict=True)


def test_a_hash_of_the_first_form_that_was_kept_is_still_compared():
    model = build_tiny("qwen3_moe")[0].bfloat16()
    freeze_router(model)
    verify_router_frozen(model, first_form(model)["router_sha256"])


def test_the_record_has_a_version_and_a_later_one_is_refused(model, adapter):
    record = json.loads((adapter / HASH_FILE).read_text())
    assert record["version"] == 2
    (adapter / HASH_FILE).write_text(json.dumps({**record, "version": 3}))
    with pytest.raises(ValueError, match=r"is of version 3, this hf_moe reads up to 2\. Update hf_moe"):
        verify_adapter_base(adapter, model)


def test_an_adapter_without_a_record_cannot_be_checked(model, adapter):
    (adapter / HASH_FILE).unlink()
    with pytest.warns(UserWarning, match="cannot be told"):
        assert not verify_adapter_base(adapter, model)
    with pytest.raises(RouterNotFrozenError, match="has no router_hash"):
        verify_adapter_base(adapter, model, strict=True)


DAMAGED = ["", "[]", "{", '{"router_sha256": 5}', '{"router_sha256": "ABC"}', "[" * 100_000, json.dumps("a" * 64)]


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:20])
def test_a_damaged_record_is_refused(adapter, model, text):
    (adapter / HASH_FILE).write_text(text)
    with pytest.raises(ValueError, match=HASH_FILE):
        verify_adapter_base(adapter, model)


# ---- the auxiliary losses

AUXILIARY = {
    "hf_moe": lambda: hf_moe_model(router_aux_loss_coef=0.5, router_z_loss_coef=0.5),
    **{
        family: lambda family=family: build_tiny(family, router_aux_loss_coef=0.5, output_router_logits=True)[0]
        for family in ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "qwen3_5_moe")
    },
}


def losses(model):
    """The training loss as called by default and with the router logits asked for."""
    model.train()
    ids = torch.arange(4, 28).view(2, 12)
    return [float(model(input_ids=ids, labels=ids, **switch).loss) for switch in ({}, {"output_router_logits": True})]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("family", AUXILIARY)
def test_a_frozen_router_turns_the_auxiliary_losses_off(family, wrapped, caplog):
    model = AUXILIARY[family]()
    tuned = with_expert_lora(model) if wrapped else model
    before = losses(tuned)
    with caplog.at_level(logging.INFO, "hf_moe"):
        freeze_router(tuned)
    after = losses(tuned)
    assert after[0] == after[1] < min(before) - 0.4
    logged = [record.message for record in caplog.records if record.name.startswith("hf_moe")]
    assert [message[:25] for message in logged] == ["auxiliary losses are off,"]
    assert "a trainer of TRL that is built already keeps its own" in logged[0]
    assert "router_aux_loss_coef=0.5" in caplog.text
    assert model.config.get_text_config().router_aux_loss_coef == 0
    assert not report_auxiliary_losses(tuned)


@pytest.mark.parametrize("family", AUXILIARY)
def test_the_auxiliary_losses_stay_if_asked_for(family, caplog):
    model = AUXILIARY[family]()
    before = losses(model)
    freeze_router(model, keep_aux_loss=True)
    assert losses(model) == before
    assert "auxiliary losses are on with a frozen router" in caplog.text


def test_nothing_is_logged_where_no_auxiliary_loss_is_on(caplog):
    model, _ = build_tiny("qwen3_moe", router_aux_loss_coef=0.0)
    freeze_router(model)
    assert caplog.text == ""
    assert not report_auxiliary_losses(build_tiny("qwen3_moe", output_router_logits=False)[0])
