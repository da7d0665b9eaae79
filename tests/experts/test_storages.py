"""LoRA, adapter experts, checkpointing and torch.compile over weights that are no dense tensors."""

import copy

import peft
import pytest
import torch
from packaging import version
from peft import get_peft_model

import hf_moe
from hf_moe.adapters.adapter_experts import AdapterExpertsConfig
from hf_moe.adapters.esft import train_selected_experts
from hf_moe.adapters.expert_lora import MergeError, accelerate_adapters, merge_and_check
from hf_moe.adapters.expert_selection import ExpertSelection
from hf_moe.experts import backends
from hf_moe.experts.grouped import grouped_linear
from hf_moe.experts.pipeline import Operators
from hf_moe.kernels.cpu import low_rank as cpu_low_rank
from hf_moe.kernels.cpu import ops as cpu_ops
from hf_moe.kernels.layer_call import ExpertWeights
from hf_moe.layers.storage import storage_of
from hf_moe.layers.watch_routing import watch_routing
from storages import STORAGES, EightBits, FourBits, InAFile, assert_compiles, stored_as, touched
from tiny_lora import accelerated, adapted, assert_equal, build, outputs, results

FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h", "hf_moe")  # biases and transposed; ungated
IMPLEMENTATIONS = ("hf_moe", "hf_moe_grouped", "hf_moe_reference")


def on(model, implementation):
    model = copy.deepcopy(model)
    model.set_experts_implementation(implementation)
    return model


def experts_hit(model, inputs):
    """Experts that get rows, for each layer."""
    hit = {}
    with watch_routing(model, lambda routing: hit.update({routing.layer.name: routing.index.unique().tolist()})):
        outputs(model, inputs)
    return [hit[layer.name] for layer in hf_moe.moe_layers(model)]


def gradients(model, inputs):
    """The output, and the gradient of all that is trained beside the experts."""
    for layer in hf_moe.moe_layers(model):
        layer.experts.requires_grad_(False)
    model.zero_grad()
    out = outputs(model, inputs)
    out.square().sum().backward()
    return {"out": out.detach(), **{key: p.grad for key, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_dense_model(family, storage, implementation, tmp_path):
    double = family != "nemotron_h"  # its norms compute in float32
    model, inputs = build(family, torch.float64 if double else torch.float32)
    stored, dense = stored_as(model, storage, tmp_path)
    expected = gradients(dense, inputs)
    assert len(expected) > 10
    assert_equal(gradients(on(stored, implementation), inputs), expected, 1e-11 if double else 1e-4)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_equals_lora_over_the_dense_model(family, storage, tmp_path):
    double = family != "nemotron_h"
    model, inputs = build(family, torch.float64 if double else torch.float32)
    stored, dense = (accelerated(adapted(each)) for each in stored_as(model, storage, tmp_path))
    assert_equal(results(stored, inputs), results(dense, inputs), 1e-11 if double else 1e-4)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_same_operations_give_the_same_bits(storage, tmp_path):
    model, inputs = build("qwen3_moe", torch.float32)
    stored, dense = stored_as(model, storage, tmp_path)
    actual, expected = (gradients(on(each, "hf_moe_grouped"), inputs) for each in (stored, dense))
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("storage", STORAGES)
def test_only_experts_with_rows_are_unpacked(storage, lora, tmp_path):
    """Once in the forward, once more in the backward: nothing of them is kept."""
    model, inputs = build("mixtral", torch.float32, num_local_experts=32)
    inputs = {name: value[:1, :3] for name, value in inputs.items()}
    stored, _ = stored_as(model, storage, tmp_path)
    model = accelerated(adapted(stored)) if lora else on(stored, "hf_moe")
    hit = experts_hit(model, inputs)
    assert max(map(len, hit)) <= 6
    touched(model)
    once = [[(projection, expert) for projection in ("up", "down") for expert in experts] for experts in hit]
    out = outputs(model, inputs)
    assert touched(model) == once
    out.square().sum().backward()
    backward = touched(model)
    # the first layer's gradient ends at what is trained
    assert [sorted(pairs) for pairs in backward[1:]] == [sorted(pairs) for pairs in once[1:]]
    assert set(backward[0]) <= set(once[0])


@pytest.mark.skipif(version.parse(peft.__version__) < version.parse("0.21"), reason="adapter experts need peft 0.21")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("implementation", ["hf_moe", "hf_moe_grouped"])
def test_adapter_experts(storage, implementation, tmp_path):
    model, inputs = build("qwen3_moe")
    results_of = []
    for each in stored_as(model, storage, tmp_path):
        torch.manual_seed(1)
        tuned = get_peft_model(on(each, implementation), AdapterExpertsConfig(num_adapter_experts=3, adapter_width=4))
        for name, parameter in tuned.named_parameters():
            if "adapter_experts_down" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        assert tuned.base_model.model.model.layers[0].mlp.experts.adapter_experts_up["default"].dtype == torch.float64
        results_of.append(results(tuned, inputs))
    assert_equal(*results_of)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_gradient_checkpointing_changes_no_bit(storage, reentrant, lora, tmp_path):
    model, inputs = build("qwen3_moe", torch.float32)
    stored, _ = stored_as(model, storage, tmp_path)
    model = accelerated(adapted(stored)) if lora else on(stored, "hf_moe")
    model.train()
    if lora:
        model.enable_input_require_grads()
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, value in gradients(model, inputs).items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.long), True], ids=["plain", "lora"])
@pytest.mark.parametrize("storage", [EightBits, FourBits, pytest.param(InAFile, marks=pytest.mark.long)])
def test_torch_compile(storage, lora, tmp_path):
    model, _ = build("mixtral", torch.float32)
    stored, _ = stored_as(model, storage, tmp_path)
    model = accelerated(adapted(stored)).get_base_model() if lora else on(stored, "hf_moe")
    assert_compiles(model.model.layers[0].mlp.experts)


@pytest.mark.parametrize("storage", STORAGES)
def test_layers_are_found_and_what_runs_is_explained(storage, tmp_path, caplog):
    model, inputs = build("gpt_oss", torch.float32)
    stored, dense = (on(each, "hf_moe") for each in stored_as(model, storage, tmp_path))
    sizes = [
        [(layer.num_experts, layer.hidden_size, layer.expert_width) for layer in hf_moe.moe_layers(each)]
        for each in (stored, dense)
    ]
    assert sizes[0] == sizes[1]
    backends._log_choice.cache_clear()
    outputs(stored, inputs)
    outputs(stored, inputs)
    explained = hf_moe.explain(stored)
    chosen = f"hf_moe runs hf_moe_grouped: hf_moe_cpu has no operators for weights stored as {storage.format}"
    assert chosen in str(explained)
    assert caplog.text.count(chosen) == 1
    assert f"Expert weights are stored as {storage.format}: hf_moe's backends run them" in str(explained)
    assert explained.refusals.keys() >= {"eager", "batched_mm", "grouped_mm", "hf_moe_cpu", "hf_moe_triton"}
    assert not explained.refusals.keys() & set(IMPLEMENTATIONS)
    assert explained.total_parameters == hf_moe.explain(dense).total_parameters
    stored.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert not any("left the experts" in warning for warning in hf_moe.explain(stored).warnings)
    assert sum(hf_moe.moe_layers(stored)[0].experts.expert_storage.nbytes().values()) > 0


@pytest.mark.parametrize("implementation", ["hf_moe_cpu", "hf_moe_triton"])
def test_a_backend_without_operators_for_it_is_refused_by_name(implementation, tmp_path):
    model, inputs = build("qwen3_moe", torch.float32)
    stored, _ = stored_as(model, EightBits, tmp_path)
    with pytest.raises(ValueError, match=f"{implementation} has no operators for weights stored as eight bits"):
        outputs(on(stored, implementation), inputs)


@pytest.mark.parametrize("merge", [merge_and_check, lambda model, **batch: model.merge_and_unload()])
def test_a_merge_is_refused_before_anything_is_changed(merge, tmp_path):
    model, inputs = build("qwen3_moe", torch.float32)
    stored, _ = stored_as(model, InAFile, tmp_path)
    tuned = accelerated(adapted(stored)).train()
    before, expected = copy.deepcopy(tuned.state_dict()), outputs(copy.deepcopy(tuned).eval(), inputs)
    with pytest.raises(MergeError, match="stored as in a file cannot be merged into: load the base unquantised"):
        merge(tuned, **inputs)
    assert tuned.training
    assert tuned.state_dict().keys() == before.keys()
    assert torch.equal(outputs(tuned.eval(), inputs), expected)


def test_an_adapter_that_would_have_no_effect_is_an_error(tmp_path):
    """Stock PEFT adds `B A` to the module's own tensors, which nothing reads here."""
    model, inputs = build("qwen3_moe", torch.float32)
    stored, _ = stored_as(model, EightBits, tmp_path)
    with pytest.raises(ValueError, match=r"stored as eight bits, so what parametrises .*accelerate_adapters"):
        outputs(on(adapted(stored).get_base_model(), "hf_moe"), inputs)


def test_slices_of_it_are_not_trained(tmp_path):
    model, _ = build("qwen3_moe", torch.float32)
    stored, _ = stored_as(model, EightBits, tmp_path)
    chosen = {layer.name: [0] for layer in hf_moe.moe_layers(stored)}
    selection = ExpertSelection.from_experts(stored, chosen)
    trainable = [p.requires_grad for p in stored.parameters()]
    with pytest.raises(ValueError, match=r"quantised or offloaded \(stored as eight bits\)"):
        train_selected_experts(stored, selection)
    assert [p.requires_grad for p in stored.parameters()] == trainable
    accelerate_adapters(adapted(stored))  # but their LoRA is


def fused_over_four_bits(kernel, calls):
    """An operator of a whole layer that reads packed values; a real one would not unpack them before."""

    def fused(call):
        calls.append(call.low_rank is not None)
        (up, up_scales, up_bias), (down, down_scales, down_bias) = call.experts["up"], call.experts["down"]
        matrices = [FourBits.unpack(up, up_scales), FourBits.unpack(down, down_scales)]
        if call.form.transposed:
            matrices = [stack.transpose(1, 2) for stack in matrices]
        return kernel(call._replace(experts=ExpertWeights(matrices[0], up_bias, matrices[1], down_bias)))

    return fused


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_fused_operator_for_a_format_reads_what_its_storage_gives(family, lora, tmp_path, monkeypatch):
    model, inputs = build(family)
    calls = []
    backends.BACKENDS["hf_moe_cpu"].load()
    fused = {
        ("four bits", False): fused_over_four_bits(cpu_ops.cpu_experts, calls),
        ("four bits", True): fused_over_four_bits(cpu_low_rank.cpu_experts_lora, calls),
    }
    monkeypatch.setitem(backends.OPERATORS, "hf_moe_grouped", Operators(grouped_linear, fused))
    stored, dense = stored_as(model, FourBits, tmp_path)
    if lora:
        stored, dense = (accelerated(adapted(each)) for each in (stored, dense))
    else:
        stored = on(stored, "hf_moe")
    read = results if lora else gradients
    assert_equal(read(stored, inputs), read(dense, inputs))
    assert calls == [lora] * len(hf_moe.moe_layers(stored))
    assert not any(touched(stored))
    experts = hf_moe.moe_layers(stored)[0].experts
    hidden, index, weights = torch.randn(5, 32).double(), torch.arange(10).view(5, 2) % 8, torch.rand(5, 2)
    torch.compiler.reset()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, index, weights), experts(hidden, index, weights))


def test_a_storage_that_is_a_module_moves_and_is_saved_with_the_model(tmp_path):
    model, inputs = build("qwen3_moe")
    stored, dense = (on(each, "hf_moe") for each in stored_as(model, FourBits, tmp_path))
    assert any("expert_storage.up_packed" in name for name in stored.state_dict())
    stored.float()
    experts = hf_moe.moe_layers(stored)[0].experts
    assert storage_of(experts).dtype is torch.float32
    torch.testing.assert_close(outputs(stored, inputs), outputs(dense.float(), inputs), rtol=1e-4, atol=1e-5)
    assert "transformers reads the module's own tensors" in hf_moe.explain(stored).refusals["eager"]
