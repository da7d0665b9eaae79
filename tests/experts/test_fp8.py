"""Models whose experts transformers stores in fp8, against the dense weights that these stand for: equal bits."""

import inspect
import json
from unittest import mock

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import hf_moe
from hf_moe.adapters.expert_lora import MergeError
from hf_moe.experts.backends import BACKENDS, OURS, choose, refusal
from hf_moe.experts.request import request_for
from hf_moe.kernels.layer_call import NO_FP8_GRADIENT
from hf_moe.layers.expert_rows import Plan
from hf_moe.layers.fp8_storage import OTHERWISE
from hf_moe.layers.packed_storages import UnreadableStorage
from hf_moe.layers.storage import storage_of
from hf_moe.observability.explain import explain_config
from storages import assert_compiles
from tiny_fp8 import quantise, with_fp8_experts
from tiny_lora import build, fill, outputs, results
from tiny_models import FAMILIES, build_tiny, experts_class

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3_moe", BF16)


def set_implementations(pair, name):
    """`hf_moe` itself takes compiled kernels for the dense model."""
    pair[0].set_experts_implementation(name)
    pair[1].set_experts_implementation("hf_moe_grouped" if name == "hf_moe" else name)


@pytest.mark.parametrize(("family", "implementation"), [("qwen3_moe", "hf_moe"), ("deepseek_v3", "hf_moe_reference")])
def test_equals_the_dense_model(family, implementation):
    model, inputs = build(family, BF16)
    pair = with_fp8_experts(model)
    set_implementations(pair, implementation)
    found = []
    for model in pair:
        for layer in hf_moe.moe_layers(model):
            layer.experts.requires_grad_(False)
        found.append(results(model, inputs))
    fp8, dense = found
    assert fp8.keys() == dense.keys()
    assert [key for key in fp8 if not torch.equal(fp8[key], dense[key])] == []
    assert str(hf_moe.explain(pair[0])).count("stored as fp8: hf_moe's backends run them") == 1


@pytest.mark.parametrize(
    ("block", "settings"),
    [
        (None, {}),  # a scale for each half, and for each matrix
        ((8, 32), {"scale_fmt": "ue8m0"}),
        ((12, 10), {"activation_scheme": "static"}),  # the last blocks of rows and columns are cut off
        ((32, 10), {"scale_fmt": "ue8m0"}),  # halves lower than a block
    ],
)
def test_layouts_of_scales(block, settings, qwen):
    experts, plain = (hf_moe.moe_layers(model)[0].experts for model in with_fp8_experts(qwen[0], block, **settings))
    storage, dense = storage_of(experts), storage_of(plain)
    assert (storage.format, storage.dtype, storage.num_experts) == ("fp8", BF16, 8)
    plan = Plan(torch.arange(6), torch.tensor([2, 2, 3, 3, 3, 3, 5, 5], dtype=torch.int32))
    for projection in ("up", "down"):
        rows = torch.randn(6, storage.shape(projection)[1], dtype=BF16)
        assert torch.equal(storage.linear(rows, projection, plan), dense.linear(rows, projection, plan))
    up, _, down, _, up_scale, down_scale = storage.operands()
    for values, scale in ((up, up_scale), (down, down_scale)):
        assert all(size % blocks == 0 for size, blocks in zip(values.shape, scale.shape, strict=True))


def changed(experts, name, value):
    setattr(experts, name, nn.Parameter(value, requires_grad=False))


def test_what_is_not_read_is_named(qwen):
    model = with_fp8_experts(qwen[0])[0]
    experts = hf_moe.moe_layers(model)[0].experts
    scale, values = experts.gate_up_proj_scale_inv.data, experts.down_proj.data

    def refused(match):
        storage = storage_of(experts)
        assert isinstance(storage, UnreadableStorage)
        with pytest.raises(ValueError, match=match):
            choose(request_for(experts, storage))

    changed(experts, "gate_up_proj_scale_inv", scale[:, :-1])
    refused(r"gate_up_proj is fp8 .*\(8, 16\) with float32 \[8, 5, 2\].*dequantize=True")
    changed(experts, "gate_up_proj_scale_inv", scale.to(torch.int32))
    refused("with scales int32")
    changed(experts, "gate_up_proj_scale_inv", scale)
    changed(experts, "down_proj", values.bfloat16())
    refused(r"down_proj is bfloat16 \[8, 32, 24\] with scales")
    changed(experts, "down_proj", values)
    experts.config.model_type = "gpt_oss"
    refused("fp8 experts of gpt_oss lack what it computes with, interleaved columns and biases")


def has_its_own_form(family):
    facts = inspect.getclosurevars(experts_class(family).__init__).nonlocals  # of transformers' decorator
    flags = ("has_bias", "is_transposed", "has_post_expert_norm")
    own_gate = experts_class(family)._apply_gate.__module__ != "transformers.integrations.moe"
    return own_gate or not facts["is_concatenated"] or any(facts.get(flag) for flag in flags)


@pytest.mark.parametrize("family", list(filter(has_its_own_form, FAMILIES)))
def test_families_that_transformers_computes_otherwise_are_refused(family):
    """A family whose experts have a gate, a layout, biases or a norm of their own is computed as that, or refused."""
    experts = hf_moe.moe_layers(build_tiny(family)[0])[0].experts
    try:
        with torch.device("meta"):
            stands_in = FP8Experts(experts.config, has_bias=experts.has_bias, has_gate=experts.has_gate)
    except (AssertionError, AttributeError):  # biases; names of sizes
        assert experts.config.model_type in OTHERWISE
        return
    pre = 40 * torch.randn(5, 48)
    gates = (each._apply_gate(pre) for each in (experts, stands_in))
    is_alike = torch.allclose(*gates) and not getattr(experts, "has_post_expert_norm", False)
    assert is_alike != (experts.config.model_type in OTHERWISE)


@pytest.mark.parametrize(
    ("version", "capability", "match"),
    [("13.0", (8, 6), "from SM89 on, this GPU is SM86"), ("13.0", (8, 9), None), (None, (9, 4), "AMD's")],
)
def test_kernels_need_a_gpu_that_converts_fp8(version, capability, match, qwen):
    pytest.importorskip("triton")
    experts = hf_moe.moe_layers(with_fp8_experts(qwen[0])[0])[0].experts
    request = request_for(experts, storage_of(experts), torch.device("cuda"))
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch("torch.version.hip", None if version else "7.0"),
    ):
        reason = refusal(BACKENDS["hf_moe_triton"], request)
        assert choose(request).name == ("hf_moe_triton" if match is None else "hf_moe_grouped")
    assert (reason is None) if match is None else match in reason


def test_transformers_looks_our_names_up_for_fp8_experts():
    assert set(OURS) <= set(ALL_FP8_EXPERTS_FUNCTIONS.keys())


def test_adapters(qwen):
    model, inputs = qwen
    pair = [fill(get_peft_model(each, hf_moe.expert_lora_config(each, r=3))) for each in with_fp8_experts(model)]
    set_implementations([each.get_base_model() for each in pair], "hf_moe")
    with pytest.raises(ValueError, match=r"stored as fp8.*accelerate_adapters"):
        outputs(pair[0], inputs)
    for each in pair:
        hf_moe.accelerate_adapters(each)
    fp8, dense = (results(each, inputs) for each in pair)
    assert [key for key in fp8 if not torch.equal(fp8[key], dense[key])] == []
    with pytest.raises(MergeError, match="stored as fp8 cannot be merged into"):
        pair[0].merge_and_unload()


def save_fp8(model, folder, block):
    """A checkpoint as publishers store it: fp8 experts one by one, with inverse scales."""
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if ".experts." in name]:
        stored[name], stored[f"{name}_scale_inv"], _ = quantise(stored[name], block)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": list(block),
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return stored


def test_a_checkpoint_loads_runs_and_is_saved_as_it_was(qwen, tmp_path):
    model, inputs = qwen
    stored = save_fp8(model, tmp_path / "fp8", (8, 16))
    with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment", return_value=None):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", experts_implementation="hf_moe")
    expected = dict(with_fp8_experts(model)[0].named_parameters())
    assert {name: each.dtype for name, each in loaded.named_parameters()} == {n: p.dtype for n, p in expected.items()}
    assert all(torch.equal(each.float(), expected[name].float()) for name, each in loaded.named_parameters())
    found, of_config = hf_moe.explain(loaded), explain_config(str(tmp_path / "fp8"))
    experts = [p for layer in hf_moe.moe_layers(loaded) for p in layer.experts.parameters()]
    assert found.trainable_parameters == sum(p.numel() for p in loaded.parameters()) - sum(p.numel() for p in experts)
    assert any("The checkpoint stores fp8" in warning for warning in of_config.warnings)
    assert not any("The checkpoint" in warning for warning in found.warnings)
    out = outputs(loaded, inputs)
    with pytest.raises(ValueError, match=NO_FP8_GRADIENT[:30]):  # transformers loads them as if they were trained
        out.sum().backward()
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name].float(), stored[name].float()) for name in stored)


@pytest.mark.long
def test_torch_compile():
    model = with_fp8_experts(build("qwen3_moe", torch.float32)[0])[0]
    model.config.dtype = torch.float32
    model.set_experts_implementation("hf_moe_grouped")
    assert_compiles(hf_moe.moe_layers(model)[0].experts)
