"""recipes/evaluate.py: a base and its adapter on the same documents."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install hf-moe[eval]")
pytest.importorskip("hf_moe.recipes", reason="hf_moe is not installed: pip install -e .")

from hf_moe.recipes import evaluate as recipe  # noqa: E402

from hf_moe.evaluation.errors import EvaluationError  # noqa: E402
from tiny_moe import with_expert_lora  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"


def test_a_base_and_its_adapter_are_compared(model_folder, mirror, tmp_path):
    model = with_expert_lora(AutoModelForCausalLM.from_pretrained(model_folder()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ["--model", model_folder(), "--adapter", tmp_path / "adapter", "--data_root", mirror]
    arguments += ["--tasks", TASKS / "wikitext/wikitext.yaml", "--limit", 3, "--output", tmp_path / "out"]
    comparison = recipe.main([str(argument) for argument in arguments])
    assert comparison == json.loads((tmp_path / "out/comparison.json").read_text())
    found = comparison["tasks"]["wikitext"]["bits_per_byte,none"]
    assert found["documents"] == 3
    assert found["difference"] != 0
    assert comparison["set_otherwise"]["model.adapter"] == [None, "adapter"]


def test_a_missing_adapter_is_found_before_the_base_runs(model_folder, tmp_path, monkeypatch, capsys):
    arguments = ["--model", str(model_folder()), "--adapter", str(tmp_path / "absent"), "--data", "embedded"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(recipe.__file__, run_name="__main__")
    assert error.value.code == 2
    assert "absent' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exactly_one_other_model_is_needed():
    for extra in ([], ["--adapter", "a", "--tuned", "b"]):
        with pytest.raises(EvaluationError, match="one of --adapter and --tuned"):
            recipe.main(["--model", "m", *extra])
    with pytest.raises(EvaluationError, match="domains is called data now"):
        recipe.main(["--model", "m", "--domains", "embedded"])
