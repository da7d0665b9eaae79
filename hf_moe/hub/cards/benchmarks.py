"""Results files for the Hub's leaderboards: of benchmarks run in full, unmodified, on the Hub's data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from hf_moe.hub.cards.facts import tables, take
from hf_moe.hub.cards.markdown import plain

HARNESS = "lm-evaluation-harness"
HARNESS_URL = "https://github.com/EleutherAI/lm-evaluation-harness"
_HUB_FILE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)@([0-9a-f]{40})/", re.ASCII)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the Hub, and the metric of lm-eval that it takes.

    Attributes:
        dataset: Data set on the Hub that declares itself a benchmark: it holds an eval.yaml.
        task_id: Of its leaderboard, as eval.yaml names it.
        metric: "metric,filter" of lm-eval.
        num_fewshot: Of the task in lm-eval.
        split: That is scored.
        documents: In that split.
    """

    dataset: str
    task_id: str
    metric: str
    num_fewshot: int
    split: str
    documents: int


# By the task or group of lm-eval; a further benchmark is an entry here. Of those that the Hub names first, GPQA has
# several tasks in lm-eval and none that is the benchmark, and HLE has none.
# Source: the Hub's docs/hub/eval-results.md, and "Supported Benchmarks" of github.com/huggingface/community-evals.
BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "gsm8k", "exact_match,strict-match", 5, "test", 1_319),
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match,custom-extract", 5, "test", 12_032),
}


def eval_files(results: Mapping[str, Any]) -> dict[str, str]:
    """`.eval_results/NAME.yaml` by path, of the benchmarks whose result may go there."""
    return {f".eval_results/{name}.yaml": _file(results, name) for name in _ran(results) if not refusal(results, name)}


def eval_refusals(results: Mapping[str, Any]) -> dict[str, str]:
    """Reasons, by benchmark that ran, why its result may not go there."""
    found = {name: refusal(results, name) for name in _ran(results)}
    return {name: reason for name, reason in found.items() if reason is not None}


def refusal(results: Mapping[str, Any], name: str) -> str | None:
    """Reason why a result of `BENCHMARKS[name]` does not count as the benchmark's; None if it does."""
    benchmark, tasks = BENCHMARKS[name], _tasks(results, name)
    if reason := _changed(take(results, "settings", dict)):
        return reason
    for task in tasks:
        if reason := _not_whole(task, benchmark):
            return reason
    count = sum(take(task, "num_samples", int) or 0 for task in tasks)
    if count != benchmark.documents:
        return f"{count:,} documents ran, and the benchmark has {benchmark.documents:,}"
    if len({revision(task) for task in tasks}) != 1:
        return "its tasks read different revisions of the data"
    return "it has no value" if _value(results, name) is None else None


def _ran(results: Mapping[str, Any]) -> list[str]:
    return [name for name in BENCHMARKS if _tasks(results, name)]


def _tasks(results: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The task itself, or those of the group."""
    tasks, group = tables(results, "tasks"), tables(results, "groups").get(name)
    names = [name] if group is None else take(group, "tasks", list) or []
    return [tasks[each] for each in names if isinstance(each, str) and each in tasks]


def _changed(settings: dict[str, Any] | None) -> str | None:
    if settings is None:
        return "the results do not say how it was run"
    if settings.get("limit") is not None:
        return "only a part of its documents ran (--limit)"
    if settings.get("generation"):
        return "its generation options were changed (--generation)"
    if settings.get("chat_template"):
        return "its prompts were written as a chat (--chat-template)"
    return None


def _not_whole(task: Mapping[str, Any], benchmark: Benchmark) -> str | None:
    count, available = take(task, "num_samples", int), take(task, "num_available", int)
    shots, cut = take(task, "num_fewshot", int), take(task, "truncated_prompts", int)
    source = take(task, "data.dataset", str), take(task, "data.split", str)
    if take(task, "definition", str) != HARNESS:
        return f"it was not lm-eval's own task but {take(task, 'definition', str)!r}"
    if count is None or count != available:
        return f"{count} of {available} documents ran"
    if shots != benchmark.num_fewshot:
        return f"it ran with {shots} few-shot examples in place of {benchmark.num_fewshot}"
    if cut != 0:
        return f"{cut} prompts did not fit the model's context"
    if source != (benchmark.dataset, benchmark.split):
        return f"it read {source[0]}, {source[1]}, in place of {benchmark.dataset}, {benchmark.split}"
    if revision(task) is None:
        return "its data came from files without a revision on the Hub (--data-root)"
    return None


def _value(results: Mapping[str, Any], name: str) -> float | None:
    entry = tables(results, "groups").get(name) or tables(results, "tasks").get(name)
    # names of metrics hold no dots, but filters may
    return take((take(entry, "metrics", dict) or {}).get(BENCHMARKS[name].metric), "value", float)


def _file(results: Mapping[str, Any], name: str) -> str:
    benchmark = BENCHMARKS[name]
    entry = EvalResultEntry(
        dataset_id=benchmark.dataset,
        task_id=benchmark.task_id,
        # the leaderboards count in percent
        value=round(100 * (_value(results, name) or 0), 4),
        dataset_revision=revision(_tasks(results, name)[0]),
        date=take(results, "date", str),
        source_name=source(results),
        source_url=HARNESS_URL,
        notes=f"{name}: {benchmark.metric}, {benchmark.num_fewshot}-shot, n={benchmark.documents}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def source(results: Mapping[str, Any]) -> str:
    """The harness and its version."""
    return plain(f"{HARNESS} {take(results, 'harness.version', str) or ''}").strip()


def revision(task: Mapping[str, Any]) -> str | None:
    """The commit of the data set that the files came from; None for local files and several commits."""
    matches = [_HUB_FILE.match(str(file)) for file in take(task, "data.hub_files", list) or []]
    commits = {match[2] if match and match[1] == take(task, "data.dataset", str) else None for match in matches}
    return commits.pop() if len(commits) == 1 else None
