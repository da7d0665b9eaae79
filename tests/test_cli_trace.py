"""hf-moe trace on a tiny saved model: what it writes, what it refuses, what it leaves alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_moe.cli.trace as command
from hf_moe import cli
from hf_moe.observability.report.text import count
from hf_moe.observability.routing_trace import RoutingTrace
from tiny_moe import hf_moe_model
from tiny_report import sample_report

runner = CliRunner()
RESULTS = ["metrics.json", "plots", "routing.html", "trace"]


def run(*arguments):
    result = runner.invoke(cli.app, ["trace", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model, its tokenizer of letters, and text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    tiny = hf_moe_model()
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnop"[: tiny.config.vocab_size])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a").save_pretrained(folder / "model")
    tiny.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "law.txt").write_text("abcd ef " * 40)
    records = [{"text": "gh ij " * 20, "domain": "code"}, {"text": "kl" * 30, "domain": "maths"}]
    (folder / "data" / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "model"


def test_a_run_leaves_page_trace_metrics_and_plots(model, tmp_path):
    output = tmp_path / "out"
    code, printed = run(model, "--data", model.parent / "data", "--by-domain", "--output", output)
    assert code == 0, printed
    assert sorted(path.name for path in output.iterdir()) == RESULTS
    trace = RoutingTrace.load(output / "trace")
    assert trace.domains == ["law", "code", "maths"]
    first = trace.statistics(trace.layers[0])
    assert count(first.tokens) in printed
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["metrics"]["all"]["load_cv/mean"] == pytest.approx(trace.metrics()["load_cv/mean"])
    assert metrics["metrics"]["domain maths"]["tokens"] == 60
    assert metrics["health"]["verdict"] in printed or "Too few tokens" in printed
    page = (output / "routing.html").read_text()
    assert f"<bdi>{model.parent.name}/model</bdi>" in page
    assert str(tmp_path) not in page
    assert len(list((output / "plots").glob("*.png"))) == 3


def test_conversations_are_traced_with_a_template(model, tmp_path):
    record = {"messages": [{"role": "user", "content": "abcd"}, {"role": "assistant", "content": "ef"}]}
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps({'messages': []})}\n")
    (tmp_path / "letters.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    data = ("--data", tmp_path / "chat.jsonl", "--output", tmp_path / "out", "--detail", "counts")
    code, printed = run(model, *data)
    assert code == 2
    assert "the tokenizer has no chat template" in printed
    data += ("--chat-template", tmp_path / "letters.jinja")
    code, printed = run(model, *data)
    assert code == 2
    assert "1 of 2 rows" in printed
    assert "(line 2)" in printed
    code, printed = run(model, *data, "--on-bad-row", "skip")
    assert code == 0, printed
    assert "1 bad row left out (line 2)" in printed
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]["all"]["tokens"] == 6


def test_without_domains_the_text_is_one_and_its_tokens_come_from_all_files(model, tmp_path):
    options = ("--max-tokens", 300, "--detail", "counts", "--output", tmp_path / "out")
    code, printed = run(model, "--data", model.parent / "data", *options)
    assert code == 0, printed
    trace = RoutingTrace.load(tmp_path / "out" / "trace")
    assert (trace.domains, trace.tokens) == (["text"], None)
    assert trace.statistics(trace.layers[0]).tokens == 300
    assert len(list((tmp_path / "out" / "plots").glob("*.png"))) == 2


def test_a_second_run_replaces_the_first_and_without_text_none_is_stored(model, tmp_path):
    output = tmp_path / "out"
    data = ("--data", model.parent / "data" / "law.txt", "--output", output)
    for options in ((), ("--no-text",)):
        code, printed = run(model, *data, *options)
        assert code == 0, printed
    trace = RoutingTrace.load(output / "trace")
    assert trace.tokens.is_audit
    assert "neither the tokens&#39; ids nor their text" in (output / "routing.html").read_text()


def test_an_adapter_is_traced_too(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM

    lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    get_peft_model(HfMoeForCausalLM.from_pretrained(model), lora).save_pretrained(tmp_path / "adapter")
    data = ("--data", model.parent / "data" / "law.txt", "--detail", "counts")
    for name, options in (("base", ()), ("adapted", ("--adapter", tmp_path / "adapter"))):
        code, printed = run(model, *data, *options, "--output", tmp_path / name)
        assert code == 0, printed
    base, adapted = (RoutingTrace.load(tmp_path / name / "trace") for name in ("base", "adapted"))
    assert base.layers == adapted.layers
    assert base.metrics() != adapted.metrics()
    page = (tmp_path / "adapted" / "routing.html").read_text()
    assert f"{model.parent.name}/model with {tmp_path.name}/adapter" in page


def test_of_many_layers_the_worst_are_printed_and_the_verdict_last(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    layers = list(sample_report(experts=(8,) * 10, tokens=2_000, domains=()).layers)
    counts = layers[6].counts.clone()
    counts[3] = 0
    layers[6] = replace(layers[6], counts=counts)
    trace = RoutingTrace(layers, {})
    command._print(trace, Path("out"), all_layers=False)
    lines = capsys.readouterr().out.rstrip().split("\n")
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if "│ layer " in line]
    assert len(rows) == 5
    assert rows[0].split("│")[1].strip() == "layer 6"
    assert lines[-1] == "Some experts are dead: no token chooses them."
    command._print(trace, Path("out"), all_layers=True)
    assert capsys.readouterr().out.count("│ layer ") == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give text to trace, such as --data law.txt"),
        (("--data", "absent.txt"), "'absent.txt' does not exist. Check the path."),
        (("--data", "DATA", "--max-tokens", 0), "--max-tokens must be at least 1, got 0"),
        (("--data", "DATA", "--detail", "all"), "Invalid value for '--detail'"),
        (("--data", "DATA", "--detail", "counts", "--no-text"), "counts hold no text"),
        (("--data", "DATA", "--dtype", "int8"), "the dtype must be one of auto, float32"),
        (("--data", "DATA", "--adapter", "DATA"), "has no adapter_config.json"),
    ],
)
def test_bad_input_exits_with_2_and_leaves_nothing(model, tmp_path, arguments, message):
    arguments = [model.parent / "data" if each == "DATA" else each for each in arguments]
    code, printed = run(model, *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert message in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_named(tmp_path, model):
    code, printed = run(tmp_path / "none", "--data", model.parent / "data", "--output", tmp_path / "out")
    assert code == 2
    assert str(tmp_path / "none") in printed.replace(" ", "")


def test_a_folder_of_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, printed = run(model, "--data", model.parent / "data", "--output", tmp_path)
    assert code == 2
    assert "holds something else. Name a new one with --output." in printed
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_an_interrupted_run_leaves_the_old_results(model, tmp_path, monkeypatch, interruption):
    data = ("--data", model.parent / "data" / "law.txt", "--detail", "counts", "--output", tmp_path / "out")
    assert run(model, *data)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def interrupt(*arguments):
        raise interruption

    monkeypatch.setattr(command, "_plot", interrupt)
    code, _ = run(model, *data)
    assert code == (130 if interruption is KeyboardInterrupt else 2)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
