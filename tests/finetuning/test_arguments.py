"""A recipe's YAML file and command line: one wins over the other, and what is unknown or wrong is refused."""

import importlib
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from hf_moe.finetuning.arguments import (
    DataArguments,
    ModelArguments,
    RecipeError,
    RecipeTrainingArguments,
)
from hf_moe.finetuning.command_line.methods import METHODS, groups_of
from hf_moe.finetuning.command_line.parse import parse_recipe
from hf_moe.finetuning.command_line.source import REQUIRED
from hf_moe.finetuning.run import plan
from hf_moe.finetuning.run.checkpointing import choose_checkpointing
from hf_moe.finetuning.run.evaluation import early_stopping
from hf_moe.io.names import command_line, method_name


@dataclass
class AdapterArguments:
    r: int = field(default=16)


KINDS = (AdapterArguments, ModelArguments, DataArguments, RecipeTrainingArguments)


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return ["--config", str(path), "--output_dir", str(tmp_path / "out")]

    return write


def test_the_command_line_wins_over_the_file(config):
    text = "model: m\ndata: [a.jsonl]\nr: 4\nlearning_rate: 1e-4\npacking: false\n"
    adapter, model, data, training = parse_recipe(KINDS, [*config(text), "--r", "8"])
    assert (adapter.r, model.model, data.data) == (8, "m", ["a.jsonl"])
    assert (training.learning_rate, data.packing) == (1e-4, False)


def test_data_sets_may_be_mappings(config):
    text = "model: m\ndata:\n  - {path: a.jsonl, weight: 0.5}\n  - b.txt\n"
    assert parse_recipe(KINDS, config(text))[2].data == [{"path": "a.jsonl", "weight": 0.5}, "b.txt"]


def test_a_command_line_alone_will_do(tmp_path):
    arguments = ["--model", "m", "--data", "a", "b", "--output_dir", str(tmp_path)]
    assert parse_recipe(KINDS, arguments)[2].data == ["a", "b"]


def test_variables_of_the_chat_template_are_a_mapping_or_json(config):
    text = "model: m\ndata: [a]\n"
    in_file = config(text + "chat_template_kwargs: {enable_thinking: false}\n")
    assert parse_recipe(KINDS, in_file)[1].chat_options == {"enable_thinking": False}
    on_line = [*config(text), "--chat_template_kwargs", '{"enable_thinking": true}']
    assert parse_recipe(KINDS, on_line)[1].chat_options == {"enable_thinking": True}
    assert parse_recipe(KINDS, config(text))[1].chat_options == {}


def test_smoke_is_four_short_steps(config):
    training = parse_recipe(KINDS, [*config("model: m\ndata: [a]\n"), "--smoke"])[3]
    assert (training.max_steps, training.save_steps) == (4, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\ndata: [a]\nlerning_rate: 1\n", "unknown key 'lerning_rate'. Did you mean 'learning_rate'"),
        ("model: m\ndata: [a]\nr: 4\nr: 8\n", "the key 'r' comes twice"),
        ("model: m\ndata: []\n", "at least one data set"),
        ("model: m\ndatasets: [a]\n", "datasets is called data now"),
        ("- a\n", "must be a mapping"),
        ("model: &m x\ndata: [*m]\n", "aliases are not allowed"),
        ("model: [\n", "not valid YAML"),
        ("model: m\ndata: [a]\nhub_token: secret\n", "hub_token would be written into training_args.bin"),
        ("model: m\ndata: [a]\nx: !!python/object/apply:os.system [id]\n", "not valid YAML"),
        ("model: m\ndata: a.jsonl\n", "data must be a list, got 'a.jsonl'"),
        ("model: [m]\ndata: [a]\n", r"model must be text, got \['m'\]"),
        ("model: m\ndata: [a]\nr: true\n", "r must be a whole number, got True"),
        ("model: m\ndata: [a]\nr: null\n", "r must be a whole number, got None"),
        ("model: m\ndata: [a]\nr: [4]\n", r"r must be a whole number, got \[4\]"),
        ("model: m\ndata: [a]\nr: 100000000000000000000\n", "r must be a whole number, got 1000"),
        ("model: m\ndata: [a]\nr: many\n", "recipe.yaml: r must be a whole number, got 'many'"),
        ("model: m\ndata: [a]\nlr: 1\n", "unknown key 'lr'. Did you mean 'learning_rate'"),
        ("model: m\ndata: [a]\nload_in_4bit: true\n", "load_in_4bit is not supported yet: "),
        ("data: [a]\n", "no model: give a folder or a name on the Hub"),
        ("model: m\ndata: [a]\nlearning_rate: .nan\n", "learning_rate must be a finite number, got nan"),
        ("model: m\ndata: [a]\nweight_decay: {a: 1}\n", "weight_decay must be a finite number, got {'a': 1}"),
        ("model: m\ndata: [a]\nsave_strategy: no\n", "got False. YAML reads yes, no, on and off so"),
        ("model: m\ndata: [a]\nrow_length: 12:30\n", "12:30 is read as minutes and seconds"),
        ("model: m\ndata: [a]\nrow_length: 4\n", "row_length must be at least 8"),
        ("model: m\ndata: [a]\nheld_out: 1.5\n", "between 0 and 1"),
        ("model: m\ndata: [a]\nchat_template_kwargs: '{'\n", "chat_template_kwargs is not valid JSON"),
        ("model: m\ndata: [a]\nchat_template_kwargs: '[1]'\n", "must be a mapping of names to values"),
        ("model: m\ndata: [a]\nchat_template_kwargs: {tokenize: true}\n", "may not set 'tokenize'"),
    ],
)
def test_a_bad_file_is_refused(config, text, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(KINDS, config(text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "1"], "unknown option '--lr'. Did you mean '--learning_rate'?"),
        (["--lerning-rate=1"], "unknown option '--lerning-rate'. Did you mean '--learning_rate'?"),
        (["--lora-r", "8"], "Did you mean '--r'?"),
        (["--batch-size", "8"], "Did you mean '--per_device_train_batch_size'?"),
        (["--epochs", "8"], "Did you mean '--num_train_epochs'?"),
        (["--quite_another"], "unknown option '--quite_another'. --help lists the options."),
        (["-r", "8"], "unknown option '-r'. Did you mean '--r'?"),
        (["--load-in-4bit"], "load_in_4bit is not supported yet: "),
        (["--datasets", "a"], "datasets is called data now"),
        (["--r", "many"], "--r must be a whole number, got 'many'."),
        (["--r", "1.5"], "--r must be a whole number, got '1.5'."),
        (["--learning-rate", "nan"], "--learning_rate must be a finite number, got 'nan'."),
        (["--packing", "perhaps"], "--packing must be true or false, got 'perhaps'."),
        (["--eval_strategy", "often"], "--eval_strategy must be one of no, steps, epoch, got 'often'."),
        (["--r"], "--r needs a value: a whole number."),
        (["--r", "8", "--r", "9"], "--r is given twice"),
        (["--packing", "--no-packing"], "--packing is given twice"),
        (["--r", "8", "9"], "'9' belongs to no option. CONFIG comes first"),
        (["--config", "other.yaml"], "one config at most, got '.*recipe.yaml' and 'other.yaml'"),
        (["--config"], "--config needs a value: a YAML file."),
        (["--no_packing=true"], "--no_packing takes no value. Leave it out, or write --packing false."),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1, got 0."),
        (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size must be at least 1, got 0."),
        (["--num_train_epochs", "-1"], "num_train_epochs must be above 0, got -1."),
        (["--model", ".", "--revision", "main"], "revision is for models on the Hub, and '.' is a folder."),
    ],
)
def test_a_bad_command_line_is_refused(config, options, message):
    given = [config("model: m\ndata: [a]\n")[1], *options]  # the file alone: CONFIG
    with pytest.raises(RecipeError, match=message):
        parse_recipe(KINDS, given)


def test_early_stopping_counts_on_in_a_run_that_resumes():
    asked = SimpleNamespace(
        early_stopping_patience=3, metric_for_best_model="loss", greater_is_better=False, eval_strategy="steps"
    )
    before, resumed = early_stopping(asked)[0], early_stopping(asked)[0]
    before.early_stopping_patience_counter = 2
    state = SimpleNamespace(best_metric=1.0, stateful_callbacks={type(before).__name__: before.state()})
    control = TrainerControl()
    resumed.on_evaluate(asked, state, control, {"eval_loss": 1.0})
    assert control.should_training_stop


def test_a_forward_that_does_not_fit_the_device_turns_checkpointing_on():
    assert choose_checkpointing(None, None, None, available=1, supported=True).on
    assert not choose_checkpointing(False, None, None, available=1, supported=True).on

    def out_of_memory(**row):
        raise torch.OutOfMemoryError

    model = torch.nn.Linear(1, 1)
    model.forward = out_of_memory
    row = {"input_ids": torch.zeros(8, dtype=torch.long)}
    arguments = SimpleNamespace(bf16=False, fp16=False, train_batch_size=1, gradient_accumulation_steps=1)
    assert plan._memory(model, row, arguments) is None
    assert model.training


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        parse_recipe(KINDS, ["--config", str(tmp_path / "none.yaml")])


def test_a_shipped_config_needs_its_name_alone_and_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "lora.yaml").write_text("model: m\ndata: [a.jsonl]\nr: 4\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe, options = str(tmp_path / "recipe.py"), ["--config", "lora.yaml", "--output_dir", "out"]
    assert parse_recipe(KINDS, options, recipe)[0].r == 4
    (tmp_path / "here" / "lora.yaml").write_text("model: m\ndata: [a.jsonl]\nr: 2\n")
    assert parse_recipe(KINDS, options, recipe)[0].r == 2
    with pytest.raises(RecipeError, match=r"'none\.yaml' cannot be read"):
        parse_recipe(KINDS, ["--config", "none.yaml"], recipe)


def test_a_path_in_a_config_is_looked_for_here_and_then_beside_the_config(tmp_path, monkeypatch):
    for folder in ("configs/toy", "data", "here"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("data/law.jsonl", "data/chat.jinja"):
        (tmp_path / name).touch()
    text = "model: m\ndata: [../../data/law.jsonl, {path: ../../data/law.jsonl}, owner/name]\n"
    (tmp_path / "configs" / "toy" / "lora.yaml").write_text(text + "chat_template: ../../data/chat.jinja\n")
    monkeypatch.chdir(tmp_path / "here")
    options = ["--config", "toy/lora.yaml", "--output_dir", "out"]
    _, model, data, _ = parse_recipe(KINDS, options, str(tmp_path / "recipe.py"))
    beside = str((tmp_path / "data" / "law.jsonl").resolve())
    assert data.data == [beside, {"path": beside}, "owner/name"]
    assert model.chat_template == str((tmp_path / "data" / "chat.jinja").resolve())
    (tmp_path / "here" / "a" / "b").mkdir(parents=True)
    (tmp_path / "here" / "a" / "b" / "lora.yaml").write_text("model: m\ndata: [law.jsonl]\n")
    for where in ("here/a/b", "here"):  # the working directory comes first
        (tmp_path / where / "law.jsonl").touch()
    assert parse_recipe(KINDS, ["--config", "a/b/lora.yaml", "--output_dir", "out"])[2].data == ["law.jsonl"]


def test_an_old_name_on_the_command_line_is_refused_with_the_new_one():
    for option in (["--datasets", "a"], ["--datasets=a"]):
        with pytest.raises(RecipeError, match="datasets is called data now"):
            parse_recipe(KINDS, ["--model", "m", *option])


@pytest.mark.parametrize("name", METHODS)
def test_the_help_shows_each_option_as_the_recipe_has_it(name, monkeypatch, capsys):
    """The help reads source text; what it says of names, defaults and needs is what the dataclasses have."""
    method = METHODS[name]
    if "trl" in method.needs:
        pytest.importorskip("trl")
    seen = []
    module = importlib.import_module(f"hf_moe.recipes.{method.recipe}")
    monkeypatch.setattr(module, "parse_recipe", lambda kinds, *_: seen.extend(kinds) or sys.exit())
    with pytest.raises(SystemExit):
        module.main([])
    real = {each.name: each for kind in seen for each in fields(kind)}
    groups = groups_of(method, Path(module.__file__))
    for option in (option for options in groups.values() for option in options):
        assert option.help, option.name
        default = real[option.name].default
        if option.default is not REQUIRED and option.name not in ("max_steps", "loss_type"):
            default = None if default is MISSING else getattr(default, "value", default)
            assert (option.default or None) == (default or None), option.name
    with pytest.raises(SystemExit) as ended:
        parse_recipe(seen, ["--help-all"], module.__file__)
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert max(map(len, printed.splitlines())) <= 80
    assert all(f"  --{each} " in printed or f"  --{each}\n" in printed for each in real)
    assert len(re.findall(r"^  --", printed, re.MULTILINE)) == len(real)  # one line, one spelling each


def test_a_report_tells_the_command_that_was_called(monkeypatch):
    assert [method_name(f"{method.recipe}.py") for method in METHODS.values()] == list(METHODS)
    for program, told in (
        ("/usr/bin/hf-moe", "hf-moe finetune expert-lora"),
        ("recipes/finetune_expert_lora.py", "python recipes/finetune_expert_lora.py"),
    ):
        monkeypatch.setattr(sys, "argv", [program])
        assert command_line("/home/me/finetune_expert_lora.py", ["law.yaml"]) == f"{told} law.yaml"
