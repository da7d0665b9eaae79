"""`hf-moe compare`: parsing, exit codes, what is written; the metrics are tested in test_models.py."""

import json
import re

import pytest
from typer.testing import CliRunner

import hf_moe.cli.compare  # noqa: F401
from hf_moe.cli import app
from tiny_moe import hf_moe_model, tiny_tokenizer, with_expert_lora, words

runner = CliRunner()


CHAT = {"messages": [{"role": "user", "content": "abcd"}, {"role": "assistant", "content": "ef"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = hf_moe_model(vocab_size=300, num_hidden_layers=1)
    new = hf_moe_model(seed=1, vocab_size=300, num_hidden_layers=1, max_position_embeddings=64)
    for name, model in (("base", base), ("new", new)):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    with_expert_lora(base, init_lora_weights=False).save_pretrained(folder / "adapter")
    small = hf_moe_model(vocab_size=300, num_hidden_layers=1, num_experts=4, moe_intermediate_size=16)
    with_expert_lora(small).save_pretrained(folder / "misfit")
    (folder / "law.txt").write_text(words(60))
    (folder / "code.txt").write_text(words(60, seed=5))
    return folder


def run(*arguments):
    return runner.invoke(app, ["compare", *map(str, arguments)])


def flat(text):
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def test_thresholds_that_hold_write_json_and_page(folder, tmp_path):
    gate = tmp_path / "gate.yaml"
    gate.write_text("checks:\n  - weight_drift.router.max == 0\n  - bits_per_byte.domain.law <= +5\n")
    data = ("--data", folder / "law.txt", "--data", folder / "code.txt")
    options = ("--gate", gate, "--output", tmp_path / "out")
    # as --adapter would, in the place of a model
    result = run(folder / "base", folder / "adapter", *data, *options)
    assert result.exit_code == 0, result.output
    assert f"base with {folder.name}/adapter (new) against base (base)" in flat(result.output)
    assert "is a PEFT adapter: it is loaded onto" in flat(result.output)
    assert "norm of the change over the norm of the base's weights" in flat(result.output)
    assert "passed, 2 of 2 checks hold" in flat(result.output)
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["gate"]["passed"] is True
    assert list(record["domains"]) == ["law", "code"]
    assert record["figures"]["weight_drift.experts.max"]["value"] > 0
    assert "Thresholds passed" in (tmp_path / "out" / "comparison.html").read_text()


def test_conversations_are_compared(folder, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT))
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}")
    data = (
        "--data",
        tmp_path / "chat.jsonl",
        "--chat-template",
        tmp_path / "plain.jinja",
        "--output",
        tmp_path / "out",
    )
    result = run(folder / "base", folder / "new", *data)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(record["domains"]) == ["chat"]
    # 128 and 64: the smaller context
    assert record["window"] == 64
    assert "Both models read 64 tokens at once, the context of new" in flat(result.output)


def test_a_threshold_that_fails_exits_with_1_and_names_the_line(folder, tmp_path):
    gate = tmp_path / "gate.yaml"
    gate.write_text("checks:\n  - dead_experts <= 8\n  - agreement.min >= 0.99\n")
    result = run(folder / "base", folder / "new", "--data", folder / "law.txt", "--gate", gate)
    assert result.exit_code == 1
    assert "FAILED, 1 of 2 checks hold" in flat(result.output)
    assert "line 3: agreement.min >= 0.99: measured 0." in flat(result.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("new",), "give text to compare on"),
        (("--data", "law.txt"), "name a second model, or what is different"),
        (("new", "--data", "absent.txt"), "absent.txt"),
        (("absent", "--data", "law.txt"), "absent"),
        (("new", "--data", "law.txt", "--dtype-new", "int3"), "the dtype must be one of"),
        (("new", "--data", "law.txt", "--max-tokens", "0"), "--max-tokens must be at least 1"),
        (("new", "--data", "law.txt", "--max-bytes", "9"), "--max-bytes is called --max-tokens here"),
        (("adapter", "--adapter", "adapter", "--data", "law.txt"), "is a PEFT adapter, and --adapter names another"),
        (
            ("--adapter", "misfit", "--data", "law.txt"),
            "4 experts of width 16, and the base has 8 of",
        ),
        (
            ("new", "--data", "law.txt", "--window", "1000"),
            "window must be at most 64, the context of 'new'",
        ),
        (("new", "--data", "law.txt", "--experts-implementation-new", "no_such"), "no_such"),
        (("new", "--data", "law.txt", "--gate", "gate.yaml"), "line 2: unknown metric 'agreement'"),
        (("new", "--data", "law.txt", "--gate", "domains.yaml"), "there is no domain 'code'; the texts are of law"),
        (("new", "--data", "law.txt", "--gate", "absent.yaml"), "absent.yaml"),
        (("new", "--data", "law.txt", "--adapter", "new"), "has no adapter_config.json"),
    ],
)
def test_bad_input_exits_with_2(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    (folder / "gate.yaml").write_text("checks:\n  - agreement >= 0.5\n")
    (folder / "domains.yaml").write_text("checks:\n  - bits_per_byte.domain.code <= +0.5\n")
    result = run("base", *arguments)
    assert result.exit_code == 2, result.output
    assert message in flat(result.output)
    assert "Traceback" not in result.output


def test_the_example_thresholds_can_be_read():
    from pathlib import Path

    from hf_moe.observability.thresholds import RoutingThresholds

    thresholds = RoutingThresholds.load(Path(__file__).parent.parent / "recipes/configs/quickstart/gate.yaml")
    assert "bits_per_byte.worst_domain" in [check.metric for check in thresholds.checks]
