"""One evaluation: tasks and domains, one after the other, into `results.json`; interrupted, the same call continues.

Each task is an lm-eval run of its own, so its figures depend on nothing but itself: they are those of
`lm_eval.simple_evaluate(HFLM(model), tasks=[task])`, to the digit. (Several tasks in one such call share batches, and
padding changes the last digits.)
"""

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate as harness_evaluate
from rich.console import Console
from transformers import PreTrainedModel

from hf_moe.evaluation.domains import documents_sha256, measure_domain, read_domains
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.expert_figures import count_expert_use
from hf_moe.evaluation.harness import HfMoeLM
from hf_moe.evaluation.local_data import data_record, file_sha256
from hf_moe.evaluation.masked_experts import masked_figures, refusal
from hf_moe.evaluation.model_facts import model_facts
from hf_moe.evaluation.results import (
    FORMAT,
    NAME,
    check_results,
    finite,
    harness_identity,
    harness_metrics,
    versions,
)
from hf_moe.evaluation.samples import Sample, harness_samples, write_samples
from hf_moe.evaluation.tasks import Tasks
from hf_moe.training.checkpoints import write_json
from hf_moe.training.stages import ResumableRun

# lm-eval's own defaults: Python's generator gets 0, the others 1234
SEED = 1234


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, and how.

    Attributes:
        model: A folder, a name on the Hub, or a loaded model.
        tasks: Names, groups, tags or patterns of lm-eval, or YAML files of tasks.
        domains: Files of text for bits per byte, see `hf_moe.evaluation.domains.read_domains`.
        adapter: A PEFT adapter's folder or name.
        data_root: Folder with local copies of the tasks' data, see `hf_moe.evaluation.local_data`.
        limit: Documents of each task, from the first; below 1 a share of them; None takes all.
        num_fewshot: Few-shot examples; None leaves each task's own number.
        generation: Options of generation tasks that replace the task's (`{"max_gen_toks": 64}`).
        chat_template: Whether prompts go through the tokenizer's chat template.
        batch_size: A number, or "auto" for the largest that fits.
        seed: Of numpy's and torch's generators and of few-shot draws.
        mask_experts: So many of the most used experts of each task and domain are masked, one at a time.
        mask_limit: Documents of each masked run, from the first.
        window: Tokens that the model sees at once in a domain; None takes its context, at most 1,024.
        stride: By how much windows advance; None takes half of them.
        bootstrap_iters: Of lm-eval's standard error where a metric has no formula.
        run_unsafe_code: Allow tasks that run the code that the model writes.
        options: Of `HfMoeLM`: `experts_implementation`, `device`, `dtype`, `tokenizer`, `max_length`, ...

    Raises:
        EvaluationError: If a number is out of range, or there is nothing to do.
    """

    model: str | PreTrainedModel
    tasks: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    adapter: str | None = None
    data_root: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    chat_template: bool = False
    batch_size: int | str = "auto"
    seed: int = SEED
    mask_experts: int = 2
    mask_limit: int = 50
    window: int | None = None
    stride: int | None = None
    bootstrap_iters: int = 100_000
    run_unsafe_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks and not self.domains:
            raise EvaluationError("there is nothing to evaluate. Name tasks (--tasks arc_easy,gsm8k) or --domains.")
        if self.limit is not None and not 0 < self.limit < float("inf"):
            raise EvaluationError(f"--limit must be above 0, got {self.limit}. Leave it out to take every document.")
        lowest = {"num_fewshot": 0, "mask_experts": 0, "mask_limit": 2, "seed": 0, "bootstrap_iters": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"--{name.replace('_', '-')} must be {least} or more, got {value}.")

    def settings(self) -> dict[str, Any]:
        """What changes the figures and is neither the model nor the data, as JSON values."""
        names = ("limit", "num_fewshot", "chat_template", "mask_experts", "mask_limit", "bootstrap_iters")
        return {**{name: getattr(self, name) for name in names}, "generation": dict(self.generation)}


def evaluate(evaluation: Evaluation, output: Path, *, command: str = "") -> dict[str, Any]:
    """Run everything, and write `results.json` and the samples into `output`.

    Tasks that finished in an earlier call with the same arguments, model and data are not run again.

    Args:
        command: How the evaluation was called, for the record.

    Returns:
        What `results.json` holds.

    Raises:
        EvaluationError: For an unknown task or data that is not there; before anything runs.
        RunRefusedError: If `output` holds something else, or an evaluation of something else.
        OSError, ValueError: If the model cannot be loaded.
    """
    for what, name in (("model", evaluation.model), ("adapter", evaluation.adapter)):
        if isinstance(name, str) and name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise EvaluationError(f"the {what} folder {name!r} does not exist. Check the path.")
    tasks = Tasks(evaluation.tasks, data_root=evaluation.data_root, num_fewshot=evaluation.num_fewshot)
    domains = read_domains(evaluation.domains)
    lm = HfMoeLM(evaluation.model, adapter=evaluation.adapter, batch_size=evaluation.batch_size, **evaluation.options)
    for task in tasks.tasks.values():
        prepare(task, evaluation)
    return _Run(evaluation, tasks, domains, lm, command).into(output)


def prepare(task: Any, evaluation: Evaluation) -> None:
    """Settings of a task that lm-eval's `simple_evaluate` would make."""
    if evaluation.generation and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(evaluation.generation), update=True)
    own = task.get_config("num_fewshot")
    if evaluation.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=evaluation.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def score(lm: HfMoeLM, name: str, task: Any, evaluation: Evaluation, limit: float | None) -> dict[str, Any]:
    """lm-eval's results of one task, from the same state of every random generator each time."""
    random.seed(0)
    np.random.seed(evaluation.seed)
    torch.manual_seed(evaluation.seed)
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


class _Run:
    """The stages of one evaluation."""

    def __init__(
        self, evaluation: Evaluation, tasks: Tasks, domains: Mapping[str, list[str]], lm: HfMoeLM, command: str
    ):
        self.evaluation, self.tasks, self.domains, self.lm = evaluation, tasks, domains, lm
        self.command = command
        self.facts = model_facts(lm, evaluation.model, evaluation.adapter)
        self.data = {name: data_record(task.config.to_dict(), tasks.origins[name]) for name, task in self._items()}
        self.unmaskable = refusal(lm) if evaluation.mask_experts else None
        context = min(lm.max_length, 1024)
        self.window = evaluation.window or context
        self.stride = evaluation.stride or max(1, self.window // 2)

    def _items(self) -> list[tuple[str, Any]]:
        return list(self.tasks.tasks.items())

    def into(self, output: Path) -> dict[str, Any]:
        with ResumableRun(output, "evaluation", self._identity()) as run:
            tasks = {name: self._stage(run, name, partial(self._task, name, output)) for name, _ in self._items()}
            domains = {
                name: self._stage(run, f"domain-{name}", partial(self._domain, name, output)) for name in self.domains
            }
            results = self._results(tasks, domains)
            check_results(results, str(output / NAME))
            write_json(output / NAME, results)
        return results

    def _stage(self, run: ResumableRun, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        done = run.finished(name)
        entry = run.stage(name, work, leaves=(_samples_path(name),))
        figures = ", ".join(f"{key} {_shown(figure)}" for key, figure in entry["metrics"].items())
        said = f"{name}: {figures}{' (from the earlier call)' if done else ''}"
        Console(soft_wrap=True).print(said, highlight=False, markup=False)
        return entry

    def _identity(self) -> dict[str, Any]:
        """What makes two calls one evaluation."""
        texts = {name: documents_sha256(documents) for name, documents in self.domains.items()}
        data = json.dumps([self.data, texts], sort_keys=True)
        return {
            "tasks": list(self.tasks.tasks),
            "groups": list(self.tasks.groups),
            "domains": list(self.domains),
            "data": hashlib.sha256(data.encode()).hexdigest(),
            "seed": self.evaluation.seed,
            "batch_size": self.lm.batch_size,
            "window": [self.window, self.stride] if self.domains else None,
            "device": str(self.lm.device),
            **self.evaluation.settings(),
            **{f"model {key}": value for key, value in self.facts.items()},
            **versions(),
        }

    def _task(self, name: str, output: Path) -> dict[str, Any]:
        task = self.tasks.tasks[name]
        self.lm.clear_work()
        begin = time.perf_counter()
        with count_expert_use(self.lm) as use:
            found = score(self.lm, name, task, self.evaluation, self.evaluation.limit)
        seconds = time.perf_counter() - begin
        work = self.lm.work
        samples = harness_samples(found["samples"][name])
        count = found["n-samples"][name]
        one_filter = [sample["doc"] for sample in samples if sample["filter"] == samples[0]["filter"]]

        def masked_samples(limit: int) -> list[Sample]:
            return harness_samples(score(self.lm, name, task, self.evaluation, limit)["samples"][name])

        return {
            "version": found["versions"][name],
            "num_fewshot": found["n-shot"][name],
            "num_samples": count["effective"],
            "num_available": count["original"],
            "metrics": harness_metrics(found["results"][name], found["higher_is_better"][name]),
            "data": self.data[name],
            "documents_sha256": documents_sha256(one_filter),
            "truncated_prompts": work.truncated,
            **self._save(output, name, samples),
            "seconds": seconds,
            "speed": speed(work, seconds, count["effective"]),
            "experts": self._experts(use.figures(), samples, masked_samples),
        }

    def _domain(self, name: str, output: Path) -> dict[str, Any]:
        def measured(documents: list[str]) -> tuple[dict[str, Any], list[Sample]]:
            self.lm.input_mask = None
            return measure_domain(self.lm.model, self.lm.tokenizer, documents, window=self.window, stride=self.stride)

        documents = self.domains[name]
        begin = time.perf_counter()
        with count_expert_use(self.lm) as use:
            figures, samples = measured(documents)
        seconds = time.perf_counter() - begin
        experts = self._experts(use.figures(), samples, lambda limit: measured(documents[:limit])[1])
        tokens = {"seconds": seconds, "tokens_per_second": figures["tokens"] / seconds}
        return {**figures, **self._save(output, f"domain-{name}", samples), **tokens, "experts": experts}

    def _experts(
        self, layers: list[dict[str, Any]], samples: list[Sample], again: Callable[[int], list[Sample]]
    ) -> dict[str, Any] | None:
        if not layers:
            return None
        experts: dict[str, Any] = {"layers": layers, "masked": [], "masked_refused": self.unmaskable}
        if self.unmaskable is None:
            experts["masked"] = masked_figures(
                self.lm, layers, samples, again, count=self.evaluation.mask_experts, limit=self.evaluation.mask_limit
            )
        return experts

    def _save(self, output: Path, name: str, samples: list[Sample]) -> dict[str, str]:
        path = output / _samples_path(name)
        write_samples(path, samples)
        return {"samples": _samples_path(name), "samples_sha256": file_sha256(path)}

    def _results(self, tasks: dict[str, Any], domains: dict[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "date": date.today().isoformat(),
            "command": self.command,
            "model": self.facts,
            "harness": harness_identity(),
            "versions": versions(),
            "device": device_name(self.lm.device),
            "seeds": {"random": 0, **dict.fromkeys(("numpy", "torch", "fewshot"), self.evaluation.seed)},
            "settings": {**self.evaluation.settings(), "batch_size": self.lm.batch_size},
            "tasks": tasks,
            "groups": {name: self._group(name, tasks) for name in self.tasks.groups},
            "domains": domains,
        }

    def _group(self, name: str, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """lm-eval's own aggregation of a group's tasks."""
        raw = {}
        for task, entry in tasks.items():
            raw[task] = {"alias": task, "sample_len": entry["num_samples"]}
            for key, figure in entry["metrics"].items():
                raw[task][key] = float("nan") if figure["value"] is None else figure["value"]
                raw[task]["_stderr,".join(key.split(",", 1))] = "N/A" if figure["stderr"] is None else figure["stderr"]
        group = self.tasks.groups[name]
        found = dict(group.aggregate(raw))
        return {
            "tasks": [task.task_name for task in group.get_all_tasks()],
            "num_samples": found.get("sample_len"),
            "metrics": harness_metrics(found, {}),
        }


def speed(work: Any, seconds: float, documents: int) -> dict[str, Any]:
    """Tokens without padding, and times; with the hooks that count expert use, which cost little."""

    def rate(tokens: int, spent: float) -> float | None:
        return finite(tokens / spent) if tokens and spent else None

    return {
        "seconds_per_document": seconds / documents,
        "scored_tokens": work.scored_tokens,
        "scored_tokens_per_second": rate(work.scored_tokens, work.scored_seconds),
        "seconds_per_forward": work.scored_seconds / work.forwards if work.forwards else None,
        "generated_tokens": work.generated_tokens,
        "generated_tokens_per_second": rate(work.generated_tokens, work.generated_seconds),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _samples_path(stage: str) -> str:
    # a task of a YAML file may be called anything
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in stage).lstrip(".")
    return f"samples/{safe}.jsonl"


def _shown(figure: Mapping[str, Any]) -> str:
    value = "not finite" if figure["value"] is None else f"{figure['value']:.4f}"
    return value if figure["stderr"] is None else f"{value} ± {figure['stderr']:.4f}"
