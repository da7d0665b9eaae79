"""Mixtures of experts with vision or audio towers: loaded whole, trained on text, read again by stock PEFT."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.readable import UnreadableAdapterError, refuse_unreadable
from hf_moe.finetuning.other_towers import copy_processor, freeze_what_text_does_not_reach, has_other_towers
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.loading.auto_classes import whole_auto_class
from hf_moe.loading.pretrained import ModelError, load_language_model
from tiny_models import build_tiny
from tiny_multimodal import MULTIMODAL, build_multimodal

# no loss for text: its training is block diffusion
REFUSED = ("diffusion_gemma",)
TRAINED = tuple(kind for kind in MULTIMODAL if kind not in REFUSED)
# peft 0.21 renames an adapter's tensors on loading, and then finds no place for them
UNREADABLE = ("deepseek_ocr2", "mistral_large4", "unlimited_ocr")


def folder_of(kind, tmp_path):
    model, inputs = build_multimodal(kind)
    model.save_pretrained(tmp_path / kind)
    return model, inputs, str(tmp_path / kind)


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if kind not in UNREADABLE])
def test_an_adapter_trained_on_text_fits_the_whole_model_in_stock_peft(kind, tmp_path):
    """Until now the text model alone was trained, and its adapter did nothing on the whole one."""
    saved, inputs, folder = folder_of(kind, tmp_path)
    model = load_language_model(folder, dtype="auto", experts_implementation="hf_moe")
    assert type(model) is type(saved)
    weights = saved.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    plain = model(**inputs).logits
    model = get_peft_model(model, expert_lora_config(model, r=2))
    refuse_unreadable(model)
    freeze_router(model)
    accelerate_adapters(model)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):  # in the first only B moves
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    trained = model(**inputs).logits
    whole = whole_auto_class(saved.config).from_pretrained(folder)
    loaded = PeftModel.from_pretrained(whole, tmp_path / "adapter")
    assert (trained - plain).abs().max() > 1e-3
    torch.testing.assert_close(loaded(**inputs).logits, trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in UNREADABLE if kind in MULTIMODAL])
def test_an_adapter_that_peft_could_not_load_again_is_refused_before_training(kind):
    model, _ = build_multimodal(kind)
    with pytest.raises(UnreadableAdapterError, match=f"on {type(model).__name__} when it loads them"):
        refuse_unreadable(get_peft_model(model, expert_lora_config(model, r=2)))


@pytest.mark.parametrize("kind", TRAINED)
def test_what_text_does_not_reach_is_frozen(kind):
    model, inputs = build_multimodal(kind)
    assert has_other_towers(model)
    could_train = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = set(freeze_what_text_does_not_reach(model))
    assert frozen == {name for name in could_train if not model.get_parameter(name).requires_grad}
    for name in could_train:
        model.get_parameter(name).requires_grad_(True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert frozen == {name for name in could_train if model.get_parameter(name).grad is None}
    reached = [layer for layer in moe_layers(model) if f"{layer.experts_name}.down_proj" not in frozen]
    assert reached


def test_nothing_of_a_text_model_is_frozen():
    model, _ = build_tiny("qwen3_moe")
    assert not has_other_towers(model)
    assert freeze_what_text_does_not_reach(model) == []


@pytest.mark.parametrize("kind", REFUSED)
def test_a_class_without_a_loss_for_text_is_refused_before_its_weights_are_read(kind, tmp_path):
    _, _, folder = folder_of(kind, tmp_path)
    (tmp_path / kind / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="is no language model that gives logits and a loss for text alone"):
        load_language_model(folder)


def test_the_processor_is_copied(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "preprocessor_config.json").write_text("{}")
    (tmp_path / "to").mkdir()
    assert copy_processor(str(tmp_path / "from"), tmp_path / "to") == ["preprocessor_config.json"]
    assert (tmp_path / "to" / "preprocessor_config.json").read_text() == "{}"
    assert copy_processor(str(tmp_path / "to" / ".."), tmp_path) == []
