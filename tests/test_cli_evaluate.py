"""`hf-moe evaluate` parses, refuses and prints; the work is tested in tests/evaluation."""

import json
import re

import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install hf-moe[eval]")

import hf_moe.cli.evaluate as command
from hf_moe.cli.common import app
from hf_moe.evaluation import runner as evaluation
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.tables import print_comparison
from tiny_moe import hf_moe_model, tiny_tokenizer, with_expert_lora, words


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
        "m", "--tasks", "arc_easy, gsm8k", "--data", "a.txt", "--data", "embedded", "--adapter", "a",
        "--data-root", tmp_path, "--limit", 20, "--output", tmp_path / "out", "--num-fewshot", 3, "--generation",
        "max_gen_toks=8,do_sample=true", "--batch-size", 4, "--seed", 7, "--mask-experts", 1,
        "--experts-implementation", "hf_moe", "--apply-chat-template", "--chat-template", tmp_path / "chat.jinja",
    )  # fmt: skip
    assert (result.exit_code, "enough" in flat(result)) == (2, True)
    ((chosen, output),) = seen
    assert (chosen.tasks, chosen.data, chosen.adapter) == (("arc_easy", "gsm8k"), ("a.txt", "embedded"), "a")
    assert (chosen.data_root, output, chosen.limit) == (tmp_path, tmp_path / "out", 20)
    assert isinstance(chosen.limit, int)
    assert chosen.generation == {"max_gen_toks": 8, "do_sample": True}
    assert (chosen.num_fewshot, chosen.batch_size, chosen.seed, chosen.mask_experts) == (3, "4", 7, 1)
    assert (chosen.options["experts_implementation"], chosen.chat_template) == ("hf_moe", True)
    assert chosen.template_file == tmp_path / "chat.jinja"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument"),
        (("m", "--domains", "a.txt"), "--domains is called --data here"),
        (("m", "--compare", "a", "b"), "a command of its own now: hf-moe compare-results A.json B.json"),
        (("m", "--num_fewshot", "1"), "--num_fewshot is called --num-fewshot here"),
        (("m",), "nothing to evaluate"),
        (("m", "--tasks", "arc_easy", "--limit", "-1"), "got -1"),
        (("m", "--tasks", "arc_easy", "--generation", "max_gen_toks"), "NAME=VALUE"),
        (("m", "--tasks", "arc_easy", "--generation", "until=["), "'[' is no value"),
        (("m", "--tasks", "arc_easy", "--limit", "2.5"), "got 2.5"),
        (("m", "--tasks", "arc_easy", "--batch-size", "0"), "--batch-size must be a number above 0"),
        (("./absent", "--data", "embedded"), "the model folder './absent' does not exist"),
        (("m", "--data", "absent.txt"), "'absent.txt' does not exist"),
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
    result = run("m", "--data", "embedded")
    assert result.exit_code == 130
    assert "Give the same command again to continue" in result.output


def test_the_command_on_record_names_no_folder(monkeypatch):
    monkeypatch.setattr(
        command.sys,
        "argv",
        ["hf-moe", "evaluate", "/home/me/m", "--tasks", "arc_easy,/home/me/t.yaml", "--output=/x/y"],
    )
    assert command._command() == "hf-moe evaluate m --tasks arc_easy,t.yaml --output=y"


def results(*arguments):
    return CliRunner().invoke(app, ["compare-results", *map(str, arguments)], env={"COLUMNS": "80"})


def test_evaluates_and_compares(tmp_path):
    """A base, and its adapter that is named in the place of a model, on the same backend."""
    (tmp_path / "novel.jsonl").write_text("".join(json.dumps({"text": words(8, seed)}) + "\n" for seed in range(20)))
    model = hf_moe_model(vocab_size=300)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapted = with_expert_lora(model, init_lora_weights=False)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("base", "adapter"):
        output = tmp_path / f"out-{name}"
        data = ("--data", tmp_path / "novel.jsonl", "--output", output, "--batch-size", 2)
        result = run(tmp_path / name, *data)
        assert result.exit_code == 0, result.output
        assert "bits_per_byte" in result.output
        assert "Without one expert" not in result.output
        assert json.loads((output / "results.json").read_text())["model"]["experts_implementation"] == "hf_moe"
    assert f"is a PEFT adapter: it is loaded onto {tmp_path / 'base'}" in flat(result)
    found = results(tmp_path / "out-base/results.json", tmp_path / "out-adapter")
    assert found.exit_code == 0, found.output
    assert "base with adapter (out-adapter/results.json)" in found.output
    assert re.search(r"\b(yes|no)\b", found.output)
    assert "model.adapter: none → adapter" in found.output
    assert "experts_implementation:" not in found.output
    assert "model.fingerprint:" not in found.output
    # sentences are one line each where nobody looks at a terminal
    assert 0 < max(len(line) for line in found.output.splitlines() if line[:1] in "┏┃│└") <= 80
    assert "model.fingerprint:" in results(tmp_path / "out-base", tmp_path / "out-adapter", "--verbose").output


def test_few_documents_are_never_a_real_difference(capsys):
    found = {"first": 1.0, "second": 2.0, "difference": 1.0, "low": 0.9, "high": 1.1, "is_real": False}
    side = {"results": "out/results.json", "model": "m", "adapter": None}
    task = "mmlu_high_school_government_and_politics"
    compared = {"tasks": {task: {"acc,none": {**found, "documents": 19}}}, "domains": {}}
    print_comparison({"first": side, "second": side, "set_otherwise": {}, "not_compared": [], **compared})
    printed = capsys.readouterr().out
    assert "too few" in printed
    assert f"Too few documents to judge (20 are needed): {task} 19." in printed
    assert "high_school_" in printed
    absent = results("a.json", "b.json")
    assert (absent.exit_code, "the results 'a.json' cannot be read" in absent.output) == (2, True)
