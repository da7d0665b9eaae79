"""Results go where the Hub's leaderboards look, or the reason why not is given."""

import copy

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from hf_moe.hub.cards.benchmarks import BENCHMARKS, eval_files, eval_refusals

from .card_facts import RESULTS, SHA, task

GSM8K = RESULTS["tasks"]["gsm8k"]
PRO = "exact_match,custom-extract"


def changed(change):
    results = copy.deepcopy(RESULTS)
    target = results if "settings" in change else results["tasks"]["gsm8k"]
    target.update(change)
    return results


def parsed(results, name):
    (entry,) = parse_eval_result_entries(yaml.safe_load(eval_files(results)[f".eval_results/{name}.yaml"]))
    return entry


def test_a_value_is_a_percentage_as_on_the_leaderboards():
    entry = parsed(RESULTS, "gsm8k")
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 12.5)
    assert entry.dataset_revision == SHA
    assert eval_refusals(RESULTS) == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": {"limit": 1319}}, "only a part of its documents ran (--limit)"),
        ({"settings": {"limit": None, "generation": {"max_gen_toks": 8}}}, "generation options were changed"),
        ({"settings": {"limit": None, "chat_template": True}}, "written as a chat (--chat-template)"),
        ({"settings": None}, "do not say how it was run"),
        ({"definition": "gsm8k.yaml"}, "not lm-eval's own task but 'gsm8k.yaml'"),
        ({"definition": None}, "not lm-eval's own task"),
        ({"num_samples": 1318}, "1318 of 1319 documents ran"),
        ({"num_samples": 1318, "num_available": 1318}, "1,318 documents ran, and the benchmark has 1,319"),
        ({"num_fewshot": 4}, "with 4 few-shot examples in place of 5"),
        ({"truncated_prompts": 1}, "1 prompts did not fit"),
        ({"data": GSM8K["data"] | {"hub_files": []}}, "without a revision on the Hub (--data-root)"),
        ({"data": GSM8K["data"] | {"hub_files": ["hf://datasets/me/gsm8k@" + SHA + "/x"]}}, "without a revision"),
        ({"data": GSM8K["data"] | {"dataset": "me/gsm8k"}}, "it read me/gsm8k, test, in place of openai/gsm8k"),
        ({"data": GSM8K["data"] | {"split": "train"}}, "it read openai/gsm8k, train"),
        ({"metrics": {"exact_match,strict-match": {"value": None}}}, "it has no value"),
    ],
    ids=str,
)
def test_part_of_a_benchmark_is_not_the_benchmark(change, reason):
    results = changed(change)
    assert eval_files(results) == {}
    assert reason in eval_refusals(results)["gsm8k"]


def mmlu_pro(*counts, revisions=(SHA, SHA)):
    tasks = {f"part {i}": task("TIGER-Lab/MMLU-Pro", PRO, 0.5) for i in range(len(counts))}
    for entry, count, revision in zip(tasks.values(), counts, revisions, strict=True):
        entry.update(num_samples=count, num_available=count)
        entry["data"]["hub_files"] = [f"hf://datasets/TIGER-Lab/MMLU-Pro@{revision}/data/test.parquet"]
    group = {"tasks": list(tasks), "metrics": {PRO: {"value": 0.25, "stderr": 0.01}}}
    return RESULTS | {"tasks": tasks, "groups": {"mmlu_pro": group}}


def test_a_group_is_a_benchmark_when_all_of_it_ran():
    entry = parsed(mmlu_pro(12_000, 32), "mmlu_pro")
    assert (entry.dataset_id, entry.task_id, entry.value) == ("TIGER-Lab/MMLU-Pro", "mmlu_pro", 25.0)
    assert "the benchmark has 12,032" in eval_refusals(mmlu_pro(12_000, 31))["mmlu_pro"]
    other = mmlu_pro(12_000, 32, revisions=(SHA, SHA[::-1]))
    assert "different revisions" in eval_refusals(other)["mmlu_pro"]


def test_the_table_holds_what_lm_eval_runs():
    tasks = pytest.importorskip("lm_eval.tasks")
    from pathlib import Path

    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(tasks.__file__).parent
    files = {"gsm8k": "gsm8k/gsm8k.yaml", "mmlu_pro": "mmlu_pro/_default_template_yaml"}
    assert files.keys() == BENCHMARKS.keys()
    for name, benchmark in BENCHMARKS.items():
        config = load_yaml(root / files[name], resolve_func=False)
        metric, _, kind = benchmark.metric.partition(",")
        assert (config["dataset_path"], config["test_split"]) == (benchmark.dataset, benchmark.split)
        assert config["num_fewshot"] == benchmark.num_fewshot
        assert metric in {entry["metric"] for entry in config["metric_list"]}
        assert kind in {entry["name"] for entry in config["filter_list"]}
