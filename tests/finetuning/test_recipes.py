"""The fine-tuning recipes, tiny, on classes of several families: what they save, prove, refuse and resume."""

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from packaging import version
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401 (registers)
from chat_cases import chat_tokenizer
from hf_moe.adapters.frozen_router import router_hash
from hf_moe.data.bad_rows import DataError
from hf_moe.finetuning.arguments import RecipeError
from hf_moe.loading import pretrained
from tiny_moe import save_tiny_models, tiny_tokenizer, words
from tiny_multimodal import build_multimodal, multimodal_config
from tiny_unseen import llama4

ROOT = Path(__file__).resolve().parents[2]
NEEDS_PEFT_21 = pytest.mark.skipif(version.parse(peft.__version__) < version.parse("0.21"), reason="needs peft 0.21")
RECIPES = (
    "finetune_expert_lora",
    pytest.param("finetune_adapter_experts", marks=NEEDS_PEFT_21),
    "finetune_esft",
    "finetune_full",
)
FAMILIES = ("hf_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Saved tiny models by family, with a tokenizer."""
    return save_tiny_models(tmp_path_factory.mktemp("models"), FAMILIES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    records = {
        "notes": [{"text": words(60, seed)} for seed in range(24)],
        "sums": [{"prompt": words(4, seed), "completion": words(8, seed + 50)} for seed in range(24)],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "notes.jsonl"), str(folder / "sums.jsonl")]


def options(models, data, output, family="hf_moe", *more):
    return [
        "--model", str(models / family), "--data", *data, "--output_dir", str(output), "--row_length", "32",
        "--use_cpu", "--dataloader_pin_memory", "False", "--disable_tqdm", "True", "--smoke", *more,
    ]  # fmt: skip


def run(recipe, arguments):
    return importlib.import_module(f"hf_moe.recipes.{recipe}").main(arguments)


def loaded(models, output, report, family):
    """The model that the recipe saved, read back from disk."""
    if (output / "model").exists():
        return AutoModelForCausalLM.from_pretrained(output / "model")
    base = AutoModelForCausalLM.from_pretrained(models / family)
    return PeftModel.from_pretrained(base, output / "adapter")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_runs_on_every_family(recipe, family, models, data, tmp_path):
    report = run(recipe, options(models, data, tmp_path / "out", family))
    assert report["steps"] == 4
    assert 0 < report["parameters"]["trained"] < report["parameters"]["total"]
    assert report["router_sha256"]["before"] == report["router_sha256"]["after"]
    assert set(report["domains"]) == {"notes", "sums"}
    assert set(report["health"]) == {"before", "after"}
    assert report["training"]["learning_rate"] > 0
    assert all(domain["before"]["loss"] > 0 for domain in report["domains"].values())
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    model = loaded(models, tmp_path / "out", report, family)
    assert router_hash(model) == report["router_sha256"]["after"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card + json.dumps(report)
    assert str(models) not in card + json.dumps(report)


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_a_vision_language_model_is_trained_and_saved_whole(kind, data, tmp_path):
    """The text model alone was trained and saved, without a word; of Qwen3-VL-MoE nothing loaded."""
    tokenizer = tiny_tokenizer()
    whole, inputs = build_multimodal(kind, vocab_size=len(tokenizer))
    whole.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    (tmp_path / kind / "preprocessor_config.json").write_text("{}")
    report = run("finetune_full", options(tmp_path, data, tmp_path / "full", kind, "--packing", "false"))
    saved = type(whole).from_pretrained(tmp_path / "full" / "model")
    before, after = whole.state_dict(), saved.state_dict()
    assert before.keys() == after.keys()
    vision = [name for name in before if "visual" in name]
    assert vision
    assert all(torch.equal(before[name], after[name]) for name in vision)
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert report["parameters"]["trained"] < sum(before[name].numel() for name in before if name not in vision)
    assert (tmp_path / "full" / "model" / "preprocessor_config.json").exists()
    assert "import AutoModelForImageTextToText" in (tmp_path / "full" / "README.md").read_text()

    more = ("--packing", "false", "--learning_rate", "0.05")
    run("finetune_expert_lora", options(tmp_path, data, tmp_path / "lora", kind, *more))
    plain = whole(**inputs).logits
    adapted = PeftModel.from_pretrained(whole, tmp_path / "lora" / "adapter")(**inputs).logits
    assert (adapted - plain).abs().max() > 1e-3


def test_experts_of_a_tower_that_text_does_not_reach_stay_out_of_the_measurements(data, tmp_path):
    tokenizer = tiny_tokenizer()
    model, _ = build_multimodal("ernie4_5_vl_moe", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "ernie")
    tokenizer.save_pretrained(tmp_path / "ernie")
    report = run("finetune_expert_lora", options(tmp_path, data, tmp_path / "out", "ernie", "--packing", "false"))
    assert [len(domain["routing_agreement"]) for domain in report["domains"].values()] == [2, 2]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("llama4", "experts outside of transformers' experts interface"),
        ("diffusion_gemma", "no language model that gives logits and a loss for text alone"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_its_weights_are_read(kind, message, data, tmp_path):
    config = llama4().config if kind == "llama4" else multimodal_config(kind)
    config.save_pretrained(tmp_path / kind)  # no weights, and no tokenizer
    with pytest.raises(RecipeError, match=message) as raised:
        run("finetune_full", options(tmp_path, data, tmp_path / "out", kind))
    assert len(str(raised.value)) < 500


def test_what_is_loaded_back_has_the_metrics_of_the_report(models, data, tmp_path):
    from hf_moe.finetuning.arguments import DataArguments
    from hf_moe.finetuning.domains import read_data
    from hf_moe.finetuning.measure import evaluate_rows

    report = run("finetune_expert_lora", options(models, data, tmp_path / "out"))
    domains = read_data(tiny_tokenizer(), DataArguments(data=data, row_length=32)).domains
    model = loaded(models, tmp_path / "out", report, "hf_moe")
    metrics = evaluate_rows(model, tiny_tokenizer(), domains["notes"].held_out_rows)
    assert metrics.to_dict() == pytest.approx(report["domains"]["notes"]["after"], rel=1e-5)
    (sample,) = report["samples"]
    assert sample["domain"] == "notes"
    assert any(text.startswith(sample["prompt"].strip()[:4]) for text in (words(60, seed) for seed in range(24)))
    assert not list((tmp_path / "out").glob("checkpoint-*/README.md")), "PEFT's template, with this machine's folders"


def test_the_cards_code_runs_as_it_is_pasted(models, data, tmp_path, monkeypatch, capsys):
    run("finetune_expert_lora", options(models, data[1:], tmp_path, "hf_moe", "--sample_prompts", "0"))
    card = (tmp_path / "README.md").read_text()
    assert "## Samples" not in card
    (tmp_path / "hf_moe").symlink_to(models / "hf_moe")
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(code, {})
    ours, without = capsys.readouterr().out.split("Once upon a time")[1:]
    assert len(ours) > 5
    assert len(without) > 5


def test_every_row_is_encoded_with_the_recipes_choices_and_what_is_left_out_is_shown(tmp_path):
    from hf_moe.finetuning.arguments import DataArguments
    from hf_moe.finetuning.domains import read_data

    talk = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]
    records = [{"messages": talk, "id": i} for i in range(9)]
    records[4]["messages"] = []
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = DataArguments([str(tmp_path / "chat.jsonl")], row_length=256, on_bad_row="skip")
    tokenizer = chat_tokenizer("qwen3")
    encoding = read_data(tokenizer, arguments, chat_options={"enable_thinking": False}).domains["chat"].train
    assert len(encoding.examples) == 7
    # the prompt of a model that shall not think has an empty thought, which is not learned then
    assert encoding.loss_tokens == 7 * len(tokenizer("four<|im_end|>")["input_ids"])
    assert "not used: the column 'id'; 1 bad row left out (line 5)" in str(encoding)


def test_long_rows_hold_no_example_beyond_the_models_context(data):
    from hf_moe.finetuning.arguments import DataArguments
    from hf_moe.finetuning.domains import read_data

    arguments = DataArguments(data=data[:1], row_length=64)
    longest = {
        context: max(
            len(example.input_ids) for domain in prepared.domains.values() for example in domain.train.examples
        )
        for context in (None, 8)
        if (prepared := read_data(tiny_tokenizer(), arguments, context))
    }
    assert longest[None] > longest[8] == 8


@pytest.mark.parametrize(
    ("recipe", "choice", "message"),
    [
        ("finetune_expert_lora", ("--r", "0"), "r, the rank, must be at least 1, got 0"),
        pytest.param(
            "finetune_adapter_experts",
            ("--adapter_width", "0"),
            "adapter_width must be at least 1, got 0",
            marks=NEEDS_PEFT_21,
        ),
        ("finetune_esft", ("--budget", "2"), "budget must be a share above 0, up to 1, got 2.0"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_before_a_model_is_loaded(recipe, choice, message):
    with pytest.raises(RecipeError, match=message):
        run(recipe, ["--model", "nowhere", "--data", "nothing.jsonl", *choice])


def test_training_learns(models, data, tmp_path):
    arguments = options(models, data, tmp_path / "out")
    arguments.remove("--smoke")
    more = ["--max_steps", "40", "--learning_rate", "1e-2", "--per_device_train_batch_size", "4"]
    more += ["--sample_prompts", "0"]
    report = run("finetune_full", [*arguments, *more])
    for domain in report["domains"].values():
        assert domain["after"]["bits_per_byte"] < 0.9 * domain["before"]["bits_per_byte"]


def test_an_interrupted_run_continues_to_the_same_weights(models, data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("finetune_expert_lora", options(models, data, whole))
    run("finetune_expert_lora", options(models, data, parts))
    (parts / "checkpoint-4" / "manifest.json").unlink()  # as if killed while saving
    report = run("finetune_expert_lora", [*options(models, data, parts), "--resume_from_checkpoint", "auto"])
    assert report["steps"] == 4
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_held_out_records_are_evaluated_while_it_trains_and_the_best_step_is_kept(models, data, tmp_path, capsys):
    """Native experts, which transformers alone would not load back, and a rate at which the model gets worse."""
    arguments = options(models, data, tmp_path / "out", "qwen3_moe", "--eval_strategy", "steps")
    more = ["--load_best_model_at_end", "--metric_for_best_model", "notes_bits_per_byte", "--learning_rate", "0.3"]
    report = run("finetune_full", [*arguments, *more, "--early_stopping_patience", "1"])
    evaluated = report["evaluations"]
    assert [record["step"] for record in evaluated] == [2, 4]
    assert report["domains"]["notes"]["after"]["bits_per_byte"] == pytest.approx(
        min(record["eval_notes_bits_per_byte"] for record in evaluated), rel=1e-5
    )
    loss = sum(domain["share"] * evaluated[0][f"eval_{name}_loss"] for name, domain in report["domains"].items())
    assert evaluated[0]["eval_loss"] == pytest.approx(loss)
    printed = capsys.readouterr().out
    assert "warning: the learning rate 0.3 is high" in printed
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    assert all(len(line) <= 80 for line in lines)
    assert all(word in lines[0] for word in ("loss", "lr", "busiest", "dead", "CV"))
    assert "held-out loss" in lines[2]
    assert "22 records, " in printed or "23 records, " in printed


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("--early_stopping_patience", "2"), "needs evaluations: set eval_strategy"),
        (("--eval_strategy", "steps", "--metric_for_best_model", "law_loss"), "must be one of loss, notes_loss"),
        (("--load_in_4bit", "true"), "load_in_4bit is not supported yet: bitsandbytes quantises linear layers"),
        (("--trust_remote_code", "true"), "trust_remote_code is not taken: recipes run no code"),
    ],
)
def test_what_training_cannot_use_is_refused_by_name(choice, message, models, data, tmp_path):
    with pytest.raises(RecipeError, match=message):
        run("finetune_full", options(models, data, tmp_path / "out", "hf_moe", *choice))


def test_checkpointing_is_on_where_memory_is_short_unless_told(models, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_moe.finetuning.run.plan.device_memory", lambda device: 1000)
    for choice, expected in (((), "on: a step needs"), (("--gradient_checkpointing", "false"), "off: as asked for")):
        run("finetune_full", options(models, data, tmp_path / expected[:3], "qwen3_moe", "--max_steps", "1", *choice))
        assert expected in " ".join(capsys.readouterr().out.split())


ROUTING_METRICS = ("moe/load_entropy", "moe/load_entropy_min", "moe/max_violation")


def test_tensorboard_gets_loss_and_routing_balance(models, data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = run(
        "finetune_expert_lora", options(models, data, tmp_path / "out", "hf_moe", "--report_to", "tensorboard")
    )
    (file,) = (tmp_path / "out" / "runs").rglob("events.out.tfevents.*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    for name in ("loss", *ROUTING_METRICS):
        scalars = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert scalars == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in report["log"]]


def test_trackio_gets_loss_and_routing_balance(models, data, tmp_path, monkeypatch):
    storage = pytest.importorskip(
        "trackio.sqlite_storage", reason="needs a trackio that imports, with pillow<13", exc_type=ImportError
    )
    if version.parse(importlib.import_module("trackio").__version__) < version.parse("0.30"):
        pytest.skip("needs trackio 0.30 or newer")
    for module in (storage, importlib.import_module("trackio.utils")):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    named = ["--report_to", "trackio", "--project", "tiny", "--run_name", "one"]
    report = run("finetune_expert_lora", options(models, data, tmp_path / "out", "hf_moe", *named))
    logs = [record for record in storage.SQLiteStorage.get_logs("tiny", "one") if "train/loss" in record]
    assert [record["train/global_step"] for record in logs] == [record["step"] for record in report["log"]]
    for name in ("loss", *ROUTING_METRICS):
        assert [record[f"train/{name}"] for record in logs] == [record[name] for record in report["log"]]


def test_a_used_folder_is_refused(models, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(RecipeError, match="not empty"):
        run("finetune_full", options(models, data, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_dense_model_is_refused(data, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(RecipeError, match="no MoE layer"):
        run("finetune_full", options(tmp_path, data, tmp_path / "out", "dense"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("nope", "cannot be loaded: .*nope.* is not supported"), ("deepgemm", "cannot run here: deepgemm")],
)
def test_experts_that_cannot_run_are_refused(name, message, models, data, tmp_path):
    arguments = options(models, data, tmp_path / "out", "hf_moe", "--experts_implementation", name)
    with pytest.raises(RecipeError, match=message):
        run("finetune_full", arguments)


def test_the_empty_model_is_built_once(models, data, tmp_path, monkeypatch):
    """What is refused without weights is checked before the data are read, and not again when the model is loaded."""
    built = []
    build_empty = pretrained.build_empty
    monkeypatch.setattr(pretrained, "build_empty", lambda config: built.append(config) or build_empty(config))
    with pytest.raises(RecipeError, match="cannot run here"):
        run("finetune_full", options(models, data, tmp_path, "hf_moe", "--experts_implementation", "deepgemm"))
    assert len(built) == 1


def test_data_is_looked_for_before_a_model_is_loaded(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_moe.finetuning.prepare.load_model", None)
    with pytest.raises(DataError, match="does not exist"):
        run("finetune_full", options(models, [str(tmp_path / "none.jsonl")], tmp_path / "out"))


def test_two_data_sets_of_one_domain_are_refused(models, data, tmp_path):
    with pytest.raises(RecipeError, match="two data sets have the domain 'notes'"):
        run("finetune_full", options(models, [data[0], data[0]], tmp_path / "out"))


def test_a_data_set_of_weight_zero_is_measured_and_not_trained_on(models, data, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(f"data:\n  - {data[0]}\n  - {{path: {data[1]}, weight: 0}}\n")
    arguments = options(models, [], tmp_path / "out", "hf_moe", "--config", str(config))
    arguments.remove("--data")
    report = run("finetune_full", arguments)
    assert [domain["share"] for domain in report["domains"].values()] == [1, 0]


def test_nothing_to_train_on_is_refused(models, data, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(f"data:\n  - {{path: {data[1]}, weight: 0}}\n")
    arguments = options(models, [], tmp_path / "out", "hf_moe", "--config", str(config))
    arguments.remove("--data")
    with pytest.raises(RecipeError, match="weight 0"):
        run("finetune_full", arguments)


def test_the_program_prints_what_is_wrong_in_one_line(models, tmp_path, monkeypatch, capsys):
    program = str(ROOT / "recipes" / "finetune_full.py")
    monkeypatch.setattr(sys, "argv", [program, *options(models, [str(tmp_path / "none.jsonl")], tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(program, run_name="__main__")
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "error: the data file" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_two_processes_train_what_one_does(models, data, tmp_path):
    arguments = options(models, data, tmp_path / "two")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(ROOT / "recipes" / "finetune_expert_lora.py"), *arguments, "--per_device_train_batch_size", "1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    run("finetune_expert_lora", options(models, data, tmp_path / "one"))
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    for name in one:  # AdamW moves a weight by the learning rate (1e-3) however small its gradient, so rounding shows
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0)
