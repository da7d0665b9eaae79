"""Adapter experts leave the base bit for bit, are what plain torch says they are, and behave as PEFT users expect."""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from packaging import version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_moe
from hf_moe.adapters.adapter_experts import AdapterExpertsConfig, AdapterExpertsLayer, AdapterExpertsType
from hf_moe.adapters.adapter_experts.layer import route
from hf_moe.comparison.routing_agreement import record_choices, routing_agreement
from hf_moe.io.installation import install_command
from hf_moe.models.modeling_hf_moe import HfMoeForSequenceClassification
from numerics import assert_as_good_as
from tiny_hf_moe import DECODERS, encoder_config
from tiny_models import FAMILIES as NATIVE
from tiny_models import build_tiny
from tiny_moe import hf_moe_model, qwen_model

if version.parse(peft.__version__) < version.parse("0.21"):
    pytest.skip("adapter experts need peft 0.21", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("hf_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "nemotron_h")
SETTINGS = {"num_adapter_experts": 3, "adapter_width": 8, "top_k": 2}
IDS = torch.arange(3, 27).view(2, 12)


def build(family):
    if family == "hf_moe":
        return hf_moe_model(), {"input_ids": IDS}
    return build_tiny(family)


def attach(model, seed: int = 0, **settings):
    torch.manual_seed(seed)
    return get_peft_model(model, AdapterExpertsConfig(**{**SETTINGS, **settings}))


def adapter_parameters(model, adapter: str = "") -> dict:
    return {n: p for n, p in model.named_parameters() if ".adapter_experts_" in n and n.endswith(adapter)}


@torch.no_grad()
def perturb(model, seed: int = 1, adapter: str = ""):
    """Give every parameter of the adapter a value, so that each takes part."""
    torch.manual_seed(seed)
    for parameter in adapter_parameters(model, adapter).values():
        parameter.normal_(std=0.3)
    return model


@torch.no_grad()
def logits(model, inputs=None):
    return model(**(inputs or {"input_ids": IDS})).logits


def frozen_logits(model, inputs=None):
    """Of a base in the state in which an adapter has it: torch computes a frozen convolution another way."""
    return logits(model.requires_grad_(False), inputs)


# ---- what it computes


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "hf_moe"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bit_equal_at_initialisation(family, implementation):
    model, inputs = build(family)
    model.set_experts_implementation(implementation)
    expected, layers = frozen_logits(model, inputs), hf_moe.moe_layers(model)
    router_hash = hf_moe.router_hash(model)
    tuned = attach(model)
    assert torch.equal(logits(tuned, inputs), expected)
    assert hf_moe.freeze_router(tuned) == router_hash
    found = hf_moe.moe_layers(tuned)
    assert [layer.experts for layer in found] == [layer.experts for layer in layers]
    assert [layer.name for layer in found] == [f"base_model.model.{layer.name}" for layer in layers]
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained == adapter_parameters(tuned).keys()
    assert len(trained) == 3 * len(layers)


def plain_adapter(rows_TH, gate_AH, up_AJH, down_AHW, top_k):
    """Token by token: softmax over all adapter experts, the best `top_k` of them with these very weights."""
    out = []
    for row_H in rows_TH:
        probabilities_A = torch.softmax(gate_AH @ row_H, -1)
        chosen = sorted(range(len(gate_AH)), key=lambda expert: -float(probabilities_A[expert]))[:top_k]
        terms = []
        for expert in chosen:
            left_W, right_W = (up_AJH[expert] @ row_H).chunk(2)
            terms.append(probabilities_A[expert] * (down_AHW[expert] @ (F.silu(left_W) * right_W)))
        out.append(sum(terms))
    return torch.stack(out)


def with_plain_adapters(model, tuned, top_k):
    """Hooks on the base's experts that add the plain adapter; returns its leaves under the names of `tuned`."""
    leaves = {}
    prefix = "base_model.model."
    for layer in hf_moe.moe_layers(model):
        wrapper = tuned.get_submodule(prefix + layer.experts_name)
        mine = []
        for attribute in wrapper.adapter_layer_names:
            leaf = getattr(wrapper, attribute)["default"].detach().clone().requires_grad_()
            leaves[f"{prefix}{layer.experts_name}.{attribute}.default"] = leaf
            mine.append(leaf)

        def add(module, args, out, mine=mine):
            return out + plain_adapter(args[0].flatten(0, -2), *mine, top_k).view_as(out)

        layer.experts.register_forward_hook(add)
    return leaves


@pytest.mark.parametrize(("top_k", "implementation"), [(1, "eager"), (2, "hf_moe"), (3, "hf_moe_grouped")])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_float64_with_every_gradient(family, top_k, implementation):
    model, inputs = build(family)
    model = model.double()
    model.set_experts_implementation(implementation)
    tuned = perturb(attach(copy.deepcopy(model), top_k=top_k))
    leaves = with_plain_adapters(model.requires_grad_(False), tuned, top_k)
    out, expected = tuned(**inputs).logits, model(**inputs).logits
    cotangent = torch.randn_like(expected)
    actual_gradients = torch.autograd.grad(out, list(adapter_parameters(tuned).values()), cotangent)
    expected_gradients = torch.autograd.grad(expected, list(leaves.values()), cotangent)
    # some families compute their norms and routers in float32 also here
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(out, expected, **close)
    for name, actual in zip(adapter_parameters(tuned), actual_gradients, strict=True):
        exact = expected_gradients[list(leaves).index(name)]
        torch.testing.assert_close(actual, exact, **close, msg=lambda text, name=name: f"{name}: {text}")
        assert exact.abs().sum() > 0, name


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "hf_moe"])
def test_16_bit_layers_are_as_good_as_plain_torch(implementation):
    torch.manual_seed(0)
    model = qwen_model().bfloat16()
    model.set_experts_implementation(implementation)
    layer = perturb(attach(model)).get_submodule("base_model.model.model.layers.0.mlp.experts")
    rows = torch.randn(512, 32).bfloat16()
    parameters = [getattr(layer, name)["default"].detach() for name in layer.adapter_layer_names]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    index_TK, weights_TK = route(rows, parameters[0], 2)
    # plain torch in bfloat16 takes the experts rounded to bfloat16 and the gate in float32, as every router
    rounded = [parameters[0], *(parameter.bfloat16() for parameter in parameters[1:])]
    baseline = torch.zeros_like(rows)
    for slot in range(2):
        left, right = torch.einsum("th,tjh->tj", rows, rounded[1][index_TK[:, slot]]).chunk(2, -1)
        out = torch.einsum("tw,thw->th", F.silu(left) * right, rounded[2][index_TK[:, slot]])
        baseline = baseline + out * weights_TK[:, slot, None].bfloat16()
    exact = plain_adapter(rows.double(), *(parameter.double() for parameter in rounded), 2)
    assert_as_good_as(layer._adapter_output("default", rows).detach(), baseline, exact)


def test_the_gate_learns_with_one_expert_a_token():
    """Weights that add up to 1 again would be 1 for top_k=1, and the gate's gradient zero."""
    tuned = perturb(attach(qwen_model(), top_k=1))
    tuned(IDS, labels=IDS).loss.backward()
    gates = {name: p for name, p in adapter_parameters(tuned).items() if "_gate." in name}
    assert len(gates) == 2
    assert all(gate.grad.abs().sum() > 0 for gate in gates.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_float32_under_a_16_bit_base(dtype):
    tuned = attach(qwen_model().to(dtype))
    assert {parameter.dtype for parameter in adapter_parameters(tuned).values()} == {torch.float32}
    assert logits(perturb(tuned)).dtype == dtype
    small = get_peft_model(qwen_model().to(dtype), AdapterExpertsConfig(**SETTINGS), autocast_adapter_dtype=False)
    dtypes = {name.split(".")[-2]: p.dtype for name, p in adapter_parameters(small).items()}
    assert dtypes == {
        "adapter_experts_gate": torch.float32,
        "adapter_experts_up": dtype,
        "adapter_experts_down": dtype,
    }
    tuned.to(dtype)
    logits(tuned)


def test_autocast_leaves_the_adapter_alone():
    """A float32 base: what autocast does to the base's own products must not reach gate or experts."""
    layer = perturb(attach(qwen_model())).get_submodule("base_model.model.model.layers.0.mlp.experts")
    rows = torch.randn(5, 32)
    expected = layer._adapter_output("default", rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer._adapter_output("default", rows), expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "hf_moe", "hf_moe_grouped"])
def test_every_implementation_agrees(implementation):
    tuned = perturb(attach(qwen_model()))
    expected = logits(tuned)
    tuned.get_base_model().set_experts_implementation(implementation)
    torch.testing.assert_close(logits(tuned), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", NATIVE)
def test_every_native_family(family):
    model, inputs = build_tiny(family)
    with torch.no_grad():
        base, layers = model.requires_grad_(False)(**inputs)[0], hf_moe.moe_layers(model)
        tuned = attach(model)
        assert torch.equal(tuned(**inputs)[0], base)
        assert [layer.experts for layer in hf_moe.moe_layers(tuned)] == [layer.experts for layer in layers]
        changed = perturb(tuned)(**inputs)[0]
        assert not torch.equal(changed, base)
        with tuned.disable_adapter():
            assert torch.equal(tuned(**inputs)[0], base)
        assert torch.equal(tuned.unload()(**inputs)[0], base)


# ---- several adapters


def two_domains():
    tuned = perturb(attach(qwen_model()), seed=1)
    tuned.add_adapter("law", AdapterExpertsConfig(num_adapter_experts=2, adapter_width=4, layers=[1]))
    return perturb(tuned, seed=2, adapter="law")


def test_one_adapter_for_each_domain():
    base = frozen_logits(qwen_model())
    tuned = two_domains()
    first = logits(tuned)
    tuned.set_adapter("law")
    second = logits(tuned)
    assert not torch.equal(first, base)
    assert not torch.equal(second, base)
    assert not torch.equal(first, second)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained == adapter_parameters(tuned, "law").keys()
    assert all(".layers.1." in name for name in trained)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), base)
    assert torch.equal(logits(tuned), second)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), first)
    tuned.delete_adapter("default")
    assert list(tuned.peft_config) == ["law"]
    assert torch.equal(logits(tuned), second)
    assert torch.equal(logits(tuned.unload()), base)


def test_active_adapters_add_up():
    tuned = two_domains()
    layer = tuned.get_submodule("base_model.model.model.layers.1.mlp.experts")
    call = (torch.randn(6, 32), torch.arange(12).view(6, 2) % 8, torch.rand(6, 2))
    with torch.no_grad():
        base = layer.base_layer(*call)
        sums = {}
        for names in (["default"], ["law"], ["default", "law"]):
            tuned.base_model.set_adapter(names)
            sums[len(names), names[0]] = layer(*call) - base
    together = sums[2, "default"]
    torch.testing.assert_close(together, sums[1, "default"] + sums[1, "law"], rtol=1e-4, atol=1e-5)
    assert (together - sums[1, "default"]).abs().max() > 1e-2
    assert all(parameter.requires_grad for parameter in adapter_parameters(tuned).values())


def test_a_second_adapter_leaves_the_first_trainable():
    tuned = two_domains()
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained == adapter_parameters(tuned, "default").keys()


def test_a_batch_of_several_adapters_is_refused():
    tuned = two_domains()
    with pytest.raises(ValueError, match=r"cannot mix adapters in one batch \(adapter_names\)\. Split the batch"):
        tuned(IDS, adapter_names=["default", "law"])


# ---- files


@pytest.fixture
def saved(tmp_path):
    """A trained adapter on disk beside its base, and the logits that they give."""
    qwen_model().save_pretrained(tmp_path / "base")
    tuned = perturb(attach(type(qwen_model()).from_pretrained(tmp_path / "base")))
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(tuned)


def base_of(folder):
    return type(qwen_model()).from_pretrained(folder / "base")


def test_the_file_holds_the_adapter_only(saved):
    folder, _ = saved
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    blocks = [f"base_model.model.model.layers.{i}.mlp.experts.adapter_experts_" for i in range(2)]
    assert tensors.keys() == {block + part for block in blocks for part in ("gate", "up", "down")}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert numbers == 2 * (3 * 32 + 3 * 3 * 8 * 32)
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size < 4 * numbers + 2048
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "ADAPTER_EXPERTS"
    assert config["base_layers"] == {f"model.layers.{i}.mlp.experts": 32 for i in range(2)}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loads_with_equal_logits(saved, low_cpu_mem_usage):
    folder, expected = saved
    loaded = PeftModel.from_pretrained(base_of(folder), folder / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.load_adapter(folder / "adapter", "again", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_onto_16_bits_keeps_what_was_saved(saved, low_cpu_mem_usage):
    folder, _ = saved
    base = base_of(folder).bfloat16()
    loaded = PeftModel.from_pretrained(base, folder / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, parameter in adapter_parameters(loaded).items():
        assert parameter.dtype == torch.float32
        if low_cpu_mem_usage or "_gate." in name:
            assert torch.equal(parameter, tensors[name.removesuffix(".default")]), name


def test_loaded_weights_follow_the_experts_to_their_device(saved, monkeypatch):
    monkeypatch.setattr(AdapterExpertsLayer, "_base_device", lambda layer: torch.device("meta"))
    folder, _ = saved
    loaded = PeftModel.from_pretrained(base_of(folder), folder / "adapter", low_cpu_mem_usage=True)
    assert all(parameter.is_meta for parameter in adapter_parameters(loaded).values())


def test_the_hosts_own_adapter_methods(saved):
    folder, expected = saved
    model = base_of(folder)
    without = frozen_logits(model)
    model.load_adapter(str(folder / "adapter"))
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), without)
    model.enable_adapters()
    model.add_adapter(AdapterExpertsConfig(**SETTINGS), "second")
    perturb(model, seed=2, adapter="second")
    model.set_adapter("second")
    assert not torch.equal(logits(model), expected)
    model.save_pretrained(folder / "second")
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    assert len(load_file(folder / "second" / "adapter_model.safetensors")) == 6


def run_python(code: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


LOAD = """
    import sys, torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    folder = sys.argv[1]
    base = AutoModelForCausalLM.from_pretrained(folder + "/base")
    model = PeftModel.from_pretrained(base, folder + "/adapter")
    with torch.no_grad():
        torch.save(model(torch.arange(3, 27).view(2, 12)).logits, folder + "/logits.pt")
"""


def test_loads_in_another_process_after_import_hf_moe_alone(saved):
    folder, expected = saved
    done = run_python("    import hf_moe\n" + LOAD.strip("\n"), folder)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(folder / "logits.pt"), expected, rtol=1e-6, atol=1e-6)


def test_without_hf_moe_peft_says_that_it_does_not_know_the_method(saved):
    done = run_python(LOAD, saved[0])
    assert done.returncode != 0
    assert "KeyError: 'ADAPTER_EXPERTS'" in done.stderr


def test_registered_in_either_order_and_only_once():
    for first, second in (("hf_moe", "peft"), ("peft", "hf_moe")):
        done = run_python(
            f"""
            import sys
            import {first}
            if "{first}" == "hf_moe":
                import importlib.util
                assert "peft" not in sys.modules
                # whoever asks whether PEFT is installed, as transformers does, must not use up the registration
                assert importlib.util.find_spec("peft").loader.get_source("peft")
                assert importlib.util.find_spec("peft") is not None
            import {second}
            import hf_moe
            hf_moe.register()
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
            assert PEFT_TYPE_TO_CONFIG_MAPPING["ADAPTER_EXPERTS"].__name__ == "AdapterExpertsConfig"
            assert PEFT_TYPE_TO_TUNER_MAPPING["ADAPTER_EXPERTS"].__name__ == "AdapterExpertsModel"
            assert [str(key) for key in PEFT_TYPE_TO_CONFIG_MAPPING].count("AdapterExpertsType.ADAPTER_EXPERTS") == 1
            assert not [f for f in sys.meta_path if getattr(f, "module", None) == "peft"]
            import peft
            assert type(peft.__spec__.loader).__name__ == "SourceFileLoader"
            """
        )
        assert done.returncode == 0, done.stderr


def test_our_module_may_be_the_first_to_import_peft():
    code = "import hf_moe.adapters.adapter_experts.config as c; c.AdapterExpertsConfig(); import hf_moe.adapters"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_without_peft_the_extra_is_named():
    done = run_python("import sys; sys.modules['peft'] = None; import hf_moe.adapters.adapter_experts")
    assert f"adapter experts need peft. Install it with: {install_command('recipes')}" in done.stderr


def test_another_base_is_refused(saved):
    folder, _ = saved
    wider = hf_moe_model(hidden_size=64, num_hidden_layers=2)
    wide = r"2 MoE layers of hidden size 64 \(model.layers.0.mlp.experts to model.layers.1.mlp.experts\)"
    mine = r"2 MoE layers of hidden size 32 \(model.layers.0.mlp.experts to model.layers.1.mlp.experts\)"
    with pytest.raises(ValueError, match=f"made for a base with {mine}; this HfMoeForCausalLM has {wide}. .*/base'"):
        PeftModel.from_pretrained(wider, folder / "adapter")
    with pytest.raises(ValueError, match=f"{mine}; this HfMoeForCausalLM has 3 MoE layers of hidden size 32"):
        PeftModel.from_pretrained(hf_moe_model(), folder / "adapter")
    tuned = attach(hf_moe_model())
    with pytest.raises(ValueError, match="made for a base with"):
        tuned.load_adapter(folder / "adapter", "other")
    assert list(tuned.peft_config) == ["default"]


def test_one_config_object_serves_several_models():
    config = AdapterExpertsConfig(**SETTINGS)
    for model in (hf_moe_model(), qwen_model()):
        tuned = get_peft_model(model, config)
        assert len(tuned.peft_config["default"].base_layers) == len(hf_moe.moe_layers(model))
    assert config.base_layers is None


# ---- training


def arguments(folder, **options):
    settings = {"max_steps": 12, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "save_steps": 6}
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "seed": 0}
    return TrainingArguments(output_dir=str(folder), **{**settings, **fixed, **options})


def rows():
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(3, 60, (4, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in patterns.repeat(4, 3)]


def train(model, folder, resume=None, **options):
    trainer = Trainer(model, arguments(folder, **options), train_dataset=rows())
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("family", ["hf_moe", "qwen3_moe"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "hf_moe"])
def test_training_moves_the_adapter_only(family, implementation, tmp_path):
    model = {"hf_moe": hf_moe_model, "qwen3_moe": qwen_model}[family]()
    model.set_experts_implementation(implementation)
    before, base = record_choices(model, IDS), frozen_logits(model)
    router_hash = hf_moe.router_hash(model)
    tuned = attach(model, adapter_width=16)
    start = {name: parameter.detach().clone() for name, parameter in tuned.named_parameters()}
    losses = train(tuned, tmp_path)
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, parameter in tuned.named_parameters() if not torch.equal(parameter, start[name])}
    assert changed == adapter_parameters(tuned).keys()
    hf_moe.verify_router_frozen(tuned, router_hash)
    # the first MoE layer sees what it saw before; later ones see what the adapter made of it
    agreement = routing_agreement(before, record_choices(tuned, IDS))
    assert agreement[0] == 1.0
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned.eval()), base)


def test_resume_is_bitwise_the_uninterrupted_run(tmp_path):
    whole = attach(qwen_model())
    train(whole, tmp_path)
    resumed = attach(qwen_model(), seed=5)
    train(resumed, tmp_path, resume=str(tmp_path / "checkpoint-6"))
    for name, parameter in adapter_parameters(whole).items():
        assert torch.equal(adapter_parameters(resumed)[name], parameter), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "hf_moe"])
def test_gradient_checkpointing_changes_no_bit(implementation, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = qwen_model()
        model.set_experts_implementation(implementation)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tuned = perturb(attach(model)).train()
        tuned(IDS, labels=IDS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in adapter_parameters(tuned).items()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_generates_as_its_own_forward_says():
    tuned = perturb(attach(qwen_model()))
    tokens = tuned.generate(input_ids=IDS[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, 4:], tuned(tokens).logits.argmax(-1)[:, 3:-1])
    base = qwen_model().generate(IDS[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert not torch.equal(tokens, base)


@pytest.mark.parametrize("implementation", ["grouped_mm", "hf_moe", "hf_moe_grouped"])
def test_compiles_in_one_graph(implementation):
    tuned = two_domains()
    tuned.base_model.set_adapter(["default", "law"])
    tuned.get_base_model().set_experts_implementation(implementation)
    gradients = []
    for model in (tuned, torch.compile(tuned, fullgraph=True, backend="aot_eager")):
        tuned.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in adapter_parameters(tuned).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_deep_copy_is_independent():
    tuned = perturb(attach(qwen_model()))
    expected, twin = logits(tuned), copy.deepcopy(tuned)
    perturb(tuned, seed=7)
    assert torch.equal(logits(twin), expected)
    assert not torch.equal(logits(tuned), expected)


# ---- refusals


def test_a_peft_that_could_not_save_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(ImportError, match=r"need peft 0\.21 or newer, this is 0\.20\.0: .* pip install -U peft"):
        AdapterExpertsConfig()


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_before_any_work(call):
    tuned = perturb(attach(qwen_model()))
    expected = logits(tuned)
    with pytest.raises(ValueError, match=r"cannot be merged: .*Keep the adapter .* or train expert LoRA"):
        getattr(tuned, call)()
    assert torch.equal(logits(tuned), expected)
    layer = next(module for module in tuned.modules() if isinstance(module, AdapterExpertsLayer))
    for step in (layer.merge, layer.unmerge):
        with pytest.raises(ValueError, match="cannot be merged"):
            step()


def test_unload_gives_the_base_back():
    model = qwen_model()
    expected, modules = frozen_logits(model), [name for name, _ in model.named_modules()]
    base = perturb(attach(model)).unload()
    assert base is model
    assert [name for name, _ in base.named_modules()] == modules
    assert torch.equal(logits(base), expected)
    assert not hasattr(base, "peft_config")


WRONG = {
    "no experts": ({"num_adapter_experts": 0}, ValueError, "num_adapter_experts must be at least 1, got 0"),
    "a width below 1": ({"adapter_width": -8}, ValueError, "adapter_width must be at least 1, got -8"),
    "a width as text": ({"adapter_width": "64"}, TypeError, "adapter_width must be an integer, got '64'"),
    "a flag for a number": ({"top_k": True}, TypeError, "top_k must be an integer, got True"),
    "a broken width": ({"adapter_width": 8.0}, TypeError, "adapter_width must be an integer, got 8.0"),
    "top_k of more": ({"top_k": 3}, ValueError, r"top_k must be at most num_adapter_experts \(2\), got 3"),
    "one name": ({"layers": "model.layers.0.mlp"}, TypeError, "layers must be a list of positions or names"),
    "no layers": ({"layers": []}, ValueError, "layers must name at least one MoE layer; None adapts all"),
    "a layer twice": ({"layers": [1, 1]}, ValueError, r"layers must name each MoE layer once, got \[1, 1\]"),
    "from the end": ({"layers": [-1]}, ValueError, "layers must count from 0, got -1"),
    "half a layer": ({"layers": [0.5]}, TypeError, "layers must hold integers or names, got 0.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_config_is_refused_when_it_is_built(case):
    settings, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        AdapterExpertsConfig(**settings)


def test_unknown_layers_are_refused_with_near_ones():
    with pytest.raises(ValueError, match=r"MoE layer 2; Qwen3MoeForCausalLM has 2 MoE layers, 0 to 1\. Positions"):
        attach(qwen_model(), layers=[2])
    near = r"'model.layer.1.mlp', which is no MoE layer of Qwen3MoeForCausalLM. Did you mean 'model.layers.1.mlp'"
    with pytest.raises(ValueError, match=near):
        attach(qwen_model(), layers=["model.layer.1.mlp"])
    with pytest.raises(ValueError, match=r"It has 'model.layers.0.mlp', 'model.layers.1.mlp'\."):
        attach(qwen_model(), layers=["?"])


@pytest.mark.parametrize("layers", [[1], ["model.layers.1.mlp"], ["model.layers.1.mlp.experts"]])
def test_chosen_layers(layers, tmp_path):
    tuned = perturb(attach(qwen_model(), layers=layers))
    assert all(".layers.1." in name for name in adapter_parameters(tuned))
    assert len(adapter_parameters(tuned)) == 3
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(qwen_model(), tmp_path)
    assert loaded.peft_config["default"].layers == layers
    assert torch.equal(logits(loaded), logits(tuned))


def test_dense_models_are_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no MoE layer.* peft.LoraConfig adapts dense ones"):
        attach(dense)


@pytest.mark.parametrize("split", ["tensors", "experts"])
def test_split_experts_are_refused(split):
    """Each process would add the whole adapter to its part of the sum."""
    model = qwen_model()
    if split == "tensors":
        model._tp_size = 2
    else:
        hf_moe.moe_layers(model)[1].experts.num_experts = 4
    with pytest.raises(ValueError, match=r"do not run under tensor or expert parallelism: .*\(without tp_plan\)"):
        attach(model)


@pytest.mark.parametrize("options", ["top_p", "null_experts", "capacity_position", "dense", "per_layer_config"])
def test_every_routing_of_ours(options):
    """Tokens that the base sends nowhere, or everywhere, get their adapter experts all the same."""
    model = hf_moe_model(**DECODERS[options])
    expected = frozen_logits(model)
    tuned = attach(model)
    assert torch.equal(logits(tuned), expected)
    layer = perturb(tuned).get_submodule("base_model.model.model.layers.0.mlp.experts")
    call = (torch.randn(4, 32), torch.full((4, 1), layer.num_experts), torch.zeros(4, 1))
    if layer._modules["base_layer"]._is_expert_parallel:
        assert torch.equal(layer(*call), layer._adapter_output("default", call[0]))


def test_experts_that_choose_tokens_are_refused():
    """Their block hands them a row for each choice: a token chosen twice would get the adapter twice."""
    model = HfMoeForSequenceClassification(encoder_config(routing="expert_choice"))
    with pytest.raises(ValueError, match=r"routing='expert_choice': .* Use expert LoRA"):
        attach(model)


def test_another_method_on_the_same_model_is_refused_by_peft():
    tuned = attach(qwen_model())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        tuned.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


def test_the_config_makes_a_round_trip(tmp_path):
    config = AdapterExpertsConfig(num_adapter_experts=4, adapter_width=16, top_k=2, layers=[0, "model.layers.2.mlp"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == config
    assert loaded.peft_type is AdapterExpertsType.ADAPTER_EXPERTS
