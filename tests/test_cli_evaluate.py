"""`hf-moe evaluate` parses, refuses and prints; the work is tested in tests/evaluation."""

import re

import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install hf-moe[eval]")

import hf_moe.cli.evaluate as command
from hf_moe.cli.common import app
from hf_moe.evaluation import runner as evaluation
from hf_moe.evaluation.errors import EvaluationError
from tiny_moe import hf_moe_model, tiny_tokenizer, words


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def flat(result):
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def test_options_reach_the_evaluation(monkeypatch, tmp_path):
    seen = []

    def remember(chosen, output, *, command):
        seen.append((chosen, output))
        raise EvaluationError("enough")

    monkeypatch.setattr(evaluation, "evaluate", remember)
    result = run(
        "m", "--tasks", "arc_easy, gsm8k", "--domains", "a.txt", "--domains", "embedded", "--adapter", "a",
        "--data-root", tmp_path, "--limit", 20, "--output", tmp_path / "out", "--num-fewshot", 3, "--generation",
        "max_gen_toks=8,do_sample=true", "--batch-size", 4, "--seed", 7, "--mask-experts", 0,
        "--experts-implementation", "hf_moe", "--chat-template",
    )  # fmt: skip
    assert (result.exit_code, "enough" in flat(result)) == (2, True)
    ((chosen, output),) = seen
    assert (chosen.tasks, chosen.domains, chosen.adapter) == (("arc_easy", "gsm8k"), ("a.txt", "embedded"), "a")
    assert (chosen.data_root, output, chosen.limit) == (tmp_path, tmp_path / "out", 20)
    assert isinstance(chosen.limit, int)
    assert chosen.generation == {"max_gen_toks": 8, "do_sample": True}
    assert (chosen.num_fewshot, chosen.batch_size, chosen.seed, chosen.mask_experts) == (3, "4", 7, 0)
    assert (chosen.options["experts_implementation"], chosen.chat_template) == ("hf_moe", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a model"),
        (("m",), "nothing to evaluate"),
        (("m", "--tasks", "arc_easy", "--limit", "-1"), "got -1"),
        (("m", "--tasks", "arc_easy", "--generation", "max_gen_toks"), "NAME=VALUE"),
        (("m", "--tasks", "arc_easy", "--generation", "until=["), "'[' is no value"),
        (("m", "--tasks", "arc_easy", "--limit", "2.5"), "got 2.5"),
        (("m", "--tasks", "arc_easy", "--batch-size", "0"), "--batch-size must be a number above 0"),
        (("./absent", "--domains", "embedded"), "the model folder './absent' does not exist"),
        (("m", "--domains", "absent.txt"), "'absent.txt' does not exist"),
        (("--compare", "a.json", "b.json"), "'a.json' cannot be read"),
        (("m", "--depth", "3"), "No such option"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in flat(result)
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_an_interruption_says_how_to_go_on(monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", interrupt)
    result = run("m", "--domains", "embedded")
    assert result.exit_code == 130
    assert "Give the same command again to continue" in result.output


def test_the_command_on_record_names_no_folder(monkeypatch):
    monkeypatch.setattr(
        command.sys,
        "argv",
        ["hf-moe", "evaluate", "/home/me/m", "--tasks", "arc_easy,/home/me/t.yaml", "--output=/x/y"],
    )
    assert command._command() == "hf-moe evaluate m --tasks arc_easy,t.yaml --output=y"


def test_evaluates_and_compares(tmp_path):
    (tmp_path / "novel.txt").write_text(words(300))
    for seed in (0, 1):
        folder = tmp_path / f"model-{seed}"
        hf_moe_model(seed, vocab_size=300).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        output = tmp_path / f"out-{seed}"
        result = run(folder, "--domains", tmp_path / "novel.txt", "--output", output, "--batch-size", 2)
        assert result.exit_code == 0, result.output
        assert "bits_per_byte" in result.output
        assert (output / "results.json").exists()
    result = run("--compare", tmp_path / "out-0/results.json", tmp_path / "out-1")
    assert result.exit_code == 0, result.output
    assert "model.fingerprint" in result.output
