"""What is computed of a config alone against models that are there: trained, held and kept for backward."""

import copy
import json
import math
import sys
from pathlib import Path

import peft
import pytest
import torch
from packaging import version
from peft import get_peft_model
from transformers import AutoConfig, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from hf_moe.adapters.adapter_experts import AdapterExpertsConfig
from hf_moe.adapters.esft import train_selected_experts
from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.expert_selection import ExpertSelection
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.loading.pretrained import build_empty
from hf_moe.observability.explain import explain_config
from hf_moe.planner import methods
from hf_moe.planner.fit import GIB, RESERVE, Fit, MethodFit, fit
from hf_moe.planner.fit_table import fit_text, markdown_rows
from hf_moe.planner.quantised import quantised_weights
from hf_moe.planner.saved_bytes import saved_bytes
from hf_moe.planner.shapes_only import ShapesError, computed_saved_bytes
from hf_moe.planner.step_memory import StepMemory, bytes_of, step_memory
from tiny_models import FAMILIES, build_tiny

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from published_models import MODELS, PUBLISHED, config_of

TOKENS = 32


def tiny(family: str, dtype: torch.dtype = torch.bfloat16):
    """A tiny model in `dtype`, and its config, which says so."""
    model = build_tiny(family, max_position_embeddings=TOKENS)[0].to(dtype)
    model.config.dtype = dtype
    return model, model.config


def with_lora(model):
    model.requires_grad_(False)
    adapted = get_peft_model(model, expert_lora_config(model, 8))
    accelerate_adapters(adapted)
    return adapted


def with_esft(model):
    model.set_experts_implementation("hf_moe")
    busiest = {layer.plain_name: range(math.ceil(0.2 * layer.num_experts)) for layer in moe_layers(model)}
    return train_selected_experts(model, ExpertSelection.from_experts(model, busiest))


def fully(model):
    freeze_router(model)
    return model


# older ones cannot save adapter experts, and the table leaves them out with a note
NEEDS_PEFT_21 = pytest.mark.skipif(version.parse(peft.__version__) < version.parse("0.21"), reason="needs peft 0.21")
REAL = {
    "expert LoRA r=8": with_lora,
    "adapter experts": lambda model: get_peft_model(model, AdapterExpertsConfig()),
    "ESFT, 20%": with_esft,
    "full, bfloat16": fully,
    "full, float32": lambda model: fully(model.float()),
}


@NEEDS_PEFT_21
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_weights_gradients_and_moments_are_those_of_a_real_step(family):
    found = {each.name: each for each in fit(tiny(family)[1], TOKENS).methods}
    for name, attach in REAL.items():
        model = attach(tiny(family)[0])
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        computed = found[name].memory
        assert found[name].trained == sum(p.numel() for p in trained), name
        assert computed.gradients == bytes_of(p.grad for p in trained), name
        assert computed.optimizer == bytes_of(moments), name
        assert computed.weights == bytes_of(model.parameters()), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoehybrid", "nemotron_h"])
@pytest.mark.parametrize("adapted", [False, True])
def test_what_forward_keeps_is_what_a_real_forward_keeps(family, adapted):
    """The same but for the order of the rows, an int32 each, that kernels of GPUs keep and those of CPUs do not."""
    model = tiny(family, torch.float32)[0]
    model.set_experts_implementation("hf_moe")
    model = with_lora(model) if adapted else model
    ids = torch.ones(1, TOKENS, dtype=torch.int64)
    measured = saved_bytes(model, {"input_ids": ids, "labels": ids})
    order = sum(4 * TOKENS * layer.top_k for layer in moe_layers(model))
    # sizes of state space models are held in small tensors besides
    assert -0.01 * measured <= computed_saved_bytes(model.to("meta"), TOKENS) - measured <= order + 0.01 * measured


BUILT = {
    "expert LoRA r=8": lambda config: methods.expert_lora(config, 8),
    "adapter experts": methods.adapter_experts,
    "ESFT, 20%": methods.esft,
    "full, bfloat16": methods.full,
}


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted(family):
    model, config = tiny(family)
    try:
        build_empty(config)
    except ValueError:
        pytest.skip("a part of a model, which no auto class builds alone")
    for name, build in BUILT.items():
        real, built = REAL[name](copy.deepcopy(model)), build(config)
        assert trained_names(built) == trained_names(real), name


def trained_names(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_parameters(name):
    found = explain_config(config_of(name))
    assert found.total_parameters == pytest.approx(PUBLISHED[name][0] * 1e9, rel=0.01)


@NEEDS_PEFT_21
def test_a_published_layer_from_end_to_end():
    """Of OLMoE; factors by hand: 64 experts, r times (in + out) of both projections."""
    found = fit(config_of("OLMoE-1B-7B", num_hidden_layers=1, max_position_embeddings=256), 2048)
    assert found.row_length == 256  # the context of the model bounds a row
    by_name = {each.name: each for each in found.methods}
    for r in (8, 16, 32):
        assert by_name[f"expert LoRA r={r}"].trained == 64 * r * ((2048 + 2048) + (1024 + 2048))
    assert by_name["ESFT, 20%"].trained == 13 * 3 * 2048 * 1024  # 13 is the least number above 20 % of 64
    assert found.quantised is None
    assert found.notes == ()
    lines = fit_text(found, verbose=True).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:16].strip() for line in lines[4:11]] == list(by_name)
    assert len(markdown_rows(found)) == len(by_name)
    assert json.loads(json.dumps(found.to_dict()))["methods"][0]["memory"]["total"] == found.methods[0].memory.total


@pytest.mark.parametrize(("tokens", "measured"), [(16384, 12.5), (65536, 19.6)])
def test_published_peaks_of_a_dense_model_are_met(tokens, measured):
    """Qwen3-0.6B, all weights in float32, computed in bfloat16, layers checkpointed, a loss that keeps no logits.

    Source: prime-rl, BENCHMARKS.md at 30bf494, one H100, GiB. 15 %, as the banner's "about".
    """
    config = AutoConfig.for_model(
        "qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, head_dim=128,
        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    model = build_empty(config)
    saved = computed_saved_bytes(model, tokens)
    memory = step_memory(model, saved=saved, tokens=tokens, accumulates=True, checkpointing=True)
    layer = (saved - 4 * tokens * config.vocab_size) // config.num_hidden_layers
    total = 16 * sum(p.numel() for p in model.parameters()) + memory.activations + 2 * layer + RESERVE
    assert total / GIB == pytest.approx(measured, rel=0.15)


def memory_of(gib: float) -> StepMemory:
    return StepMemory(round(gib * GIB), 0, 0, 0, 0, accumulates=True)


@pytest.mark.parametrize(
    ("checkpointed", "plain", "known", "verdict"),
    [
        (60, 70, True, "yes"),
        (60, 75, True, "checkpointing"),
        (75, 90, True, "tight"),
        (79.5, 90, True, "no"),
        (60, 60, False, "unknown"),
        (90, 90, False, "no"),
    ],
)
def test_what_fits_80_gib(checkpointed, plain, known, verdict):
    assert MethodFit("", 0, memory_of(checkpointed), memory_of(plain), known).verdict(80) == verdict


@NEEDS_PEFT_21
def test_a_forward_that_needs_values_is_said_not_to_be_known(monkeypatch):
    def refuse(*_):
        raise ShapesError("nonzero() needs values")

    monkeypatch.setattr("hf_moe.planner.fit.computed_saved_bytes", refuse)
    found = fit(tiny("mixtral")[1], TOKENS)
    assert len(found.notes) == 1
    text = fit_text(found, [1])
    assert "Activations are not known" in text
    assert text.count("?") >= len(found.methods)
    assert all(each.memory.work == each.memory.activations == 0 for each in found.methods)
    with pytest.raises(ShapesError, match="TypeError: "):
        computed_saved_bytes(torch.nn.Linear(1, 1), 1)


def test_a_dense_model_has_full_fine_tuning_alone():
    config = config_of("Mixtral-8x7B", model_type="llama", num_hidden_layers=2)
    assert [each.name for each in fit(config, 64).methods] == ["full, bfloat16", "full, float32"]


def quantised(settings: dict, name: str = "OLMoE-1B-7B") -> Fit:
    return fit(config_of(name, num_hidden_layers=1, quantization_config=settings), 64)


def test_experts_that_bitsandbytes_skips_stay_as_they_are():
    found = quantised({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True})
    experts = 2 * 64 * 3 * 2048 * 1024
    linear = 4 * 2048 * 2048  # attention; the output head stays
    assert found.quantised.experts_stored == found.quantised.experts_dense == experts
    packed = linear // 2 + linear // 64 + linear // 64 // 256 * 4
    assert found.quantised.stored == found.weights - 2 * linear + packed
    assert "the experts stay unpacked, 768 MiB" in " ".join(fit_text(found).split())


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_fp8_is_what_transformers_makes_of_the_layers(scales):
    block = {"weight_block_size": (128, 128), "scale_fmt": scales}
    config = config_of("DeepSeek-V3", num_hidden_layers=4, quantization_config={"quant_method": "fp8", **block})
    found = quantised_weights(build_empty(config), config)
    with torch.device("meta"):
        model = replace_with_fp8_linear(
            build_empty(config), modules_to_not_convert=["lm_head"], quantization_config=FineGrainedFP8Config(**block)
        )
    assert found.stored == found.in_training == bytes_of(model.parameters())
    assert found.experts_stored == bytes_of(moe_layers(model)[0].experts.parameters())


def test_what_is_published_of_stored_sizes():
    """gpt-oss-20b: 12.8 GiB on the Hub. DeepSeek-V3: 671B parameters in fp8, with scales and what stays wider."""
    for name, low, high in (("gpt-oss-20b", 12.75, 12.85), ("DeepSeek-V3", 625, 630)):
        config = config_of(name)
        assert low < quantised_weights(build_empty(config), config).stored / GIB < high


def test_of_an_unknown_quantiser_nothing_is_claimed():
    found = quantised({"quant_method": "awq", "bits": 4})
    assert found.quantised.stored is None
    assert found.quantised.in_training == found.weights
    assert "neither its stored size nor whether it reaches the experts can be told" in " ".join(
        fit_text(found).split()
    )


def test_all_published_models_have_a_config():
    assert MODELS.keys() == PUBLISHED.keys()


@pytest.mark.slow
def test_the_table_in_the_results_is_what_is_computed_now():
    text = Path(__file__, "../../../benchmarks/results/memory_computed.md").resolve().read_text(encoding="utf-8")
    assert all(f"| {name} | expert LoRA r=16 | " in text for name in MODELS)
    assert all(f"| OLMoE-1B-7B {row}\n" in text for row in markdown_rows(fit(config_of("OLMoE-1B-7B"), 2048)))
