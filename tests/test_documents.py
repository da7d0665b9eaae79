"""README and docs work as they stand: the Python of a page is one program, its commands exist with these options, its
links lead somewhere.

Models are found under their real names as tiny ones of the same family (`tiny_hub`), and a training ends after two
steps. Beyond the files that a page says its reader has, nothing is there that the page did not make.
"""

import importlib
import json
import pkgutil
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
from packaging import version
from transformers import AutoModelForCausalLM, TrainingArguments
from typer.main import get_command
from typer.testing import CliRunner

pytest.importorskip("hf_moe.recipes", reason="hf_moe is not installed: pip install -e .")
from documents import ROOT, Block, blocks, broken_links, commands, name_of, pages, program, shown_files
from hf_moe import cli
from hf_moe.finetuning.surroundings import recipe_errors
from tiny_hub import FAMILIES, put_into_cache
from tiny_models import CLASSES
from tiny_moe import hf_moe_model, tiny_tokenizer, with_expert_lora, words

PAGES = pages()
DOCUMENTS = [*PAGES, *(ROOT / name for name in ("SECURITY.md", "recipes/README.md", "benchmarks/README.md"))]
STEPS = 2
# commands that are cheap on a tiny model, by page; of the others the options count
CHEAP = {"README.md": ("finetune", "trace", "generate", "compare"), "docs/index.md": ("info",)}


class ParsedError(BaseException):
    """A recipe has read its options and would begin. No Exception: nothing on the way may catch it."""


def records() -> dict[str, list[dict[str, Any]]]:
    """Small files by name, each with the columns of the sample data in recipes/data."""

    def turn(role: str, seed: int) -> dict[str, str]:
        return {"role": role, "content": words(8, seed)}

    return {
        "law": [{"text": words(40, seed)} for seed in range(12)],
        "known": [{"text": words(40, seed + 50)} for seed in range(12)],
        "chat": [{"messages": [turn("user", seed), turn("assistant", seed + 90)]} for seed in range(12)],
        "preferences": [
            {"prompt": words(5, seed), "chosen": words(6, seed + 9), "rejected": words(4, seed)} for seed in range(12)
        ],
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """What a reader has: the recipes of a clone, data, what the quickstart wrote, an adapter on Qwen3-30B-A3B."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for name, rows in records().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        for place in (folder, folder / "recipes" / "data"):
            (place / f"{name}.jsonl").write_text(text)
    tokenizer = tiny_tokenizer()
    base = hf_moe_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    base.save_pretrained(folder / "quickstart-output" / "model")
    tokenizer.save_pretrained(folder / "quickstart-output" / "model")
    with_expert_lora(base, init_lora_weights=False).save_pretrained(folder / "quickstart-output" / "adapter")
    base = AutoModelForCausalLM.from_pretrained(put_into_cache("Qwen/Qwen3-30B-A3B"))
    with_expert_lora(base, init_lora_weights=False).save_pretrained(folder / "law-lora" / "adapter")
    return folder


@pytest.fixture
def reader(tmp_path, monkeypatch, home):
    """The working directory is a copy of `home`, and a training is short."""
    monkeypatch.chdir(shutil.copytree(home, tmp_path, dirs_exist_ok=True))
    prepare = TrainingArguments.__post_init__

    def prepare_short(self):
        self.max_steps, self.use_cpu = STEPS, True
        prepare(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", prepare_short)


def get_ready(page: Path) -> None:
    """Put the models that the page names into the cache, and the files that it shows into the working directory."""
    text = page.read_text(encoding="utf-8")
    for name in FAMILIES:
        if name in text:
            put_into_cache(name)
    for name, content in shown_files(page).items():
        Path(name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if program(page)], ids=name_of)
def test_the_python_of_a_page_is_one_program(page, reader):
    source = program(page)
    for module in re.findall(r"^from (datasets|trl) ", source, re.MULTILINE):
        pytest.importorskip(module)
    if "AdapterExpertsConfig" in source and version.parse(peft.__version__) < version.parse("0.21"):
        pytest.skip("adapter experts need peft 0.21")
    get_ready(page)
    exec(compile(source, str(page), "exec"), {"__name__": "__main__"})


def own_commands(page: Path) -> list[tuple[Block, list[str]]]:
    found = [(block, command) for block in blocks(page) for command in commands(block)]
    return [(block, command) for block, command in found if command[0] in ("hf-moe", "python", "torchrun")]


def stop_after_parsing(monkeypatch) -> None:
    """Recipes read their options with the real parser, and go no further."""
    for file in (ROOT / "recipes").glob("*.py"):
        module = importlib.import_module(f"hf_moe.recipes.{file.stem}")
        if hasattr(module, "parse_recipe"):
            monkeypatch.setattr(module, "parse_recipe", partial(parse_and_stop, module.parse_recipe))


def parse_and_stop(parse: Callable[..., Any], *args, **kwargs):
    parse(*args, **kwargs)
    raise ParsedError


def problem(command: list[str], capsys) -> str | None:
    """What the parser that would read the command says against it."""
    program, *words = command
    try:
        if program == "hf-moe":
            parse_only(words)
        elif "hf_moe.cli" in words:
            parse_only(words[words.index("hf_moe.cli") + 1 :])
        elif found := re.search(r" (?:recipes/|hf_moe\.recipes\.)(\w+?)(?:\.py)?(?: |$)", " ".join(words)):
            with recipe_errors():
                recipe = importlib.import_module(f"hf_moe.recipes.{found[1]}")
                recipe.main(words[words.index(found[0].strip()) + 1 :])
        else:
            return problem_of_script(words)
    except ParsedError:
        return None
    except SystemExit as end:
        return capsys.readouterr().err if end.code else None
    return None


def parse_only(words: list[str]) -> None:
    """Run `hf-moe` with commands that do nothing but read their options; those of recipes go as far as the recipe."""
    group = get_command(cli.app)
    if words[0] in group.commands and words[0] != "finetune":
        group.commands[words[0]].callback = lambda **options: None
    group.main(words, prog_name="hf-moe")


def problem_of_script(words: list[str]) -> str | None:
    """Of another script or module of ours: an option that no source beside it names."""
    script = next((word for word in words if re.match(r"benchmarks/|hf_moe\.", word)), None)
    if script is None:  # pip, pytest
        return None
    path = ROOT / (script if script.endswith(".py") else script.replace(".", "/"))
    folder = path if path.is_dir() else path.parent
    source = "".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
    return f"{script} has no {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("page", [page for page in PAGES if own_commands(page)], ids=name_of)
def test_commands_have_the_options_that_a_page_gives_them(page, reader, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="all recipes are imported: pip install -e .[eval]")
    if any(command[1:2] == ["finetune"] and command[2] in ("sft", "dpo") for _, command in own_commands(page)):
        pytest.importorskip("trl")
    stop_after_parsing(monkeypatch)
    get_ready(page)
    found = [(block, command, problem(command, capsys)) for block, command in own_commands(page)]
    wrong = [f"line {block.line}: {' '.join(command)}\n{said}" for block, command, said in found if said is not None]
    assert not wrong, "\n".join(wrong)


def test_commands_in_sentences_and_tables_exist():
    group = get_command(cli.app).commands
    known = {name: {each for option in command.params for each in option.opts} for name, command in group.items()}
    wrong = []
    for page in DOCUMENTS:
        for name, rest in re.findall(r"`hf-moe ([a-z][a-z-]*)([^`]*)`", page.read_text(encoding="utf-8")):
            given = set() if name == "finetune" else set(re.findall(r"--[a-z-]+", rest))
            if name not in known or given - known[name]:
                wrong.append(f"{name_of(page)}: hf-moe {name}{rest}")
    assert wrong == []


@pytest.mark.parametrize("name", CHEAP)
def test_cheap_commands_run_as_they_are_printed(name, reader):
    get_ready(ROOT / name)
    ran = []
    for _, command in own_commands(ROOT / name):
        if command[0] == "hf-moe" and command[1] in CHEAP[name]:
            result = CliRunner().invoke(cli.app, command[1:], catch_exceptions=False)
            # 1: thresholds that this model does not keep
            assert result.exit_code in ({0, 1} if "--gate" in command else {0}), f"{command}: {result.output}"
            ran.append(command[1])
    assert set(ran) == set(CHEAP[name])


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_links_files_and_names_in_a_document_exist(page):
    text = page.read_text(encoding="utf-8")
    assert broken_links(page) == []
    assert [path for path in re.findall(r"`(tests/[\w/.]+)`", text) if not (ROOT / path).exists()] == []
    if "hf_moe.finetuning.trl" in text:
        pytest.importorskip("trl")
    for dotted in re.findall(r"\bhf_moe(?:\.\w+)+", text):
        pkgutil.resolve_name(dotted)
    for names, module in re.findall(r"((?:`\w+`(?:, )?)+) (?:of|in)\s+`(hf_moe\.[\w.]+)`", text):
        assert [name for name in re.findall(r"\w+", names) if not hasattr(pkgutil.resolve_name(module), name)] == []


def test_the_number_of_classes_is_the_one_that_the_tests_count():
    newest = max(CLASSES)
    texts = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = re.findall(r"(\d+) (?:experts )?classes (?:of|that) transformers (\d+)\.(\d+)", texts)
    assert {(int(count), (int(major), int(minor))) for count, major, minor in named} == {(CLASSES[newest], newest)}
