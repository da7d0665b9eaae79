"""`experts_implementation="hf_moe"` in the code that users write: training, generation, torch.compile, PEFT."""

import copy
import logging
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, Qwen3MoeConfig

import hf_moe
from hf_moe.experts import backends
from hf_moe.experts.backends import OURS, refusals
from hf_moe.experts.request import request_for
from hf_moe.layers.storage import storage_of
from hf_moe.observability.explain import explain_config
from tiny_models import FAMILIES as NATIVE
from tiny_models import build_tiny, experts_class, tiny_config
from tiny_moe import EXPERT_PARAMETERS, qwen_model, with_expert_lora

FAMILIES = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "nemotron_h",
    "glm4_moe",
)
NAMES = ("hf_moe", "hf_moe_grouped", "hf_moe_reference")
CPU = torch.device("cpu")


def train(model, implementation: str, inputs: dict, steps: int = 3) -> tuple[list[float], nn.Module]:
    """Losses of `steps` SGD steps on one batch, and the trained model."""
    model = copy.deepcopy(model).train()
    model.set_experts_implementation(implementation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_generates_as_eager(family):
    model, inputs = build_tiny(family)
    eager_losses, eager = train(model, "eager", inputs)
    losses, ours = train(model, "hf_moe", inputs)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    tokens = {}
    for name, trained in (("eager", eager), ("hf_moe", ours)):
        tokens[name] = trained.eval().generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens["eager"], tokens["hf_moe"])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_from_config_takes_the_name(family):
    model = AutoModelForCausalLM.from_config(tiny_config(family), experts_implementation="hf_moe")
    assert model.config._experts_implementation == "hf_moe"
    assert "runs now: hf_moe.\n  hf_moe runs hf_moe_" in str(hf_moe.explain(model))


def test_from_pretrained_takes_the_name(tmp_path):
    model = qwen_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="hf_moe_grouped")
    ids = torch.arange(8).view(1, 8)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("first", ["transformers.integrations.moe", "hf_moe"])
def test_registered_in_either_order_of_imports(first):
    code = f"""
        import {first}
        import hf_moe
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        hf_moe.register()
        ours = [name for name in ALL_EXPERTS_FUNCTIONS.keys() if name.startswith("hf_moe")]
        assert ours == {list(OURS)}
        import sys, importlib
        assert not [f for f in sys.meta_path if getattr(f, "module", None) == "transformers.integrations.moe"]
        spec = sys.modules["transformers.integrations.moe"].__spec__
        assert type(spec.loader).__name__ == "SourceFileLoader", spec
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


@pytest.mark.parametrize("name", ["hf_moe", "hf_moe_grouped"])
@pytest.mark.parametrize("family", [name for name in ("mixtral", "gpt_oss", "muse_spark") if name in NATIVE])
def test_compiles_in_one_graph(family, name):
    model, _ = build_tiny(family)
    model.set_experts_implementation(name)
    experts = next(module for module in model.modules() if type(module) is experts_class(family))
    hidden = torch.randn(6, experts.down_proj.shape[2 if experts.is_transposed else 1])
    index, weights = torch.arange(12).view(6, 2) % 8, torch.rand(6, 2)
    results = []
    for function in (experts, torch.compile(experts, fullgraph=True, backend="aot_eager")):
        experts.zero_grad()
        leaves = (hidden.clone().requires_grad_(), weights.clone().requires_grad_())
        out = function(leaves[0], index, leaves[1])
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves), *(p.grad for p in experts.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_moe", "hf_moe_grouped"])
def test_generates_with_a_static_cache_under_compile(name):
    model = qwen_model()
    ids = torch.arange(3, 9).view(1, 6)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.set_experts_implementation(name)
    compiled = CompileConfig(fullgraph=True, backend="inductor", mode="default", dynamic=False)
    compiled._compile_all_devices = True  # transformers compiles on accelerators only
    torch.compiler.reset()
    tokens = model.generate(
        ids,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        compile_config=compiled,
        disable_compile=False,
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    model, inputs = build_tiny("qwen3_moe")
    model.set_experts_implementation(name)
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert torch.equal(gradients[1][key], gradient), key


@pytest.mark.parametrize("name", NAMES)
def test_with_weights_that_peft_parametrises(name):
    ids = torch.arange(3, 19).view(2, 8)
    results = {}
    for implementation in ("eager", name):
        model = with_expert_lora(qwen_model(), init_lora_weights=False, target_parameters=EXPERT_PARAMETERS)
        model.get_base_model().set_experts_implementation(implementation)
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.1)
        loss = model(ids, labels=ids).loss
        loss.backward()
        results[implementation] = {
            "loss": loss.detach(),
            **{key: p.grad for key, p in model.named_parameters() if p.requires_grad},
        }
    assert len(results["eager"]) > 4
    for key, value in results["eager"].items():
        torch.testing.assert_close(results[name][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_float32_rows_into_bfloat16_weights(name):
    """Under autocast a norm gives float32 rows to bfloat16 weights: the weights decide, the rows' dtype returns."""
    model, _ = build_tiny("mixtral")
    experts = model.model.layers[0].mlp.experts.to(torch.bfloat16)
    model.set_experts_implementation(name)
    hidden = torch.randn(6, 32, requires_grad=True)
    index, weights = torch.arange(12).view(6, 2) % 8, torch.rand(6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(hidden, index, weights)
    assert out.dtype == torch.float32
    # one of them may be rounded to bfloat16 once more
    torch.testing.assert_close(out, experts(hidden.bfloat16(), index, weights).float(), rtol=2**-8, atol=1e-6)
    out.sum().backward()
    assert hidden.grad.dtype == torch.float32
    assert experts.down_proj.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_touch_float32_weights(name):
    model, _ = build_tiny("mixtral")
    experts = model.model.layers[0].mlp.experts
    model.set_experts_implementation(name)
    call = (torch.randn(6, 32), torch.arange(12).view(6, 2) % 8, torch.rand(6, 2))
    plain = experts(*call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(experts(*call), plain, rtol=0, atol=0)


def test_frozen_experts_pass_gradients_on():
    model, inputs = build_tiny("mixtral")
    model.set_experts_implementation("hf_moe")
    for layer in hf_moe.moe_layers(model):
        layer.experts.requires_grad_(False)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert all(p.grad is None for layer in hf_moe.moe_layers(model) for p in layer.experts.parameters())


def test_a_name_that_cannot_serve_raises_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, inputs = build_tiny("mixtral")
    model.set_experts_implementation("hf_moe_triton")
    with pytest.raises(ValueError, match=r"'hf_moe_triton' cannot run MixtralExperts: .* on cpu: use 'hf_moe'"):
        model(**inputs)
    experts = model.model.layers[0].mlp.experts
    refused = refusals(request_for(experts, storage_of(experts), CPU))
    assert "needs a GPU" in refused["hf_moe_triton"]
    assert not refused.keys() & {"hf_moe", "hf_moe_grouped", "hf_moe_reference"}
    with pytest.raises(ValueError, match="hf_moe"):
        model.set_experts_implementation("hf_moe_trition")


def test_the_choice_is_logged_once_and_explained(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_BROKEN", {"hf_moe_cpu": "no C++ compiler (g++) was found."})
    backends._log_choice.cache_clear()
    model, inputs = build_tiny("mixtral")
    model.set_experts_implementation("hf_moe")
    with caplog.at_level(logging.INFO, logger="hf_moe"):
        model(**inputs)
        model(**inputs)
    lines = [record for record in caplog.records if record.name.startswith("hf_moe.experts")]
    assert len(lines) == 1
    assert lines[0].levelno == logging.WARNING
    sentence = "hf_moe runs hf_moe_grouped: no C++ compiler (g++) was found."
    assert lines[0].getMessage() == f"MixtralExperts (float32, cpu): {sentence}"
    assert sentence in str(hf_moe.explain(model))


def test_explain_of_a_config_makes_no_choice():
    config = Qwen3MoeConfig(num_hidden_layers=1)
    assert explain_config(config).choices == ()
