"""`explain` names what a model consists of, counted against the weights and against counts worked out by hand."""

import importlib.util
import json
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

from hf_moe.layers.moe_layers import moe_layers
from hf_moe.models.configuration_hf_moe import HfMoeConfig
from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM
from hf_moe.observability.explain import explain, explain_config
from tiny_hf_moe import tiny_config as tiny_hf_moe_config
from tiny_models import EXPERTS, FAMILIES, HIDDEN, TOP_K, WIDTH, build_tiny


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model, _ = build_tiny(family)
    explained = explain(model)
    assert explained.total_parameters == explained.trainable_parameters + frozen(model) == count(model)
    layers = moe_layers(model)
    routed = sum(p.numel() for layer in layers for p in layer.experts.parameters() if p.shape[0] == layer.num_experts)
    used = sum(layer.top_k * layer.num_expert_parameters for layer in layers)
    assert explained.active_parameters == count(model) - routed + used
    assert sum(group.count for group in explained.layers) == len(layers)
    assert explained.router == "trainable"
    assert explained.backend == model.config._experts_implementation
    assert explained.warnings == ()
    assert json.loads(json.dumps(explained.to_dict()))["model_type"] == model.config.model_type


def frozen(model):
    return sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_counts_of_mixtral_8x7b():
    """The published 46.7B total and 12.9B active."""
    config = transformers.MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        dtype="bfloat16",
    )
    explained = explain_config(config)
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    layer = attention + 8 * 4096 + 2 * 4096
    expert = 3 * 4096 * 14336
    rest = 2 * 32000 * 4096 + 4096 + 32 * layer
    assert explained.total_parameters == rest + 32 * 8 * expert == 46_702_792_704
    assert explained.active_parameters == rest + 32 * 2 * expert == 12_879_925_248
    assert explained.dtype == "bfloat16"
    assert str(explained).splitlines()[:2] == [
        "MixtralForCausalLM (mixtral), bfloat16",
        "parameters: total 46.70B, active per token 12.88B, trainable 46.70B",
    ]
    assert "  model.layers.0-31.mlp: 8 experts, top-2, width 14336, hidden 4096, router trainable" in str(explained)


def test_config_of_a_checkpoint_folder(tmp_path):
    model = HfMoeForCausalLM(tiny_hf_moe_config(num_shared_experts=1, first_k_dense_replace=1))
    model.save_pretrained(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()  # not needed
    from_folder, from_model = explain_config(str(tmp_path)), explain(model)
    assert from_folder.layers == from_model.layers
    assert from_folder.total_parameters == from_model.total_parameters == count(model)
    assert [group.layers for group in from_folder.layers] == ["model.layers.1-2.mlp"]
    with pytest.raises(OSError, match="nowhere"):
        explain_config(str(tmp_path / "nowhere"))


def test_a_config_is_judged_for_the_device_of_this_machine():
    config = tiny_hf_moe_config()
    config._experts_implementation = "hf_moe"
    loaded, unloaded = explain(HfMoeForCausalLM(config)), explain_config(config)
    assert "meta" not in str(unloaded)
    if not torch.cuda.is_available():
        assert (unloaded.refusals, unloaded.choices) == (loaded.refusals, loaded.choices)


def test_where_many_rows_decide_both_choices_are_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    config = tiny_hf_moe_config(dtype="bfloat16")
    config._experts_implementation = "hf_moe"
    few, many = explain_config(config).choices
    assert few.startswith("hf_moe runs hf_moe_triton: ")
    assert many.startswith("With many rows, hf_moe runs hf_moe_grouped: ")
    assert many.endswith("1024 rows an expert (assumed, not measured).")


def test_config_of_the_default_hf_moe():
    explained = explain_config(HfMoeConfig())
    assert explained.model_class == "HfMoeForCausalLM"
    assert 6.8e9 < explained.total_parameters < 7.0e9
    assert 1.2e9 < explained.active_parameters < 1.3e9


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "openai_privacy_filter"])
def test_config_of_models_that_are_not_causal_only(family):
    config = {
        "qwen3_vl_moe": transformers.Qwen3VLMoeConfig,
        "openai_privacy_filter": transformers.OpenAIPrivacyFilterConfig,
    }[family]()
    assert explain_config(config).layers


def test_layers_of_different_shape_stand_apart():
    model = HfMoeForCausalLM(tiny_hf_moe_config(num_hidden_layers=4, per_layer_config={1: {"num_experts": 4}}))
    explained = explain(model)
    assert [(group.layers, group.num_experts) for group in explained.layers] == [
        ("model.layers.0,2-3.mlp", 8),
        ("model.layers.1.mlp", 4),
    ]
    assert [group.layers for group in explain(build_tiny("ernie4_5_vl_moe")[0]).layers] == [
        "layers.1-2.mlp.text_moe",
        "layers.1-2.mlp.vision_moe",
    ]


def test_peft():
    model, _ = build_tiny("qwen3_moe")
    bare = explain(model)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_parameters=targets, lora_dropout=0.0)
    explained = explain(peft.get_peft_model(model, config))
    adapter = 3 * 2 * EXPERTS * ((HIDDEN + 2 * WIDTH) + (WIDTH + HIDDEN))
    assert explained.trainable_parameters == adapter
    assert explained.total_parameters == bare.total_parameters + adapter
    assert explained.active_parameters == bare.active_parameters + adapter * TOP_K // EXPERTS
    assert explained.model_class == "Qwen3MoeForCausalLM"
    assert explained.router == "frozen"
    assert "base_model.model.model.layers.0-2.mlp: 8 experts" in str(explained)


def test_peft_copies_of_the_experts_are_not_active():
    model, _ = build_tiny("qwen3_moe")
    bare = explain(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts", "gate"])
    wrapped = peft.get_peft_model(model, config)
    explained = explain(wrapped)
    assert explained.total_parameters == count(wrapped)
    adapters = 3 * 2 * (HIDDEN + 4 * 8)  # q_proj
    copies_of_routers = 3 * EXPERTS * HIDDEN
    assert explained.active_parameters == bare.active_parameters + adapters + copies_of_routers
    assert explained.router == "trainable"


def test_partly_trainable_router():
    model, _ = build_tiny("mixtral")
    moe_layers(model)[1].router.requires_grad_(False)
    explained = explain(model)
    assert explained.router == "partly trainable"
    assert [(group.layers, group.router) for group in explained.layers] == [
        ("model.layers.0,2.mlp", "trainable"),
        ("model.layers.1.mlp", "frozen"),
    ]


def test_compiled_and_parallel():
    model, _ = build_tiny("mixtral")
    bare = explain(model)
    for wrapped in (torch.compile(model, backend="eager"), nn.ModuleDict({"module": model})):
        explained = explain(wrapped)
        assert explained.total_parameters == bare.total_parameters
        assert explained.active_parameters == bare.active_parameters
        assert explained.model_class == "MixtralForCausalLM"


class Unpack(nn.Module):
    def forward(self, packed):
        raise AssertionError("a weight was read")


@pytest.mark.parametrize("storage", ["int8_buffer", "flattened_parametrisation"])
def test_quantised_experts_count_fully(storage):
    model, _ = build_tiny("qwen3_moe")
    bare = explain(model)
    for layer in moe_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            weight = layer.experts._parameters.pop(name).detach()
            if storage == "int8_buffer":
                layer.experts.register_buffer(name, weight.to(torch.int8))
                layer.experts.register_buffer(f"{name}_scale", weight[..., :1])
            else:
                packed = nn.Parameter(weight.reshape(-1, 1)[::2].to(torch.uint8), requires_grad=False)
                layer.experts.register_parameter(name, packed)
                parametrize.register_parametrization(layer.experts, name, Unpack(), unsafe=True)
    explained = explain(model)
    assert explained.total_parameters == bare.total_parameters
    assert explained.active_parameters == bare.active_parameters
    assert explained.trainable_parameters < bare.trainable_parameters
    assert explained.refusals == {}
    kind = "int8" if storage == "int8_buffer" else "uint8"
    assert explained.dtype == kind
    (warning,) = explained.warnings
    assert f"stored as torch.{kind}: their quantiser decides" in warning


def test_packed_dense_weights_count_fully():
    model, _ = build_tiny("mixtral")
    total = explain(model).total_parameters
    projection = model.model.layers[0].self_attn.q_proj
    packed = nn.Parameter(torch.zeros(projection.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=projection.weight.shape)
    projection.weight = packed
    assert explain(model).total_parameters == total


def test_backend_and_refusals():
    model, inputs = build_tiny("mixtral", intermediate_size=23)
    explained = explain(model)
    assert "23 torch.float32 values are 92 bytes" in explained.refusals["grouped_mm"]
    assert {"eager", "batched_mm"}.isdisjoint(explained.refusals)
    (warning,) = explained.warnings
    assert warning.startswith("model.layers.0-2.mlp: The backend in use refuses: torch's grouped_mm")
    with pytest.raises(RuntimeError, match="16 bytes"):
        model(**inputs)
    model.set_experts_implementation("eager")
    explained = explain(model)
    assert explained.backend == "eager"
    assert explained.warnings == ()
    assert "runs now: eager." in str(explained)


def test_a_backend_that_the_table_does_not_know():
    transformers.integrations.moe.ExpertsInterface.register("someones", lambda *args: args[1])
    try:
        model, _ = build_tiny("mixtral")
        model.set_experts_implementation("someones")
        assert explain(model).warnings == (
            "model.layers.0-2.mlp: Backend 'someones' is not in hf_moe's table: what it refuses is not known.",
        )
    finally:
        del transformers.integrations.moe.ExpertsInterface._global_mapping["someones"]


def test_dense_model():
    explained = explain_config(transformers.LlamaConfig(num_hidden_layers=1))
    assert explained.layers == explained.warnings == ()
    assert explained.router == "none"
    assert explained.active_parameters == explained.total_parameters
    assert "MoE layers: 0" in str(explained)
    assert "backend" not in str(explained)


def test_not_a_model():
    with pytest.raises(TypeError, match=r"got str; for a config or a checkpoint folder use explain_config"):
        explain("some/folder")
