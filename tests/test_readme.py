"""The README's Python code runs as it stands."""

import re
from pathlib import Path

import torch
from transformers import TrainingArguments

from tiny_hf_moe import random_ids
from tiny_models import CLASSES
from tiny_moe import hf_moe_model, qwen_model, tiny_tokenizer, with_expert_lora

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_code_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    hf_moe_model(vocab_size=300).save_pretrained(tmp_path / "quickstart-output" / "model")
    with_expert_lora(hf_moe_model(vocab_size=300), init_lora_weights=False).save_pretrained(
        tmp_path / "quickstart-output" / "adapter"
    )
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    use, build, adapters, balance, trace = blocks
    arguments = TrainingArguments(
        output_dir="out", max_steps=2, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no"
    )
    names = {"args": arguments, "data": [{"input_ids": row, "labels": row} for row in random_ids(16)]}

    def run(block):
        exec(compile(block, str(README), "exec"), names)

    run(use)
    assert "MoE layers: 3" in capsys.readouterr().out
    assert isinstance(names["hash_before"], str)
    run(build)
    assert sum(parameter.numel() for parameter in names["model"].parameters()) > 1e8
    assert torch.is_tensor(names["model"].model.layers[0].mlp.gate.e_score_correction_bias)
    names |= {"texts": ["some words of a domain"] * 8, "tokenizer": tiny_tokenizer(), "ids": random_ids(16)}
    run(adapters)
    assert (tmp_path / "adapter-for-servers" / "adapter_model.safetensors").exists()
    assert sum(parameter.requires_grad for parameter in names["base"].parameters()) > 0
    # a small model of another family for the rest
    names |= {"model": qwen_model(), "batch": {"input_ids": random_ids(16)}}
    run(balance)
    run(trace)
    assert "tokens" in capsys.readouterr().out
    assert (tmp_path / "routing.html").stat().st_size > 10_000


def test_its_number_of_classes_is_the_one_that_the_tests_count():
    newest = max(CLASSES)
    named = re.findall(r"(\d+) (?:experts )?classes (?:of|that) transformers (\d+)\.(\d+)", README.read_text())
    assert named
    assert {(int(count), (int(major), int(minor))) for count, major, minor in named} == {(CLASSES[newest], newest)}
