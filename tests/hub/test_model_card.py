"""Cards hold the facts and nothing made up; text from data cannot become markup, YAML, a template or a leak."""

import copy
import getpass
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

import hf_moe.cli.card  # noqa: F401 (adds the command)
from hf_moe.cli.common import app
from hf_moe.hub import card_metadata, model_card, write_card
from hf_moe.hub.card import card_from_facts
from hf_moe.hub.checkpoint_facts import CheckpointFacts
from hf_moe.hub.facts import CardError
from hf_moe.hub.finetune_card import finetune_card, write_results
from hf_moe.hub.markdown import NOT_MEASURED, cell, fenced, table
from hf_moe.hub.run_card import run_card
from hf_moe.hub.scrub import scrub
from hf_moe.hub.training_facts import Stage, TrainingFacts, training_facts

from .conftest import save_tiny

TOKEN = "hf_" + "aB3dE6gH9j" * 3 + "xyz"
SHA = "0123456789abcdef" * 2 + "01234567"
LOG = [{"step": step, "loss": 5.0 - step / 8} for step in range(1, 12)]
RUN = {"steps": 11, "tokens": 2_816, "log": LOG}
COUNTS = {"train_documents": 9, "train_tokens": 4_321, "held_out_bytes": 678}
QUICKSTART = {
    "recipe": "quickstart",
    "new_domain": "legal",
    "command": "hf-moe quickstart --domain legal --minutes 5 --seed 0",
    "choices": {"layers": 4, "experts": 16, "experts_per_token": 2, "expert_width": 128, "row_length": 256}
    | {"vocab_size": 2048, "adapter_rank": 8, "learning_rate": 0.004, "adapter_learning_rate": 0.003},
    "date": "2026-11-21",
    "versions": {"torch": "2.13.0+cpu"},
    "machine": {"architecture": "x86_64", "device": "cpu", "torch_threads": 1},
    "text": {"code": COUNTS, "legal": COUNTS},
    "base": {**RUN, "parameters": {"total": 3_900_000, "active": 1_100_000}},
    "adapter": {**RUN, "trainable_parameters": 327_680}
    | {"router_sha256_before": "ab" * 32, "router_sha256_after": "ab" * 32},
    "evaluation": {
        "bits_per_byte": {
            "before": {"code": 2.5, "legal": 3.5},
            "after": {"code": 2.625, "legal": 3.0},
            "adapter off": {"code": 2.5, "legal": 3.5},
        },
        "routing_agreement": {"code": [1.0, 0.75], "legal": [1.0, 0.5]},
        "balance_before": {"load_entropy": [0.9, 0.8], "max_violation": [1.5, 2.5]},
    },
    "load_back": {"logits_equal": True, "sample": {"prompt": "The", "base": "a ```x``` b", "adapted": "{{ 7 * 7 }}"}},
    "seconds": {"base": 150.4, "adapter": 60.2},
    "interrupted": ["adapter"],
}
FINETUNE = {
    "recipe": "Expert LoRA",
    "date": "2026-11-22",
    "command": "python recipes/finetune_expert_lora.py --r 8",
    "model_type": "olmoe",
    "choices": {"r": 8, "model": "allenai/OLMoE-1B-7B-0924"},
    "versions": {"torch": "2.13.0"},
    "machine": {"architecture": "x86_64", "device": "cuda"},
    "parameters": {"total": 7_000_000_000, "active": 1_300_000_000, "trained": 5_000_000},
    "saved_bytes": 20_000_000,
    "router_sha256": {"before": "ab" * 32, "after": "cd" * 32},
    "domains": {
        "law": {"share": 0.5, "examples": 3, "tokens": 99, "routing_agreement": [0.5]}
        | {"before": {"bytes": 70, "bits_per_byte": 1.5}, "after": {"bytes": 70, "bits_per_byte": 1.25}}
    },
    "steps": 10,
    "seconds_per_step": 2.5,
    "log": LOG,
}


def task(dataset: str, metric: str, value: float, **changes) -> dict:
    found = {
        "version": 3.0,
        "num_fewshot": 5,
        "num_samples": 1319,
        "num_available": 1319,
        "metrics": {metric: {"value": value, "stderr": 0.01, "higher_is_better": True}},
        "data": {"dataset": dataset, "config": "main", "split": "test", "sha256": {}}
        | {"hub_files": [f"hf://datasets/{dataset}@{SHA}/main/{split}.parquet" for split in ("test", "train")]},
        "truncated_prompts": 0,
    }
    return found | changes


RESULTS = {
    "format": "hf_moe.evaluation/1",
    "date": "2026-11-22",
    "command": "hf-moe evaluate model --tasks gsm8k",
    "harness": {"name": "lm-evaluation-harness", "version": "0.4.13", "commit": None},
    "versions": {"lm-eval": "0.4.13"},
    "device": "cpu",
    "settings": {"limit": None, "generation": {}, "chat_template": False},
    "tasks": {
        "gsm8k": task("openai/gsm8k", "exact_match,strict-match", 0.125),
        "private": task("local", "acc,none", 0.5),
        "arc_easy": task("allenai/ai2_arc", "acc,none", 0.25, num_samples=6, num_available=2376, num_fewshot=0),
    },
    "groups": {},
    "domains": {"notes": {"bytes": 1_000, "metrics": {"bits_per_byte": {"value": 2.25, "stderr": None}}}},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_tiny(folder)
    return folder


def test_a_card_of_a_bare_model_says_what_was_not_measured(saved):
    card = str(model_card(saved))
    for words in (
        "| parameters, trained | not measured |",
        "| router SHA-256 before | not measured |",
        "| base model | not stated |",
        "Standard benchmarks: not measured",
        "Health: not measured",
        "Routing agreement with the base model: not measured",
        "Energy: not measured",
        "8 experts, top-2, width 16",
        'from_pretrained("model", trust_remote_code=True)',
    ):
        assert words in card, words
    assert "model-index" not in card


def test_the_numbers_of_a_model_are_its_own(saved):
    from hf_moe import HfMoeForCausalLM

    model = HfMoeForCausalLM.from_pretrained(saved)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters, total | {total:,} |" in str(model_card(saved))
    size = (saved / "model.safetensors").stat().st_size
    assert f"| bytes of weights | {size:,} |" in str(model_card(saved))


def test_the_quickstarts_card_holds_its_figures():
    card = run_card(QUICKSTART)
    for figure in (
        "3,900,000 parameters (1,100,000 active",
        "-0.500 on legal, +0.125 on code",
        "| code | 678 | 2.500 | 2.625 | 2.500 | +0.125 |",
        "| legal (new) | 678 | 3.500 | 3.000 | 3.500 | -0.500 |",
        "| legal | 1.000 | 0.500 |",
        "router SHA-256 after (equal) | " + "ab" * 32,
        "| base model | 11 | 2,816 | 0.004 | 150 | 3.625 |",
        "| adapter | 11 | 2,816 | 0.003 | not measured | 3.625 |",
        "| base model | model |",
        "hf-moe quickstart --domain legal --minutes 5 --seed 0",
        "| logits after loading back | equal |",
        "````text\na ```x``` b\n````",
        "{{ 7 * 7 }}",
    ):
        assert figure in card, figure
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "peft"
    assert "model-index" not in head, "figures on private text are no benchmark results"


def test_a_recipes_card_holds_its_figures():
    card = finetune_card(FINETUNE, saved="adapter")
    for figure in (
        "router SHA-256 after (DIFFERENT) | " + "cd" * 32,
        "| law | 70 | 1.500 | 1.250 | -0.250 |",
        "| Expert LoRA | 10 | not measured | not measured | 25 | 3.625 |",
        'from_pretrained("allenai/OLMoE-1B-7B-0924")',
        "| law | 50% | 3 | 99 |",
    ):
        assert figure in card, figure
    assert ModelCard(card).data.base_model == "allenai/OLMoE-1B-7B-0924"
    assert "Without hf_moe this kind of adapter does not load" in finetune_card(
        FINETUNE, saved="adapter", needs_hf_moe=True
    )


def test_a_results_folder_is_written_whole(tmp_path):
    write_results(tmp_path, FINETUNE, saved="adapter")
    card = (tmp_path / "README.md").read_text()
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == ["bits_per_byte.png", "loss.png"]
    assert all(f"(plots/{name})" in card for name in plots)


def test_results_become_a_table_and_metadata_that_the_hub_reads_back(saved, tmp_path):
    card = model_card(saved, results=RESULTS, repo_id="me/model", license="apache-2.0", language="en")
    text = str(card)
    assert "| gsm8k | 3 | 5 | exact_match,strict-match | 0.1250 ± 0.0100 | 1,319 |" in text
    assert "first 6 of 2,376" in text
    assert "| notes | 1,000 | 2.250 |" in text
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.to_dict() == card.data.to_dict()
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    found = {(result.dataset_type, result.metric_type, result.metric_value) for result in data.eval_results}
    assert found == {("openai/gsm8k", "exact_match", 0.125), ("allenai/ai2_arc", "acc", 0.25)}
    assert {result.dataset_revision for result in data.eval_results} == {SHA}
    assert all(result.source_name == "lm-evaluation-harness 0.4.13" for result in data.eval_results)


def test_full_runs_go_where_the_leaderboards_look(saved, tmp_path):
    written = write_card(saved, output=tmp_path, results=RESULTS)
    assert {path.relative_to(tmp_path).as_posix() for path in written} == {"README.md", ".eval_results/gsm8k.yaml"}
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "gsm8k.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 0.125)
    assert (entry.dataset_revision, entry.date) == (SHA, "2026-11-22")


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"limit": 1319}},
        {"settings": {"limit": None, "generation": {"max_gen_toks": 8}}},
        {"settings": {"limit": None, "chat_template": True}},
        {"settings": None},
        {"num_samples": 1318},
        {"num_fewshot": 4},
        {"truncated_prompts": 1},
        {"data": RESULTS["tasks"]["gsm8k"]["data"] | {"hub_files": []}},
        {"data": RESULTS["tasks"]["gsm8k"]["data"] | {"hub_files": ["hf://datasets/me/gsm8k@" + SHA + "/x"]}},
        {"data": RESULTS["tasks"]["gsm8k"]["data"] | {"dataset": "me/gsm8k"}},
        {"data": RESULTS["tasks"]["gsm8k"]["data"] | {"split": "train"}},
        {"metrics": {"exact_match,strict-match": {"value": None}}},
    ],
    ids=str,
)
def test_part_of_a_benchmark_is_not_the_benchmark(change):
    results = copy.deepcopy(RESULTS)
    target = results if "settings" in change else results["tasks"]["gsm8k"]
    assert card_metadata.eval_files(results)
    target.update(change)
    assert card_metadata.eval_files(results) == {}


def test_a_trainers_state_is_a_training_report():
    state = {"global_step": 84, "best_model_checkpoint": "/home/jane/out", "num_input_tokens_seen": 0}
    log = [{"loss": 2.0, "step": 1, "learning_rate": 0.1}, {"loss": float("nan")}, {"train_runtime": 9}]
    (stage,) = training_facts({**state, "log_history": log}).stages
    assert stage == Stage("training", 84, tokens=None, learning_rate=0.1, seconds=9.0, last_loss=2.0)


def test_a_traces_figures(saved, tmp_path):
    figures = {f"{name}/model.layers.{i}.mlp": 0.5 + i for name in ("load_entropy", "max_violation") for i in (0, 1)}
    trace = {"metrics": {**figures, "load_entropy/mean": 1.0, "load_entropy/worst": 0.5}, "verdict": "Healthy <b>."}
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    card = str(model_card(saved, trace=tmp_path / "trace.json"))
    assert "| load entropy (1 = balanced) | 0.500 | 1.500 |" in card
    assert r"Healthy \<b\>." in card
    (tmp_path / "trace.json").write_text("{}")
    with pytest.raises(CardError, match="holds no 'metrics'"):
        model_card(saved, trace=tmp_path / "trace.json")


def test_a_recorded_trace_is_judged_and_drawn(saved, tmp_path):
    import torch

    from hf_moe import HfMoeForCausalLM
    from hf_moe.observability.recording import record_routing

    model = HfMoeForCausalLM.from_pretrained(saved)
    with record_routing(model) as trace, torch.no_grad():
        model(torch.randint(1, 64, (8, 100)))
    trace.save(tmp_path / "trace")
    write_card(saved, output=tmp_path / "card", trace=tmp_path / "trace", training=QUICKSTART)
    card = (tmp_path / "card" / "README.md").read_text()
    plots = sorted(path.name for path in (tmp_path / "card" / "plots").iterdir())
    assert plots == ["bits_per_byte.png", "expert_load.png", "loss.png"]
    assert all(f"(plots/{name})" in card for name in plots)
    entropy = trace.metrics()["load_entropy/model.layers.0.mlp"]
    assert f"| load entropy (1 = balanced) | {entropy:.3f} |" in card
    assert "Health: not measured" not in card


HOSTILE = {
    "<script>": r"\<script\>",
    "a|b": r"a\|b",
    "a\nb\n# c": r"a b \# c",
    "`x`": r"\`x\`",
    "[x](http://y)": r"\[x\](http://y)",
    "&lt;": r"\&lt;",
    "snake_case": "snake_case",
    "_emphasis_": r"\_emphasis\_",
    "back\\slash": r"back\\slash",
    "hidden\u202etxt\x00\x1b[0m": r"hidden txt \[0m",
    True: "True",
    float("nan"): NOT_MEASURED,
}


@pytest.mark.parametrize("text", HOSTILE)
def test_cells_hold_no_markup(text):
    assert cell(text) == HOSTILE[text]


EVIL = "x\n---\nlicense: evil\n---\n# <img src=x onerror=alert(1)> {{ 7 * 7 }} {% for x in ().__class__.__mro__ %}|`"


def evil_copy(value):
    """The same structure with every text, and every name that is data, replaced."""
    if isinstance(value, dict):
        return {key: evil_copy(item) for key, item in value.items()} | {EVIL: {"metrics": {EVIL: {"value": 1.0}}}}
    return (
        [evil_copy(item) for item in value] if isinstance(value, list) else EVIL if isinstance(value, str) else value
    )


@pytest.mark.parametrize("report", [QUICKSTART, FINETUNE], ids=["quickstart", "finetune"])
def test_hostile_facts_stay_text(report, saved):
    card = model_card(
        saved,
        training=evil_copy(report),
        results=evil_copy(RESULTS),
        repo_id=EVIL,
        base_model=EVIL,
        license=EVIL,
        language=EVIL,
        datasets=[EVIL],
        plots=[EVIL],
    )
    text = str(card)
    head = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert ModelCard(text).data.to_dict().keys() == head.keys()
    assert not {"license", "language", "base_model", "datasets"} & head.keys(), "no valid value, so no value"
    assert "{{ 7 * 7 }}" in text.replace("\\", ""), "shown as it is, not computed"
    outside = re.split(r"^```+\w*$", text.split("\n---\n", 1)[1], flags=re.MULTILINE)[::2]
    assert not any("<img" in part.replace("\\<", "") for part in outside)
    assert not any(line.startswith(("# <", "license:", "---")) for part in outside for line in part.splitlines())


@pytest.mark.parametrize("junk", [None, [], "x", 7, True, {}, {"a": []}, [None], {"tasks": 3}, float("nan")], ids=str)
def test_facts_of_any_shape_are_taken_or_left(junk, saved):
    fields = ("choices", "text", "base", "adapter", "evaluation", "domains", "log", "router_sha256", "parameters")
    fields += ("seconds", "machine", "interrupted", "load_back", "versions", "log_history", "recipe", "date")
    for field in fields:
        for report in (QUICKSTART, FINETUNE):
            facts = training_facts(report | {field: junk})
            assert isinstance(facts, TrainingFacts)
            assert str(card_from_facts(CheckpointFacts(name="x"), facts))
    for field in RESULTS:
        assert str(card_from_facts(CheckpointFacts(name="x"), TrainingFacts(), results=RESULTS | {field: junk}))
        assert isinstance(card_metadata.eval_files(RESULTS | {field: junk}), dict)


def test_nothing_of_this_machine_is_in_it(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "jane")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/jane doe"))
    report = copy.deepcopy(FINETUNE)
    report["command"] = f"python recipes/x.py --data=/home/jane doe/secret/a.txt --out {tmp_path}/out --key {TOKEN}"
    report["choices"]["model"] = str(tmp_path / "jane" / "base")
    report["recipe"] = r"C:\Users\jane\run and ~/notes/x.md by jane@box.local and file:///srv/jane/y.md"
    text = str(model_card(saved, training=report, results={"command": f"hf-moe evaluate {saved}"}))
    for secret in (TOKEN, "jane", "/home", str(tmp_path), str(saved.parent), "Users", "box.local", "srv"):
        assert secret not in text, secret
    for kept in ("a.txt", "x.md", "[token removed]", "recipes/x.py"):
        assert kept in text.replace("\\", ""), kept


@pytest.mark.parametrize(
    "text",
    ["total / active", "owner/name", "https://github.com/a/b/c", "![x](plots/loss.png)", "| 1 / 2 |", "and/or", "/"],
)
def test_what_only_looks_like_a_path_stays(text):
    assert scrub(text) == text


def test_the_command(saved, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    arguments = ["card", str(saved), "--results", str(tmp_path / "results.json"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--repo-id", "me/model", "--dataset", "me/data"])
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "out" / "README.md") in done.output
    assert ModelCard.load(tmp_path / "out" / "README.md").data.datasets == ["me/data"]
    for wrong in (tmp_path / "nothing.json", saved / "model.safetensors"):
        refused = CliRunner().invoke(app, ["card", str(saved), "--results", str(wrong)])
        assert refused.exit_code == 2
    assert CliRunner().invoke(app, ["card", str(tmp_path / "nothing")]).exit_code == 2


def test_a_missing_value_reads_not_measured_and_numbers_align():
    text = table(["name", "value"], [("a", 1_234), ("b", None), ("c", 0.5)])
    assert text.split("\n") == [
        "| name | value |",
        "| --- | ---: |",
        "| a | 1,234 |",
        f"| b | {NOT_MEASURED} |",
        "| c | 0.500 |",
    ]


@pytest.mark.parametrize("text", ["plain", "```", "a````b", "`"])
def test_a_fence_is_longer_than_any_in_the_text(text):
    opening, *_, closing = fenced(text).split("\n")
    assert closing not in text
    assert opening == closing + "text"


def test_without_jinja_the_extra_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "hf-moe\[recipes\]"'):
        model_card(saved)
