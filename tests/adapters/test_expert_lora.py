"""Accelerated adapters are PEFT's adapters: the same numbers, the same files, the same calls; and no `W + BA`."""

import copy
import dataclasses
import json
import logging
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import hf_moe
from hf_moe.adapters import expert_lora, lora_options
from hf_moe.adapters.expert_lora import MergeError, accelerate_adapters, expert_lora_config, merge_and_check
from hf_moe.data.packing import PackedRows
from hf_moe.experts import pipeline
from hf_moe.experts.backends import BACKENDS, choose
from hf_moe.experts.request import Backend, request_for
from hf_moe.kernels.layer_call import LowRank, LowRankPair
from hf_moe.layers.storage import storage_of
from tiny_lora import RANK, accelerated, adapted, assert_equal, build, fill, outputs, results
from tiny_models import FAMILIES as NATIVE
from tiny_models import build_tiny

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "hf_moe")
# transposed without biases, a norm after every expert; ungated, a gate without closed form
VARIANTS = tuple(name for name in ("aria", "muse_spark", "nemotron_h", "inkling2") if name in NATIVE)
FLOAT32_INSIDE = ("nemotron_h", "inkling2")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, peft_layer.ParamWrapper)]


# The numbers


@pytest.mark.parametrize("implementation", ["hf_moe", "hf_moe_grouped"])
@pytest.mark.parametrize("family", FAMILIES + VARIANTS)
def test_equals_stock_peft(family, implementation):
    double = family not in FLOAT32_INSIDE
    model, inputs = build(family, torch.float64 if double else torch.float32)
    stock = adapted(model)
    expected = results(stock, inputs)
    actual = results(accelerated(stock, implementation), inputs)
    assert (expected["out"] - outputs(model, inputs)).abs().max() > 1e-3
    assert_equal(actual, expected, 1e-11 if double else 1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_equals_stock_peft_on_triton(family, monkeypatch):
    """And every launch reads rows of B: PEFT's own B, with the expert fastest, is copied once."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    model, inputs = build(family, torch.float32)
    stock, strides, run = adapted(model), [], InterpretedFunction.run

    def record(self, *args, **kwargs):
        strides.extend(value for name, value in kwargs.items() if name in ("stride_low_b", "stride_low_r"))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    assert_equal(results(accelerated(stock, "hf_moe_triton"), inputs), results(stock, inputs), relative=1e-4)
    columns, rows = strides[::2], strides[1::2]
    assert len(rows) > 8
    assert all(1 in pair for pair in zip(columns, rows, strict=True))


def test_bfloat16_is_as_good_as_stock():
    model, inputs = build("qwen3_moe", torch.bfloat16)
    stock = adapted(model)
    assert wrappers(stock)[0].lora_A["default"].weight.dtype == torch.float32
    exact = outputs(copy.deepcopy(stock).double(), inputs)
    # of the median token: rounding sends a few to another expert
    errors = [(outputs(m, inputs).double() - exact).square().mean(-1).median() for m in (accelerated(stock), stock)]
    assert errors[0] <= 2**2 * errors[1]


def test_autocast_leaves_float32_experts_in_float32():
    model, _ = build("mixtral", torch.float32)
    experts = wrappers(accelerated(adapted(model)))[0]
    call = (torch.randn(6, 32), torch.arange(12).view(6, 2) % 8, torch.rand(6, 2))
    plain = experts(*call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(experts(*call), plain)


@pytest.mark.parametrize("implementation", ["hf_moe", "hf_moe_grouped"])
def test_slots_of_other_processes_add_nothing(implementation):
    model, _ = build("gpt_oss")
    wrapper = wrappers(accelerated(adapted(model), implementation))[0]
    hidden, index, weights = torch.randn(6, 32).double(), torch.arange(12).view(6, 2) % 8, torch.rand(6, 2).double()
    elsewhere = torch.tensor([[False, True], [True, True]]).repeat(3, 1)
    expected = wrapper(hidden, index, weights.masked_fill(elsewhere, 0.0))
    wrapper.get_base_layer()._is_expert_parallel = True
    actual = wrapper(hidden, index.masked_fill(elsewhere, 8), weights.masked_fill(elsewhere, 0.0))
    torch.testing.assert_close(actual, expected)
    assert (actual[1] == 0).all()


def test_a_trained_base_gets_its_gradients_too():
    model, inputs = build("gpt_oss")
    stock = adapted(model)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("down_proj_bias"))
    assert_equal(results(accelerated(stock), inputs), results(stock, inputs))


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"rank_pattern": {"experts.down_proj": 2}}])
def test_ranks_and_scales_are_peft_s(options):
    model, inputs = build("qwen3_moe")
    stock = adapted(model, **options)
    assert_equal(results(accelerated(stock), inputs), results(stock, inputs))


def test_one_projection_alone():
    model, inputs = build("qwen3_moe")
    config = LoraConfig(r=RANK, target_modules=[], target_parameters=EXPERTS[1:])
    stock = fill(get_peft_model(copy.deepcopy(model), config))
    assert_equal(results(accelerated(stock), inputs), results(stock, inputs))


def test_attention_and_shared_experts_train_as_well():
    model, inputs = build("deepseek_v3")
    stock = adapted(model, attention=True, shared_experts=True)
    expected = results(stock, inputs)
    trained = {name.split(".")[-5] for name in expected if name.endswith("lora_A.default.weight")}
    assert trained >= {"shared_experts", "self_attn"}
    assert_equal(results(accelerated(stock), inputs), expected)


@pytest.mark.parametrize("pair", ["up", "down", "both"])
def test_the_seam_alone(pair):
    """`W + scale * b @ a`, computed here, against the factors handed to the experts."""
    model, _ = build("gpt_oss")
    model.set_experts_implementation("hf_moe")
    experts = model.model.layers[0].mlp.experts.requires_grad_(False)
    up = LowRank(torch.randn(8, 3, 32).double(), torch.randn(8, 48, 3).double(), 0.3)
    down = LowRank(torch.randn(8, 7, 24).double(), torch.randn(8, 32, 7).double(), 0.7)
    low_rank = LowRankPair(None if pair == "down" else up, None if pair == "up" else down)
    call = (torch.randn(6, 32).double(), torch.arange(12).view(6, 2) % 8, torch.rand(6, 2).double())
    actual = experts(*call, low_rank=low_rank)
    for name, factors in (("gate_up_proj", low_rank.up), ("down_proj", low_rank.down)):
        if factors is not None:
            getattr(experts, name).data += factors.scale * (factors.b @ factors.a).transpose(1, 2)
    torch.testing.assert_close(actual, experts(*call))


# Memory, and weights that are computed


def largest_allocation(run) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("implementation", ["hf_moe", "hf_moe_grouped"])
def test_nothing_as_large_as_the_experts_is_allocated(implementation):
    model, inputs = build("mixtral", num_local_experts=64)
    stock = adapted(model, r=2)
    small = {name: value[:, :2] for name, value in inputs.items()}
    expert_bytes = min(p.nbytes for layer in hf_moe.moe_layers(model) for p in layer.experts.parameters())
    ours = accelerated(stock, implementation)
    results(ours, small)  # compiles
    assert largest_allocation(lambda: results(ours, small)) < expert_bytes / 4
    assert largest_allocation(lambda: results(stock, small)) >= expert_bytes


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


class Same(nn.Module):
    def forward(self, weight):
        return weight


@pytest.mark.parametrize("stored_as", [Same, Halved])
def test_parametrised_weights_neither_leak_nor_drift(stored_as):
    """As 4-bit weights are stored; PEFT 0.21.2 leaves one of its own parametrisations behind in every forward."""
    model, inputs = build("qwen3_moe")
    plain = copy.deepcopy(model)
    for layer in hf_moe.moe_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(layer.experts, name, stored_as(), unsafe=True)
            if stored_as is Halved:
                getattr(plain.get_submodule(layer.experts_name), name).data *= 0.5
    config = expert_lora_config(model, r=RANK)
    assert "model.layers.1.mlp.experts.down_proj" in config.target_parameters
    tuned, reference = fill(get_peft_model(model, config)), adapted(plain)
    factors = by_layer_and_parameter(tuned)
    for key, wrapper in by_layer_and_parameter(reference).items():
        wrapper.lora_A.load_state_dict(factors[key].lora_A.state_dict())
        wrapper.lora_B.load_state_dict(factors[key].lora_B.state_dict())
    accelerate_adapters(tuned)
    runs = [outputs(tuned, inputs) for _ in range(4)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    torch.testing.assert_close(runs[0], outputs(reference, inputs))
    lists = [module for module in tuned.modules() if isinstance(module, parametrize.ParametrizationList)]
    assert [len(entry) for entry in lists] == [1] * 6
    results(tuned, inputs)


def by_layer_and_parameter(model) -> dict[tuple[int, str], nn.Module]:
    """The wrappers, whichever nests in which: with parametrised weights PEFT nests them the other way round."""
    numbers = {id(layer.experts): number for number, layer in enumerate(hf_moe.moe_layers(model))}
    return {(numbers[id(w.get_base_layer())], w.parameter_name): w for w in wrappers(model)}


# What users of PEFT do


def test_accelerating_is_idempotent_says_what_it_did_and_returns_the_layers(caplog):
    model, _ = build("qwen3_moe", torch.float32)
    model.set_experts_implementation("grouped_mm")
    tuned = adapted(model)
    with caplog.at_level(logging.INFO, logger="hf_moe.adapters"):
        names = accelerate_adapters(tuned)
        logged = len(caplog.records)
        assert accelerate_adapters(tuned) == names == [f"base_model.model.model.layers.{i}.mlp" for i in range(3)]
    assert len(caplog.records) == logged
    assert "adapters of 3 MoE layers run through their low-rank factors" in caplog.text
    assert "'hf_moe' instead of 'grouped_mm'" in caplog.text
    assert "runs now: hf_moe.\n" in str(hf_moe.explain(tuned))
    assert {type(wrapper).__name__ for wrapper in wrappers(tuned)} == {"ParamWrapper"}


def test_disabled_and_merged_adapters_run_the_plain_base(monkeypatch):
    model, inputs = build("qwen3_moe")
    tuned = accelerated(adapted(model))
    expected = outputs(tuned, inputs)
    monkeypatch.setattr(expert_lora, "LowRankPair", None)  # what hands factors over fails
    with tuned.disable_adapter():
        torch.testing.assert_close(outputs(tuned, inputs), outputs(model, inputs))
    tuned.merge_adapter()
    torch.testing.assert_close(outputs(tuned, inputs), expected)
    with tuned.disable_adapter():
        torch.testing.assert_close(outputs(tuned, inputs), outputs(model, inputs))
    monkeypatch.undo()
    torch.testing.assert_close(outputs(tuned, inputs), expected)


def test_several_adapters_add_up_and_switch():
    model, inputs = build("qwen3_moe")
    stock = adapted(model)
    second = LoraConfig(r=3, lora_alpha=7, target_modules=[], target_parameters=EXPERTS)
    stock.add_adapter("second", second)
    fill(stock, seed=7)
    ours = accelerated(stock)
    for active in ("second", "default", ["default", "second"]):
        for tuned in (stock, ours):
            tuned.base_model.set_adapter(active)
        assert_equal(results(ours, inputs), results(stock, inputs))
    ours.add_adapter("third", copy.deepcopy(second))
    ours.set_adapter("third")
    torch.testing.assert_close(outputs(ours, inputs), outputs(model, inputs))  # new factors change nothing
    ours.delete_adapter("third")
    ours.set_adapter("second")
    outputs(ours, inputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(reentrant):
    model, inputs = build("qwen3_moe", torch.float32)
    tuned = accelerated(adapted(model)).train()
    expected = results(tuned, inputs)
    tuned.enable_input_require_grads()
    tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = results(tuned, inputs)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


ROWS = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def train(folder, accelerate: bool, resume: str | None = None) -> tuple[list[float], nn.Module]:
    set_seed(0)
    model, _ = build("qwen3_moe", torch.float32)
    tuned = adapted(model)
    if accelerate:
        accelerate_adapters(tuned)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(model=tuned, args=arguments, train_dataset=PackedRows(ROWS))
    trainer.train(resume_from_checkpoint=resume)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], tuned


def test_the_trainer_learns_as_with_stock_peft_and_resumes(tmp_path):
    stock, _ = train(tmp_path / "stock", False)
    losses, whole = train(tmp_path / "ours", True)
    assert losses == pytest.approx(stock, rel=1e-4)
    resumed_losses, resumed = train(tmp_path / "ours", True, str(tmp_path / "ours" / "checkpoint-2"))
    assert resumed_losses == losses
    for (name, expected), actual in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_saves_loads_and_swaps(tmp_path):
    model, inputs = build("qwen3_moe")
    tuned = accelerated(adapted(model))
    expected = outputs(tuned, inputs)
    tuned.save_pretrained(tmp_path / "first")
    assert json.loads((tmp_path / "first" / "adapter_config.json").read_text())["peft_type"] == "LORA"

    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "first")
    accelerate_adapters(loaded)
    torch.testing.assert_close(outputs(loaded, inputs), expected)

    native = copy.deepcopy(model)
    native.load_adapter(str(tmp_path / "first"))
    accelerate_adapters(native)
    torch.testing.assert_close(outputs(native, inputs), expected)

    fill(tuned, seed=3)
    other = outputs(tuned, inputs)
    tuned.save_pretrained(tmp_path / "second")
    hotswap_adapter(loaded, str(tmp_path / "second"), adapter_name="default")
    torch.testing.assert_close(outputs(loaded, inputs), other)
    loaded.load_adapter(str(tmp_path / "first"), "again")
    loaded.set_adapter("again")
    torch.testing.assert_close(outputs(loaded, inputs), expected)


def test_copies_generate_as_stock_peft():
    model, inputs = build("qwen3_moe")
    stock = adapted(model)
    ours = copy.deepcopy(accelerated(stock))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = [tuned.generate(**inputs, **settings) for tuned in (stock, ours)]
    assert torch.equal(*tokens)
    assert not torch.equal(tokens[0], model.generate(**inputs, **settings))


@pytest.mark.parametrize("implementation", ["hf_moe", "hf_moe_grouped"])
def test_compiles_in_one_graph(implementation):
    model, inputs = build("qwen3_moe")
    tuned = accelerated(adapted(model), implementation)
    expected = results(tuned, inputs)
    torch.compiler.reset()
    tuned.get_base_model().model.forward = torch.compile(
        tuned.get_base_model().model.forward, fullgraph=True, backend="aot_eager"
    )
    assert_equal(results(tuned, inputs), expected)


# Other processes, with and without hf_moe

STOCK = """
import sys
sys.modules["hf_moe"] = None  # whoever imports it fails
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
ids = torch.arange(3, 19).view(2, 8)
def base(family):
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{family}", dtype="float64", experts_implementation="eager")
for family in sys.argv[2:]:
    loaded = PeftModel.from_pretrained(base(family), f"{folder}/{family}-ours")
    torch.save(loaded(ids).logits, f"{folder}/{family}-ours.pt")
    config = PeftModel.from_pretrained(base(family), f"{folder}/{family}-ours").peft_config["default"]
    settings = LoraConfig(r=3, target_modules=[], target_parameters=config.target_parameters, init_lora_weights=False)
    stock = get_peft_model(base(family), settings)
    optimizer = torch.optim.SGD(stock.parameters(), lr=0.1)
    stock(ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(stock(ids).logits, f"{folder}/{family}-stock.pt")
    stock.save_pretrained(f"{folder}/{family}-stock")
assert not [name for name in sys.modules if name.startswith("hf_moe.")]
"""


def test_files_go_both_ways_between_processes_with_and_without_hf_moe(tmp_path):
    families, ids = ("qwen3_moe", "gpt_oss"), torch.arange(3, 19).view(2, 8)
    expected = {}
    for family in families:
        model, _ = build(family)
        model.save_pretrained(tmp_path / family)
        tuned = accelerated(adapted(model))
        tuned.save_pretrained(tmp_path / f"{family}-ours")
        expected[family] = tuned(ids).logits
    subprocess.run([sys.executable, "-c", STOCK, str(tmp_path), *families], check=True, timeout=240, cwd=tmp_path)
    for family in families:
        torch.testing.assert_close(torch.load(tmp_path / f"{family}-ours.pt"), expected[family])
        base = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float64)
        loaded = PeftModel.from_pretrained(base, tmp_path / f"{family}-stock")
        accelerate_adapters(loaded)
        torch.testing.assert_close(loaded(ids).logits, torch.load(tmp_path / f"{family}-stock.pt"))


# Merging


def test_a_merge_that_keeps_the_outputs_passes():
    model, inputs = build("gpt_oss", torch.float32)
    tuned = accelerated(adapted(model, attention=True)).train()
    expected = outputs(copy.deepcopy(tuned).eval(), inputs)
    merged = merge_and_check(tuned, **inputs)
    assert merged.training
    assert not wrappers(merged)
    torch.testing.assert_close(outputs(merged.eval(), inputs), expected, rtol=1e-4, atol=1e-5)


def test_an_untrained_adapter_merges():
    model, inputs = build("qwen3_moe", torch.float32)
    tuned = get_peft_model(model, expert_lora_config(model))
    merge_and_check(tuned, **inputs)


WRONG_DELTAS = {
    "none": lambda wrapper, delta: torch.zeros_like(delta),
    "twice": lambda wrapper, delta: 2 * delta,
    "of_other_experts": lambda wrapper, delta: delta.roll(1, 0),
    "one_projection": lambda wrapper, delta: delta * (wrapper.parameter_name == "down_proj"),
}


@pytest.mark.parametrize("case", WRONG_DELTAS)
def test_a_wrong_merge_raises(case, monkeypatch):
    right = peft_layer.ParamWrapper.get_delta_weight
    monkeypatch.setattr(
        peft_layer.ParamWrapper, "get_delta_weight", lambda self, name: WRONG_DELTAS[case](self, right(self, name))
    )
    model, inputs = build("qwen3_moe", torch.float32)
    with pytest.raises(MergeError, match=r"off by .* \(median token\), the adapter changes them by .*no rounding"):
        merge_and_check(accelerated(adapted(model)), **inputs)


def test_an_adapter_that_disappears_in_bfloat16_raises_and_passes_in_float32():
    for dtype in (torch.bfloat16, torch.float32):
        model, inputs = build("qwen3_moe", dtype)
        tuned = fill(accelerated(adapted(model)), std=0.01)
        if dtype == torch.float32:
            merge_and_check(tuned, **inputs)
            continue
        with pytest.raises(MergeError, match=r"the adapter disappears in the rounding\. Merge in float32"):
            merge_and_check(tuned, **inputs)


def test_merging_into_computed_weights_raises():
    model, inputs = build("qwen3_moe", torch.float32)
    for layer in hf_moe.moe_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(layer.experts, name, Halved(), unsafe=True)
    with pytest.raises(MergeError, match="cannot be merged into"):
        merge_and_check(accelerated(adapted(model)), **inputs)


def test_merge_refuses_what_it_cannot_check():
    model, inputs = build("qwen3_moe", torch.float32)
    with pytest.raises(TypeError, match="takes a PeftModel, got Qwen3MoeForCausalLM"):
        merge_and_check(model, **inputs)
    with pytest.raises(ValueError, match="needs a batch"):
        merge_and_check(adapted(model))
    broken = fill(adapted(model), std=float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        merge_and_check(broken, **inputs)


# The config


@pytest.mark.parametrize("family", NATIVE)
def test_the_config_names_both_projections_of_every_layer_and_nothing_else(family):
    model, inputs = build_tiny(family)
    layers = hf_moe.moe_layers(model)
    tuned = get_peft_model(model, expert_lora_config(model, r=2))
    assert len(accelerate_adapters(tuned)) == len(layers)
    assert len(wrappers(tuned)) == 2 * len(layers)
    assert {id(wrapper.get_base_layer()) for wrapper in wrappers(tuned)} == {id(layer.experts) for layer in layers}
    hf_moe.verify_router_frozen(tuned)
    tuned(**inputs)


def test_names_are_short_where_that_is_unambiguous():
    model, _ = build("qwen3_moe")
    config = expert_lora_config(model, attention=True)
    assert sorted(config.target_parameters) == sorted(EXPERTS)
    assert sorted(config.target_modules) == [f"self_attn.{name}_proj" for name in "koqv"]
    assert (config.r, config.lora_alpha) == (16, 32)
    assert sorted(expert_lora_config(adapted(model)).target_parameters) == sorted(EXPERTS)
    model.stray = nn.Module()
    model.stray.mlp = nn.Module()
    model.stray.mlp.experts = nn.Module()
    model.stray.mlp.experts.down_proj = nn.Parameter(torch.zeros(2, 3, 4))
    assert "model.layers.2.mlp.experts.down_proj" in expert_lora_config(model).target_parameters


@pytest.mark.parametrize("family", ["deepseek_v3", "hf_moe"])
def test_shared_experts_are_adapted_whatever_peft_makes_of_their_names(family):
    """PEFT takes the module name gate_proj for the experts' gate_up_proj in families that transformers 4 had."""
    model, inputs = build(family, **({"num_shared_experts": 2} if family == "hf_moe" else {}))
    stock = adapted(model, shared_experts=True)
    adapted_paths = {name for name, p in stock.named_parameters() if ".lora_A." in name and "shared" in name}
    assert len(adapted_paths) == 3 * len(hf_moe.moe_layers(model))
    assert {module.r["default"] for module in wrappers(stock)} == {RANK}
    assert_equal(results(accelerated(stock), inputs), results(stock, inputs))


BAD_CONFIGS = {
    "dropout": ({"lora_dropout": 0.1}, r"lora_dropout must be 0.0 on fused experts, got 0.1: PEFT has no input"),
    "other_parameters": ({"target_parameters": ["x"]}, "chooses target_parameters"),
    "all_linear": ({"target_modules": "all-linear"}, "must be a list of names, got 'all-linear'"),
    "the_router": ({"target_modules": ["mlp.gate"]}, r"would train the router model.layers.0.mlp.gate"),
    "the_router_by_its_old_name": ({"target_modules": ["gate"]}, "would train the router"),
    "a_copy_of_the_router": ({"modules_to_save": ["gate"]}, "would train the router"),
    "a_copy_of_a_block": ({"modules_to_save": ["layers.0.mlp"]}, "would train the router"),
    "a_copy_of_the_experts": ({"modules_to_save": ["experts"]}, "a whole copy of model.layers.0.mlp.experts"),
    "no_layer": ({"layers_to_transform": []}, r"layers_to_transform=\[\] names no layer"),
    "no_such_layer": ({"layers_to_transform": [1, 7]}, "names layer 7, which Qwen3MoeForCausalLM has not"),
    "no_experts_left": ({"exclude_modules": ["experts"]}, r"exclude_modules=\['experts'\] leave no experts"),
    "a_module_of_another_layer": (
        {"layers_to_transform": 1, "target_modules": ["model.layers.0.self_attn.q_proj"]},
        "by its whole path, which PEFT adapts whatever layers_to_transform=1 say",
    ),
    "a_rank_of_nothing": ({"rank_pattern": {"experts.up_proj": 2}}, "rank_pattern 'experts.up_proj' matches nothing"),
    "an_alpha_of_nothing": ({"alpha_pattern": {"q_proj": 2}}, "the ends of the names are experts.down_proj, experts"),
    "no_option": ({"layers_to_transfrom": [1]}, "LoraConfig has no option 'layers_to_transfrom'"),
    "no_shared_experts": ({"shared_experts": True}, "Qwen3MoeForCausalLM has no shared experts"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused(case):
    options, message = BAD_CONFIGS[case]
    model, _ = build("qwen3_moe")
    with pytest.raises((TypeError, ValueError), match=message):
        expert_lora_config(model, **options)


OTHER_VALUES = {"bias": "all", "fan_in_fan_out": True, "megatron_core": "other", "qalora_group_size": 8}


def test_every_option_of_peft_is_honoured_or_refused():
    """A field that a newer PEFT adds fails here until it is in one of the two."""
    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    assert fields <= lora_options.HONOURED | lora_options.REFUSED.keys()
    assert not lora_options.HONOURED & lora_options.REFUSED.keys()
    model, _ = build("qwen3_moe")
    for name in fields - lora_options.HONOURED:
        with pytest.raises(ValueError, match=rf"{name} must be .* on fused experts, got .*: [^.]+\."):
            expert_lora_config(model, **{name: OTHER_VALUES.get(name, 1)})
    plain = {field.name: getattr(LoraConfig(), field.name) for field in dataclasses.fields(LoraConfig) if field.init}
    expert_lora_config(model, **{name: plain[name] for name in fields & lora_options.REFUSED.keys()})


def test_an_option_that_hf_moe_does_not_know_is_refused(monkeypatch):
    monkeypatch.setattr(lora_options, "HONOURED", lora_options.HONOURED - {"use_rslora"})
    with pytest.raises(ValueError, match=r"use_rslora must be False .* does not know this option of a newer PEFT"):
        expert_lora_config(build("qwen3_moe")[0], use_rslora=True)


STARTS = ("corda", "eva", "loftq", "lora_ga", "mica", "olora", "orthogonal", "pissa", "pissa_niter_4")


@pytest.mark.parametrize("start", STARTS)
def test_starts_from_the_weights_are_refused(start):
    with pytest.raises(ValueError, match=f"init_lora_weights must be .*, got '{start}': any other is computed from"):
        expert_lora_config(build("qwen3_moe")[0], init_lora_weights=start)


CHOICES = {
    "one_layer": ({"layers_to_transform": 1}, {1}),
    "two_layers": ({"layers_to_transform": [0, 2], "layers_pattern": "layers"}, {0, 2}),
    "without_the_experts_of_one": ({"exclude_modules": ["layers.1.mlp.experts"]}, {0, 2}),
    "without_one_layer": ({"exclude_modules": r".*layers\.1\..*"}, {0, 2}),
}


@pytest.mark.parametrize("case", CHOICES)
def test_experts_are_chosen_by_layer_as_modules_are(case):
    options, expected = CHOICES[case]
    model, _ = build("deepseek_v3", first_k_dense_replace=0)
    tuned = get_peft_model(model, expert_lora_config(model, r=2, attention=True, shared_experts=True, **options))
    layers = {"experts": set(), "self_attn": set(), "shared_experts": set()}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            layers[next(kind for kind in layers if f".{kind}." in name)].add(int(name.split(".layers.")[1][0]))
    everywhere = {0, 1, 2} if case == "without_the_experts_of_one" else expected
    assert layers == {"experts": expected, "self_attn": everywhere, "shared_experts": everywhere}


def test_one_projection_is_left_out_by_name():
    model, _ = build("qwen3_moe")
    assert expert_lora_config(model, exclude_modules=["experts.gate_up_proj"]).target_parameters == EXPERTS[1:]


def test_a_linear_inside_a_router_is_refused():
    model, _ = build("hf_moe")
    for layer in hf_moe.moe_layers(model):
        layer.router.proj = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"would train the router .*\.proj"):
        expert_lora_config(model, target_modules=["proj"])


def test_a_dense_model_has_nothing_to_adapt():
    with pytest.raises(ValueError, match="Linear has no MoE layer"):
        expert_lora_config(nn.Linear(2, 2))


# What cannot be accelerated


def test_no_adapter_is_refused():
    model, _ = build("qwen3_moe")
    with pytest.raises(ValueError, match="no expert of this model has a LoRA adapter"):
        accelerate_adapters(model)


def test_what_cannot_be_served_is_refused_with_the_reason_and_left_alone():
    model, _ = build("gpt_oss")
    config = LoraConfig(r=2, target_modules=[], target_parameters=[*EXPERTS, "mlp.experts.down_proj_bias"])
    tuned = get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(ValueError, match="down_proj_bias is adapted; only the projections"):
        accelerate_adapters(tuned)
    assert {type(wrapper) for wrapper in wrappers(tuned)} == {peft_layer.ParamWrapper}

    tuned = adapted(model)
    wrappers(tuned)[0].__class__ = type("ParamWrapper", (peft_layer.ParamWrapper,), {})
    with pytest.raises(ValueError, match="not by PEFT"):
        accelerate_adapters(tuned)

    tuned = adapted(model)
    tuned.get_base_model().set_experts_implementation("hf_moe_reference")
    with pytest.raises(ValueError, match="'hf_moe_reference' takes no low-rank factors; 'hf_moe', "):
        accelerate_adapters(tuned)

    tuned = adapted(model)
    experts = hf_moe.moe_layers(tuned)[0].experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"stored as torch.int8, which hf_moe does not read: load the model"):
        accelerate_adapters(tuned)


def test_an_implementation_that_takes_no_factors_raises_in_the_forward():
    model, inputs = build("qwen3_moe")
    tuned = accelerated(adapted(model))
    tuned.get_base_model().set_experts_implementation("eager")
    with pytest.raises(ValueError, match="'eager' takes no low-rank factors"):
        tuned(**inputs)
    with tuned.disable_adapter():
        tuned(**inputs)


def test_the_reference_refuses_factors():
    model, _ = build("gpt_oss")
    model.set_experts_implementation("hf_moe_reference")
    up = LowRank(torch.randn(8, 3, 32).double(), torch.randn(8, 48, 3).double(), 0.3)
    call = (torch.randn(6, 32).double(), torch.arange(12).view(6, 2) % 8, torch.rand(6, 2).double())
    with pytest.raises(ValueError, match="hf_moe_reference takes no low-rank factors: use 'hf_moe'"):
        model.model.layers[0].mlp.experts(*call, low_rank=LowRankPair(up, None))


def test_kernels_of_transformers_are_not_chosen_for_adapters(monkeypatch):
    model, _ = build("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    monkeypatch.setenv("HF_MOE_DELEGATE", "sonicmoe")
    monkeypatch.setitem(BACKENDS, "sonicmoe", Backend("sonicmoe"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    cuda = torch.device("cuda", 0)
    request = request_for(experts.bfloat16(), storage_of(experts), cuda)
    assert choose(request).name == "sonicmoe"
    assert choose(request._replace(adapted=True)).name != "sonicmoe"


def test_ranks_are_padded_for_torch_s_grouped_product():
    """Off the CPU: rows of whole 16 bytes, contiguous, and the same sum."""
    seen = []

    def grouped_linear(rows, weight, bias, end, transposed):
        seen.append(tuple(weight.shape))
        assert weight.is_contiguous()
        return rows.new_empty(len(rows), weight.shape[1])

    factors = LowRank(torch.empty(4, 5, 16, device="meta"), torch.empty(4, 32, 5, device="meta"), 1.0)
    pipeline._adapt(grouped_linear, torch.empty(3, 16, device="meta"), factors, torch.empty(4, device="meta"))
    assert seen == [(4, 8, 16), (4, 32, 8)]


def test_adapter_files_hold_no_trace_of_us(tmp_path):
    model, _ = build("qwen3_moe")
    stock = adapted(model)
    stock.save_pretrained(tmp_path / "stock")
    accelerated(stock).save_pretrained(tmp_path / "ours")
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "ours")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[1][key], value) for key, value in tensors[0].items())
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("stock", "ours")]
    for config in configs:
        config["target_parameters"].sort()  # PEFT writes a set
    assert configs[0] == configs[1]
