"""The command parses, refuses and prints; the work is tested in test_quickstart.py."""

import importlib.metadata
import json
import re
import runpy
import sys

import pytest
from typer.testing import CliRunner

pytest.importorskip("hf_moe.recipes", reason="hf_moe is not installed: pip install -e .")
from hf_moe.recipes import quickstart

import hf_moe_command
from hf_moe import cli
from hf_moe.cli.common import describe_error
from hf_moe.io.installation import install_command
from tiny_hf_moe import make_code_old
from tiny_moe import hf_moe_model

runner = CliRunner()


def run(*arguments):
    return runner.invoke(cli.app, [str(argument) for argument in arguments])


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"hf-moe {importlib.metadata.version('hf-moe')}\n"


def test_a_model_that_is_neither_here_nor_on_the_hub_is_named(tmp_path):
    unreachable = OSError("We couldn't connect")
    message = describe_error(unreachable, "nowhere", str(tmp_path), None)
    assert message == "no folder here is called 'nowhere', and the Hub gave nothing: We couldn't connect"
    assert describe_error(unreachable, str(tmp_path)) == "We couldn't connect"
    message = describe_error(ConnectionError("refused"), "nowhere")
    assert message.startswith("no folder here is called 'nowhere', and the Hub cannot be reached (ConnectionError")


def test_help_names_every_option():
    result = run("quickstart", "--help")
    assert result.exit_code == 0
    for option in ("--output", "--data", "--domain", "--minutes", "--seed"):
        assert option in result.output


def test_options_reach_the_recipe(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(quickstart, "main", seen.append)
    arguments = (
        "--output",
        tmp_path,
        "--data",
        "a.txt",
        "--data",
        "b.md",
        "--domain",
        "a",
        "--minutes",
        0.5,
        "--seed",
        7,
    )
    assert run("quickstart", *arguments).exit_code == 0
    (recipe,) = seen
    assert (recipe.output, recipe.domain, recipe.minutes, recipe.seed) == (tmp_path, "a", 0.5, 7)
    assert [path.name for path in recipe.data] == ["a.txt", "b.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", "-1"), "--minutes must be from 0.05 to 1440"),
        (("--minutes", "nan"), "got nan"),
        (("--minutes", "soon"), "Invalid value for '--minutes'"),
        (("--seed", "1.5"), "Invalid value for '--seed'"),
        (("--domain", "lgal"), "Did you mean 'legal'?"),
        (("--data", "absent.txt"), "'absent.txt' does not exist. Check the path."),
        (("--depth", "3"), "No such option"),
        (("extra",), "unexpected extra argument"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(arguments, message, tmp_path):
    result = run("quickstart", "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_an_interruption_says_how_to_continue(monkeypatch):
    def interrupt(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "main", interrupt)
    result = run("quickstart")
    assert result.exit_code == 130
    assert "Give the same command again to continue" in result.output


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else name)
    result = run("quickstart")
    assert result.exit_code == 2
    assert f"needs matplotlib. Install it with: {install_command('recipes')}" in result.output


def test_info_describes_a_saved_model(tmp_path):
    hf_moe_model(num_shared_experts=1).save_pretrained(tmp_path / "model")
    result = run("info", tmp_path / "model")
    assert result.exit_code == 0
    assert "8 experts, top-2" in result.output
    assert 'runs now: grouped_mm. With experts_implementation="hf_moe": hf_moe_' in " ".join(result.output.split())
    assert "refused" not in result.output
    assert "another version" not in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert re.search(r"^expert LoRA r=16 +\S+ .* yes yes yes yes$", result.output, re.MULTILINE)
    make_code_old(tmp_path / "model")
    output = " ".join(run("info", tmp_path / "model").output.split())
    assert "carries code of another version of hf_moe (modeling_hf_moe.py)" in output
    assert "renew_code(folder)" in output
    chosen = run("info", tmp_path / "model", "--gpu", "1", "--batch-size", "3", "--verbose").output
    assert "; 3 rows of " in chosen
    assert "fits a GPU of" in chosen
    assert " yes yes" not in chosen
    assert "refused: " in chosen
    found = json.loads(run("info", tmp_path / "model", "--json").output)
    assert found["model"]["model_type"] == "hf_moe"
    assert [each["name"] for each in found["memory"]["methods"]][1] == "expert LoRA r=16"


def test_info_refuses_with_a_way_out(tmp_path):
    hf_moe_model().save_pretrained(tmp_path / "run" / "model")
    result = run("info", tmp_path / "run")
    assert result.exit_code == 2
    assert f"such as {tmp_path / 'run' / 'model'}" in result.output.replace("\n", "")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "no_such_model"}')
    result = run("info", tmp_path / "bad")
    assert result.exit_code == 2
    assert "no_such_model" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "A" * 5000), "File name too long. Check the path."),
        (
            ("compare", "{list}", "--dtype-new", "float32", "--data", "embedded"),
            "is a file. Name the folder of a model",
        ),
    ],
)
def test_what_used_to_be_a_traceback_is_one_line(arguments, message, tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    result = run(*(each.format(list=tmp_path / "list.json") for each in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted."),
        (MemoryError(), 2, "error: the memory is not enough"),
        (RecursionError(), 2, "error: a file is nested too deeply"),
        (OSError(5, "Input/output error", "x.json"), 2, "error: 'x.json': Input/output error. Check the path."),
        (BrokenPipeError(), cli.common.READER_GONE, ""),
    ],
)
def test_what_no_command_foresees_ends_in_a_sentence(raised, code, message, monkeypatch):
    """Here in the imports of `hf-moe trace`, before its own handling."""

    def stop(*names):
        raise raised

    monkeypatch.setattr(sys.modules["hf_moe.cli.trace"], "require", stop)
    monkeypatch.setattr(cli.common, "_discard_output", lambda: None)
    result = run("trace", "model", "--data", "x.txt")
    assert result.exit_code == code
    assert result.output.strip().startswith(message)
    assert isinstance(result.exception, SystemExit)


def test_an_interruption_of_the_first_imports_is_a_sentence(capsys, monkeypatch):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("hf_moe."):
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "hf_moe.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted()])
    with pytest.raises(SystemExit) as ended:
        hf_moe_command.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted.\n"


def test_the_recipe_runs_as_a_file(monkeypatch, capsys):
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--minutes", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(quickstart.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert "--minutes must be from 0.05 to 1440" in capsys.readouterr().err
