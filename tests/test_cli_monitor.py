"""`hf-moe monitor`: parsing, exit codes; the rest is tested in test_monitor.py and test_served_counts.py."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import hf_moe.cli.monitor  # noqa: F401
import hf_moe_command
from hf_moe.cli import app
from hf_moe.cli.common import READER_GONE
from hf_moe.comparison.served_counts import json_line, prometheus_text
from hf_moe.observability.layer_statistics import empty_statistics
from hf_moe.observability.routing_trace import RoutingTrace

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitor")
    empty = [empty_statistics(name, 4, 2, coactivation=False) for name in LAYERS]
    trace = RoutingTrace(empty, {})
    counts = torch.tensor([400, 300, 200, 100])
    trace.add([replace(one, tokens=500, counts=counts, weight_mass=counts.double()) for one in empty], "law")
    trace.save(folder / "trace")
    (folder / "gate.yaml").write_text("checks:\n  - newly_dead_experts == 0\n  - load_shift.max <= 0.05\n")
    (folder / "agreement.yaml").write_text("checks:\n  - agreement.min >= 0.5\n")
    (folder / "good.prom").write_text(prometheus_text({name: [4100, 3000, 1900, 1000] for name in LAYERS}))
    (folder / "bad.jsonl").write_text("".join(json_line(name, [900, 900, 0, 100]) for name in LAYERS))
    (folder / "cut.prom").write_text(prometheus_text({name: [1, 2, 3, 4] for name in LAYERS})[:-4])
    return folder


def run(folder, *arguments):
    return CliRunner().invoke(app, ["monitor", str(folder / "trace"), *map(str, arguments)])


def flat(text):
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def test_traffic_as_before_passes(folder, tmp_path):
    output = tmp_path / "found.json"
    options = ("--gate", folder / "gate.yaml", "--output", output, "--domain", "law")
    result = run(folder, folder / "good.prom", *options)
    assert result.exit_code == 0, result.output
    assert "passed, 2 of 2 checks hold" in flat(result.output)
    assert json.loads(output.read_text())["gate"]["passed"] is True


def test_a_file_that_is_not_there_is_named(folder):
    result = run(folder, folder / "good.prom", "--gate", "nowhere.yaml")
    assert result.exit_code == 2
    assert "error: 'nowhere.yaml': No such file or directory. Check the path." in flat(result.output)


def test_a_dead_expert_fails(folder):
    result = run(folder, folder / "bad.jsonl", "--gate", folder / "gate.yaml")
    assert result.exit_code == 1
    assert re.search(r"line 2: newly_dead_experts == 0: measured 2 \(1 in model.layers.0.mlp", flat(result.output))
    assert run(folder, folder / "bad.jsonl").exit_code == 0  # no thresholds, no judgement


@pytest.mark.parametrize("arguments", [["monitor", "trace", "bad.jsonl", "--gate", "gate.yaml"], ["--help"]])
def test_a_reader_that_ends_first_is_no_failed_threshold(folder, arguments):
    """`hf-moe compare ... | head -1` ended with 1, which says that a threshold does not hold."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, hf_moe_command.__file__, *arguments]
    ended = subprocess.run(command, cwd=folder, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (READER_GONE, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cut.prom",), "the text is cut off"),
        (("absent.prom",), "absent.prom"),
        (("good.prom", "--gate", "agreement.yaml"), "not measured by expert counts alone"),
        (("good.prom", "--domain", "code"), "no domain 'code'"),
        (("good.prom", "--layer", "lm_head"), "no layer 'lm_head'"),
        (("good.prom", "--metric", "other"), "no expert counts"),
        (("good.prom", "--format", "csv"), "'csv' is not one of 'auto', 'jsonl', 'prometheus'"),
        (("good.prom", "--min-per-expert", "1e6"), "are needed to judge"),
        (("good.prom", "--least-per-expert", "1"), "--least-per-expert is called --min-per-expert here"),
    ],
)
def test_bad_input_exits_with_2(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    result = run(folder, *arguments)
    assert result.exit_code == 2, result.output
    assert message in flat(result.output)
    assert "Traceback" not in result.output


def test_a_folder_without_a_trace_is_refused(folder, tmp_path):
    result = CliRunner().invoke(app, ["monitor", str(tmp_path), str(folder / "good.prom")])
    assert result.exit_code == 2
    assert "holds no routing trace" in flat(result.output)
