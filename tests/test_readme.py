"""The README's Python code runs as it stands, and what the documents point at is there."""

import pkgutil
import re
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import hf_moe
from tiny_hf_moe import random_ids
from tiny_models import CLASSES
from tiny_moe import hf_moe_model, qwen_model, tiny_tokenizer, with_expert_lora

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = ["README.md", "SECURITY.md", "recipes/README.md", "benchmarks/README.md"]


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


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_names_in_the_documents_exist(document):
    text = (ROOT / document).read_text()
    links = [(ROOT / document).parent / link for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    paths = links + [ROOT / path for path in re.findall(r"`(tests/[\w/.]+)`", text)]
    assert [path for path in paths if not path.exists()] == []
    if "hf_moe.finetuning.trl" in text:
        pytest.importorskip("trl")
    for dotted in re.findall(r"\bhf_moe(?:\.\w+)+", text):
        pkgutil.resolve_name(dotted)
    for names, module in re.findall(r"((?:`\w+`(?:, )?)+) (?:of|in) `(hf_moe\.[\w.]+)`", text):
        assert [name for name in re.findall(r"\w+", names) if not hasattr(pkgutil.resolve_name(module), name)] == []


def test_the_tree_names_every_part_of_the_package_and_counts_its_names():
    tree = re.search(r"^```\n(hf_moe/ .*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)[1]
    assert f" {len(hf_moe.__all__)} public names" in tree
    named = re.findall(r"^  (\w+/|\w+\.py) ", tree, re.MULTILINE) + re.findall(r"; (\w+\.py): ", tree)
    parts = [file for file in (ROOT / "hf_moe").iterdir() if file.suffix == ".py" or (file / "__init__.py").exists()]
    assert sorted(named) == sorted(file.name + "/" * file.is_dir() for file in parts)
