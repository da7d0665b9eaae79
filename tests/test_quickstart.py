"""The main job at smoke size: the effects that it promises, the numbers twice the same, interruptions, refusals."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("hf_moe.recipes", reason="hf_moe is not installed: pip install -e .")
from hf_moe.recipes import quickstart
from hf_moe.recipes.quickstart import Quickstart

from hf_moe.adapters.frozen_router import router_hash
from hf_moe.data.bad_rows import DataError
from hf_moe.io.stages import RunRefusedError
from tiny_moe import hf_moe_model, words
from tiny_quickstart import smoke

PROGRAM = Path(__file__).with_name("tiny_quickstart.py")


def without_times(report):
    """Everything but the times, which differ."""
    return {name: value for name, value in report.items() if name not in ("seconds", "interrupted")}


def test_loaded_weights_lie_as_trained_ones_do(tmp_path):
    """The address decides the last bit of some products, and the run compares logits bit by bit."""
    hf_moe_model().save_pretrained(tmp_path / "model")
    loaded = quickstart.load_model(SimpleNamespace(output=tmp_path))
    assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}


def start(output, *arguments, **kwargs):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, PROGRAM, output, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "out"
    return output, quickstart.main(smoke(output))


def test_the_base_model_learns_and_the_adapter_learns_the_new_domain(finished):
    _, report = finished
    losses = [record["loss"] for record in report["base"]["log"]]
    assert losses[-1] < losses[0] - 1
    bits = report["evaluation"]["bits_per_byte"]
    assert bits["after"]["legal"] < bits["before"]["legal"] - 0.05
    assert all(bits["after"][name] < bits["before"][name] + 0.1 for name in bits["before"])


def test_with_the_adapter_off_it_is_exactly_the_base_model(finished):
    bits = finished[1]["evaluation"]["bits_per_byte"]
    assert bits["adapter off"] == bits["before"]
    assert bits["after"] != bits["before"]


def test_the_router_stayed_frozen_and_the_routing_did_not(finished):
    _, report = finished
    hashes = {
        report["base"]["router_sha256"],
        report["adapter"]["router_sha256_before"],
        report["adapter"]["router_sha256_after"],
        report["load_back"]["router_sha256"],
    }
    assert len(hashes) == 1
    agreement = report["evaluation"]["routing_agreement"]["legal"]
    assert agreement[0] == 1.0, "the first router's input does not move"
    assert agreement[1] < 1.0


def test_everything_loads_with_the_ordinary_classes(finished):
    output, report = finished
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    ids = tokenizer("Permission is hereby granted", return_tensors="pt").input_ids
    base = model(ids).logits
    tuned = PeftModel.from_pretrained(model, output / "adapter").eval()
    assert router_hash(tuned) == report["adapter"]["router_sha256_after"]
    assert not torch.equal(tuned(ids).logits, base)
    assert (output / "tokenizer" / "tokenizer.json").read_bytes() == (output / "model" / "tokenizer.json").read_bytes()


def test_the_report_counts_what_was_used(finished):
    _, report = finished
    for name in ("base", "adapter"):
        assert report[name]["tokens"] == report[name]["steps"] * 4 * 64
        assert report[name]["log"][-1]["step"] <= report[name]["steps"]
        assert all("moe/load_entropy" in record for record in report[name]["log"])
    assert set(report["text"]) == {"code", "docs", "legal", "readme", "arithmetic"}
    assert all(2_000 < counts["held_out_bytes"] <= 4_000 for counts in report["text"].values())
    assert report["interrupted"] == []
    assert report["command"] == "hf-moe quickstart --domain legal --minutes 0.1 --seed 0"


def test_nothing_names_this_machine_and_no_work_is_left(finished):
    output, _ = finished
    assert {path.name for path in output.iterdir() if not path.name.startswith(".")} == {
        "README.md", "report.json", "quickstart.json", "routing.html", "model", "adapter", "tokenizer", "plots",
    }  # fmt: skip
    secrets = (str(output), str(Path.home()), os.environ.get("USER") or "no-user-name")
    for path in output.rglob("*"):
        if path.suffix in (".json", ".md"):
            text = path.read_text(encoding="utf-8")
            assert not any(secret in text for secret in secrets if len(secret) > 4), path
    assert not list(output.rglob("training_args.bin"))


def test_the_card_shows_the_plots_that_are_there(finished):
    output, _ = finished
    card = (output / "README.md").read_text(encoding="utf-8")
    plots = sorted((output / "plots").iterdir())
    assert [path.name for path in plots] == ["bits_per_byte.png", "expert_load.png", "loss.png"]
    assert all(f"(plots/{path.name})" in card for path in plots)


def test_the_same_command_again_reports_without_working(finished, monkeypatch):
    output, report = finished
    monkeypatch.setattr(quickstart, "train", None)
    monkeypatch.setattr(quickstart, "evaluate", None)
    assert quickstart.main(smoke(output)) == report


def test_other_arguments_in_the_same_folder_are_refused_by_name(finished):
    output, _ = finished
    with pytest.raises(RunRefusedError, match="seed was 0, is 1"):
        quickstart.main(smoke(output, seed=1))
    with pytest.raises(RunRefusedError, match="domain was 'legal', is 'code'"):
        quickstart.main(smoke(output, domain="code"))
    with pytest.raises(RunRefusedError, match=r"minutes was 0.1, is 0.2"):
        quickstart.main(smoke(output, minutes=0.2))


@pytest.mark.slow
@pytest.mark.long
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished, tmp_path):
    _, report = finished
    again = quickstart.main(smoke(tmp_path / "again"))
    assert without_times(again) == without_times(report)
    other = quickstart.main(smoke(tmp_path / "other", seed=1))
    assert other["evaluation"]["bits_per_byte"] != report["evaluation"]["bits_per_byte"]
    assert other["text"] == report["text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill_at", ["base:0", *(pytest.param(point, marks=pytest.mark.long) for point in ("base:9", "adapter:10"))]
)
def test_killed_and_continued_gives_the_numbers_of_an_uninterrupted_run(kill_at, finished, tmp_path):
    output = tmp_path / "out"
    killed = start(output, kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stage = kill_at.partition(":")[0]
    assert list((output / "work" / stage).glob("checkpoint-*")), (
        "killed before the first checkpoint: no resume to test"
    )
    assert (output / "model").exists() == (stage == "adapter")
    assert not (output / "adapter").exists()
    continued = quickstart.main(smoke(output))
    assert without_times(continued) == without_times(finished[1])
    assert continued["interrupted"] == [stage]


@pytest.mark.slow
def test_a_file_as_new_domain(tmp_path):
    (tmp_path / "notes.txt").write_text(words(4_000), encoding="utf-8")
    report = quickstart.main(smoke(tmp_path / "out", data=[tmp_path / "notes.txt"]))
    assert report["new_domain"] == "notes"
    bits = report["evaluation"]["bits_per_byte"]
    assert bits["after"]["notes"] < bits["before"]["notes"] - 0.1
    assert report["command"].endswith("--data notes.txt")
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_text_that_changed_since_is_refused(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "make_tokenizer", stop)
    notes = tmp_path / "notes.txt"
    notes.write_text(words(3_000, 1), encoding="utf-8")
    recipe = smoke(tmp_path / "out", data=[notes])
    with pytest.raises(KeyboardInterrupt):
        quickstart.main(recipe)
    notes.write_text(words(3_000, 2), encoding="utf-8")
    with pytest.raises(RunRefusedError, match="text of the domain 'notes' has changed"):
        quickstart.main(recipe)


def bad_output(folder):
    (folder / "file").write_text("x")
    return {"output": folder / "file"}


def full_output(folder):
    (folder / "thesis.doc").write_text("x")
    return {"output": folder}


def named_like_embedded(folder):
    (folder / "code.txt").write_text(words(3_000))
    return {"data": (folder / "code.txt",)}


def data_of_another_name(folder):
    (folder / "notes.txt").write_text(words(3_000))
    return {"data": (folder / "notes.txt",), "domain": "note"}


REFUSED = {
    "no_minutes": (lambda folder: {"minutes": 0.0}, r"--minutes must be from 0.05 to 1440 .* got 0.0"),
    "negative_minutes": (lambda folder: {"minutes": -5.0}, "--minutes .* got -5"),
    "nan_minutes": (lambda folder: {"minutes": float("nan")}, "--minutes .* got nan"),
    "endless_minutes": (lambda folder: {"minutes": float("inf")}, "--minutes .* got inf"),
    "absurd_minutes": (lambda folder: {"minutes": 1e9}, "--minutes .* got 1000000000"),
    "negative_seed": (lambda folder: {"seed": -1}, "--seed must be from 0 to 4294967295, got -1"),
    "huge_seed": (lambda folder: {"seed": 2**32}, "--seed .* got 4294967296"),
    "unknown_domain": (lambda folder: {"domain": "klingon"}, "--domain must be one of code, docs, legal"),
    "misspelt_domain": (lambda folder: {"domain": "leagl"}, "got 'leagl'. Did you mean 'legal'"),
    "domain_not_in_data": (data_of_another_name, "got 'note'. Did you mean 'notes'"),
    "data_named_like_embedded": (named_like_embedded, "'code' in --data is also an embedded one"),
    "output_is_a_file": (bad_output, "is a file; it must be a folder"),
    "output_is_in_use": (full_output, r"not empty \(it holds 'thesis.doc'\)"),
    "missing_data": (lambda folder: {"data": (folder / "no.txt",)}, "no.txt' does not exist"),
    "empty_folder": (lambda folder: {"data": (folder,)}, "holds no .txt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_before_any_work(case, tmp_path, monkeypatch):
    change, message = REFUSED[case]
    monkeypatch.setattr(quickstart, "load_text", None)
    arguments = change(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    recipe = Quickstart(**{"output": tmp_path / "out", **arguments})
    with pytest.raises((RunRefusedError, DataError), match=message):
        quickstart.main(recipe)
    assert sorted(tmp_path.rglob("*")) == before


def test_steps_follow_from_the_minutes():
    default = Quickstart()
    assert default.steps(default.base_tokens_per_minute) == round(
        5 * default.base_tokens_per_minute / (default.rows_per_step * default.row_length)
    )
    assert Quickstart(minutes=10).steps(51_200) == 2 * Quickstart(minutes=5).steps(51_200) == 200
    assert Quickstart(minutes=0.05).steps(1) == 4
