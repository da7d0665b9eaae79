"""The comparison with plain lm-eval at tiny sizes: equal as it stands, and a wrong metric fails."""

import json
import sys
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install hf-moe[eval]")

from tiny_benchmarks import write_mirror  # noqa: E402
from tiny_moe import hf_moe_model, tiny_tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TASKS = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture
def evaluation(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import evaluation
    from hf_moe.evaluation import tasks

    # listing all of lm-eval's tasks takes seconds
    manager, folders = tasks.TaskManager, [TASKS / name for name in ("arc", "gsm8k")]
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_defaults: manager(include_defaults=False, include_path=folders)
    )
    monkeypatch.setattr(evaluation, "SCORED", ("arc_easy",))
    return evaluation


def test_every_metric_is_held_against_lm_evals(evaluation, tmp_path):
    hf_moe_model(vocab_size=300).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    mirror, output = write_mirror(tmp_path / "mirror"), tmp_path / "evaluation.json"
    arguments = [str(tmp_path / "model"), "--data-root", str(mirror), "--limit", "4", "--generation-limit", "2"]
    options = evaluation.parser().parse_args([*arguments, "--max-gen-toks", "8", "--output", str(output)])
    assert evaluation.run(options) == 0
    data = json.loads(output.read_text())
    assert list(data["tasks"]) == ["arc_easy", "gsm8k"]
    assert (data["documents"], data["largest_difference"], data["other_documents"]) == (6, 0, 0)
    assert str(tmp_path) not in output.read_text()


def test_a_metric_that_differs_is_seen(evaluation):
    ours = {"acc,none": {"value": 0.5, "stderr": 0.25}, "f1,none": {"value": None, "stderr": None}}
    same = {"acc,none": 0.5, "acc_stderr,none": 0.25, "f1,none": float("nan"), "f1_stderr,none": "N/A"}
    assert [metric["difference"] for metric in evaluation.side_by_side(ours, same).values()] == [0, 0]
    for change, difference in (({"acc,none": 0.25}, 0.25), ({"acc_stderr,none": "N/A"}, float("inf"))):
        assert evaluation.side_by_side(ours, same | change)["acc,none"]["difference"] == difference
