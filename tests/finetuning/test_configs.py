"""Every shipped config, read by the parser of its recipe and held against its family."""

import importlib
import re
from pathlib import Path

import peft
import pytest
from packaging import version
from transformers import AutoConfig

pytest.importorskip("hf_moe.recipes", reason="hf_moe is not installed: pip install -e .")
from hf_moe.finetuning import arguments as kinds
from hf_moe.finetuning.command_line.parse import parse_recipe
from hf_moe.finetuning.prepare import dequantised
from hf_moe.finetuning.run.learning_rate import USUAL, rate_warning
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.loading.pretrained import build_empty

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
COMPUTED = (ROOT / "benchmarks" / "results" / "memory_computed.md").read_text()
# by config: the recipe, the model type, billions of parameters as published (from memory), and the row of
# benchmarks/results/memory_computed.md
REAL = {
    "qwen3_30b_a3b_expert_lora": ("finetune_expert_lora", "qwen3_moe", 30.5, "Qwen3-30B-A3B | expert LoRA r=8"),
    "olmoe_1b_7b_expert_lora": ("finetune_expert_lora", "olmoe", 6.9, "OLMoE-1B-7B | expert LoRA r=16"),
    "gpt_oss_20b_expert_lora": ("finetune_expert_lora", "gpt_oss", 20.9, "gpt-oss-20b | expert LoRA r=16"),
    "mixtral_8x7b_expert_lora": ("finetune_expert_lora", "mixtral", 46.7, "Mixtral-8x7B | expert LoRA r=16"),
    "deepseek_v2_lite_esft": ("finetune_esft", "deepseek_v2", 15.7, "DeepSeek-V2-Lite | ESFT, 20%"),
    "glm_4_5_air_adapter_experts": (
        "finetune_adapter_experts",
        "glm4_moe",
        106.8,
        "GLM-4.5-Air | adapter experts",
    ),
}
TOY = {name: f"finetune_{name}" for name in ("expert_lora", "adapter_experts", "esft", "full")}


def parsed(recipe, name):
    if recipe == "finetune_adapter_experts" and version.parse(peft.__version__) < version.parse("0.21"):
        pytest.skip("adapter experts need peft 0.21")
    module = importlib.import_module(f"hf_moe.recipes.{recipe}")
    own = next(
        each for each in vars(module).values() if isinstance(each, type) and each.__name__.endswith("Arguments")
    )
    rest = kinds.WEIGHT_RECIPE if recipe in ("finetune_esft", "finetune_full") else kinds.RECIPE
    return parse_recipe((own, *rest), ["--config", f"{name}.yaml", "--use_cpu"], module.__file__)


@pytest.mark.parametrize("name", REAL)
def test_a_config_of_a_real_model_parses_and_fits_its_family(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe, model_type, billions, row = REAL[name]
    _, _, texts, training = parsed(recipe, name)
    assert all(Path(each["path"]).exists() for each in texts.data)
    trained = "weights" if recipe == "finetune_esft" else "adapter"
    low, high = USUAL[trained]
    assert low <= training.learning_rate <= high
    assert rate_warning(training.learning_rate, int(billions * 1e9), trained) is None
    assert (training.warmup_steps, str(training.lr_scheduler_type.value)) == (0.03, "cosine")
    assert texts.packing is (model_type != "gpt_oss"), "the recipe refuses to pack for gpt-oss"
    sizes = {"num_hidden_layers": 2, "num_experts_per_tok": 4}
    assert moe_layers(build_empty(AutoConfig.for_model(model_type, **sizes)))
    total = re.search(rf"^\| {re.escape(row)} \|(?: [^|]+ \|){{5}} ([\d.]+) \|", COMPUTED, re.MULTILINE)[1]
    assert f"memory    {total} GiB" in (CONFIGS / f"{name}.yaml").read_text()
    (line,) = re.findall(rf"^\| \[{name}\].*$", (ROOT / "recipes" / "README.md").read_text(), re.MULTILINE)
    assert f" {total} GiB " in line


@pytest.mark.parametrize("name", TOY)
def test_a_config_of_the_quickstart_parses_and_says_so(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _, model, texts, training = parsed(TOY[name], f"quickstart/{name}")
    assert model.model == "quickstart-output/model"
    assert all(Path(each["path"]).exists() for each in texts.data)
    trained = "weights" if name in ("esft", "full") else "adapter"
    assert rate_warning(training.learning_rate, 3_876_224, trained) is None


def test_every_config_is_known_here_and_names_its_purpose():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(REAL)
    toys = [path.read_text() for path in (CONFIGS / "quickstart").glob("*.yaml")]
    assert len(toys) == 7
    assert all("hf-moe quickstart" in text.splitlines()[0] for text in toys)


@pytest.mark.parametrize(
    ("rate", "parameters", "trained", "warns"),
    [
        (3e-3, 3_876_224, "adapter", False),
        (1e-3, 3_876_224, "weights", False),
        (1e-3, 1_100_000_000, "adapter", True),
        (1e-3, 1_100_000_000, "weights", True),
        (2e-4, 700_000_000_000, "adapter", False),
        (2e-5, 700_000_000_000, "weights", False),
        (2e-4, 30_500_000_000, "weights", True),
    ],
)
def test_a_rate_above_what_the_size_bears_is_warned_of(rate, parameters, trained, warns):
    warning = rate_warning(rate, parameters, trained)
    assert (warning is not None) is warns
    if warns:
        assert f"{USUAL[trained][0]:g} to {USUAL[trained][1]:g}" in warning


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "bitsandbytes"])
def test_a_quantised_checkpoint_is_read_as_bfloat16_or_refused(method):
    config = AutoConfig.for_model("gpt_oss", num_hidden_layers=1)
    assert dequantised(config) == {}
    config.quantization_config = {"quant_method": method, "modules_to_not_convert": ["lm_head"]}
    if method == "bitsandbytes":
        with pytest.raises(kinds.RecipeError, match=r"quantised \(bitsandbytes\)"):
            dequantised(config)
    else:
        options = dequantised(config)["quantization_config"]
        assert (options.quant_method.value, options.dequantize) == (method, True)
        assert options.modules_to_not_convert == ["lm_head"]
