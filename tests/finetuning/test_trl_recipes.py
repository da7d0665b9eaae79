"""The recipes with TRL, tiny: what they save, prove, refuse, learn and resume."""

import importlib
import json

import pytest
import torch

pytest.importorskip("trl", reason="needs TRL: pip install hf-moe[trl]")

from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401 (registers)
from hf_moe.adapters.frozen_router import router_hash
from hf_moe.data.bad_rows import DataError
from hf_moe.finetuning.arguments import RecipeError
from tiny_moe import save_tiny_models, tiny_tokenizer, words
from tiny_multimodal import build_multimodal

FAMILIES = ("hf_moe", "qwen3_moe")
RECIPES = ("sft_trl", "dpo_trl")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_tiny_models(tmp_path_factory.mktemp("models"), FAMILIES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file for each recipe: a completion that follows from nothing, and one that is liked better than another."""
    folder = tmp_path_factory.mktemp("data")
    liked, other = words(6, 7), words(6, 8)
    records = {
        "sft_trl": [{"prompt": words(4, seed), "completion": liked} for seed in range(24)],
        "dpo_trl": [{"prompt": words(4, seed), "chosen": liked, "rejected": other} for seed in range(24)],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def no_card(monkeypatch):
    """Plots take longer than these runs."""
    monkeypatch.setattr("hf_moe.finetuning.trl.write_results", lambda *arguments, **options: None)


def run(recipe, models, data, output, family="hf_moe", *more):
    return importlib.import_module(f"hf_moe.recipes.{recipe}").main(
        [
            "--model", str(models / family), "--data", str(data / f"{recipe}.jsonl"), "--output_dir", str(output),
            "--use_cpu", "--dataloader_pin_memory", "False", "--disable_tqdm", "True", "--r", "4", "--bf16", "False",
            "--per_device_train_batch_size", "2", "--max_length", "48", *more,
        ]
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_saves_and_proves(recipe, family, models, data, tmp_path):
    report = run(recipe, models, data, tmp_path / "out", family, "--smoke")
    assert report["steps"] == 4
    assert report["router_sha256"]["before"] == report["router_sha256"]["after"]
    assert 0 < report["parameters"]["trained"] < report["parameters"]["total"]
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert not any("aux_loss" in record for record in report["log"])
    assert str(models) not in json.dumps(report)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) >= 4
    assert all(record["moe/max_violation"] >= 0 for record in report["log"])
    (domain,) = report["domains"].values()
    assert domain["before"]["bits_per_byte"] > 0
    assert report["samples"][0]["prompt"].strip() in {words(4, seed).strip() for seed in range(24)}
    # the one card is ours: neither TRL's nor PEFT's, also in checkpoints
    assert [path.parent for path in (tmp_path / "out").rglob("README.md")] == [tmp_path / "out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert " with expert LoRA, " in card
    assert "| loss of TRL's trainer, in nats |" in card
    assert "None" not in card
    assert sorted(path.name for path in (tmp_path / "out" / "plots").iterdir()) == ["bits_per_byte.png", "loss.png"]
    base = AutoModelForCausalLM.from_pretrained(models / family)
    ids = torch.arange(20)[None]
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert not torch.equal(model(ids).logits, before)
    assert router_hash(model) == report["router_sha256"]["after"]


def test_a_vision_language_model_is_trained_whole(data, tmp_path):
    tokenizer = tiny_tokenizer()
    whole, inputs = build_multimodal("qwen3_vl_moe", vocab_size=len(tokenizer))
    whole.save_pretrained(tmp_path / "vision")
    tokenizer.save_pretrained(tmp_path / "vision")
    run("sft_trl", tmp_path, data, tmp_path / "out", "vision", "--smoke", "--learning_rate", "0.05")
    plain = whole(**inputs).logits
    model = PeftModel.from_pretrained(whole, tmp_path / "out" / "adapter")
    assert (model(**inputs).logits - plain).abs().max() > 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_learns(recipe, models, data, tmp_path, no_card):
    options = ("--max_steps", "25", "--learning_rate", "1e-2", "--save_strategy", "no", "--sample_prompts", "0")
    held_out = run(recipe, models, data, tmp_path / "out", "hf_moe", *options)["held_out"]
    if recipe == "sft_trl":
        assert held_out["after"]["loss"] < 0.95 * held_out["before"]["loss"]
        assert held_out["after"]["mean_token_accuracy"] > 0.3
    else:
        assert held_out["before"]["rewards/margins"] == 0  # policy and reference are one: the adapter begins as zero
        assert held_out["after"]["rewards/margins"] > 0.1


def test_an_interrupted_run_continues_to_the_same_weights(models, data, tmp_path, no_card):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("sft_trl", models, data, whole, "hf_moe", "--smoke")
    run("sft_trl", models, data, parts, "hf_moe", "--smoke")
    (parts / "checkpoint-4" / "manifest.json").unlink()  # as if killed while saving
    report = run("sft_trl", models, data, parts, "hf_moe", "--smoke", "--resume_from_checkpoint", "auto")
    assert report["steps"] == 4
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_used_folder_is_refused(models, data, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RecipeError, match="not empty"):
        run("dpo_trl", models, data, tmp_path, "hf_moe", "--smoke")


def test_data_of_another_kind_are_refused(models, data, tmp_path):
    (data / "dpo_trl.jsonl").rename(tmp_path / "kept.jsonl")
    (data / "dpo_trl.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    try:
        with pytest.raises(DataError, match="it needs 'prompt' and 'chosen' and 'rejected'"):
            run("dpo_trl", models, data, tmp_path / "out", "hf_moe", "--smoke")
    finally:
        (tmp_path / "kept.jsonl").replace(data / "dpo_trl.jsonl")
