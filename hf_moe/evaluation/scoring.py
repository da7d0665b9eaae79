"""One task through lm-eval, from the same state of every random generator each time.

The metrics are those of `lm_eval.simple_evaluate(HFLM(model), tasks=[task])`, to the digit.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lm_eval.evaluator import evaluate as harness_evaluate

from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.harness import HfMoeLM
from hf_moe.evaluation.plan import Evaluation
from hf_moe.evaluation.results import harness_metrics
from hf_moe.evaluation.tasks import seed_generators


def prepare(lm: HfMoeLM, name: str, task: Any, evaluation: Evaluation) -> None:
    """Make the settings of a task that lm-eval's `simple_evaluate` would make.

    Raises:
        EvaluationError: If the model cannot run it so: no chat template, no room for a prompt.
    """
    if evaluation.chat_template and lm.tokenizer.chat_template is None:
        raise EvaluationError(
            "the model's tokenizer has no chat template. Leave out --chat-template, or save a tokenizer with one."
        )
    if evaluation.generation and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(evaluation.generation), update=True)
    own = task.get_config("num_fewshot")
    if evaluation.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=evaluation.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    if task.get_config("output_type") == "generate_until":
        lm.prompt_room(name, task.get_config("generation_kwargs") or {})


def score(lm: HfMoeLM, name: str, task: Any, evaluation: Evaluation, limit: float | None) -> dict[str, Any]:
    """lm-eval's results of one task that `prepare` has seen."""
    seed_generators(evaluation.seed)
    task.set_fewshot_seed(seed=evaluation.seed)
    with without_truncation_warnings():
        return harness_evaluate(
            lm,
            {"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=evaluation.bootstrap_iters,
            apply_chat_template=evaluation.chat_template,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=evaluation.run_unsafe_code,
        )


@contextmanager
def without_truncation_warnings() -> Iterator[None]:
    """lm-eval says for every request that its prompt was cut; the results count them."""
    logger = logging.getLogger("lm_eval.models.huggingface")

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(("Combined length of context", "Left truncation applied"))

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def group_entry(group: Any, tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Entry of a group in `results.json`, by lm-eval's own aggregation.

    Args:
        group: Of lm-eval.
        tasks: Results of its tasks, by name.
    """
    raw = {}
    for task, entry in tasks.items():
        raw[task] = {"alias": task, "sample_len": entry["num_samples"]}
        for key, metric in entry["metrics"].items():
            raw[task][key] = float("nan") if metric["value"] is None else metric["value"]
            raw[task]["_stderr,".join(key.split(",", 1))] = "N/A" if metric["stderr"] is None else metric["stderr"]
    found = dict(group.aggregate(raw))
    return {
        "tasks": [task.task_name for task in group.get_all_tasks()],
        "num_samples": found.get("sample_len"),
        "metrics": harness_metrics(found, {}),
    }
