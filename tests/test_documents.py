"""README and docs work as they stand: their Python runs, page by page, and their commands exist with these options.

Models are found under their real names as tiny ones of the same family (`tiny_hub`), and a training ends after two
steps; beyond the files that a page says its reader has, nothing is there that the page did not make.
"""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
from typer.main import get_command

pytest.importorskip("hf_moe.recipes", reason="hf_moe is not installed: pip install -e .")
from documents import ROOT, SHELLS, blocks, broken_links, commands, pages

from hf_moe import cli
from tiny_hub import FAMILIES, put_into_cache
from tiny_moe import hf_moe_model, with_expert_lora, words

PAGES = pages()
STEPS = 2
# programs of others: their options are not ours to check
OTHERS = {"git", "cd", "cp", "pip", "hf", "vllm", "torchrun", "accelerate", "docker"}
RECIPES = ("finetune_expert_lora", "finetune_adapter_experts", "finetune_esft", "finetune_full", "sft_trl", "dpo_trl")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def trained_adapter(tmp_path_factory):
    """Expert LoRA on the tiny model that pages call Qwen/Qwen3-30B-A3B."""
    base = AutoModelForCausalLM.from_pretrained(put_into_cache("Qwen/Qwen3-30B-A3B"))
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    with_expert_lora(base, init_lora_weights=False).save_pretrained(folder)
    return folder


@pytest.fixture
def reader(tmp_path, monkeypatch, trained_adapter):
    """A reader's working directory: a clone's recipes, and the files that pages say the reader has."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    samples = {
        "law": [{"text": words(40, seed)} for seed in range(12)],
        "known": [{"text": words(40, seed + 50)} for seed in range(12)],
        "chat": [
            {"messages": [{"role": "user", "content": words(5, n)}, {"role": "assistant", "content": words(8, n + 90)}]}
            for n in range(12)
        ],
        "preferences": [{"prompt": words(5, n), "chosen": words(6, n + 9), "rejected": words(4, n)} for n in range(12)],
    }
    Path("recipes/data").mkdir(exist_ok=True)
    for name, rows in samples.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        for folder in (Path(), Path("recipes/data")):
            (folder / f"{name}.jsonl").write_text(text)
    shutil.copytree(trained_adapter, "law-lora/adapter")
    init = TrainingArguments.__post_init__

    def short(self):
        self.max_steps, self.use_cpu = STEPS, True
        init(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", short)
    return tmp_path


def write_configs(page: Path) -> None:
    """The YAML files that a page shows under their names: "You have `law.yaml`:"."""
    for name, text in re.findall(r"`([\w.]+\.yaml)`:\n\n```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        Path(name).write_text(text)


def program(page: Path) -> str:
    """The page's Python, every block on its own lines, so that a traceback names the line of the page."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if program(page)], ids=name_of)
def test_the_python_of_a_page_is_one_program(page, reader):
    source = program(page)
    write_configs(page)
    for name in FAMILIES:
        if name in source:
            put_into_cache(name)
    exec(compile(source, str(page), "exec"), {"__name__": "__main__"})
