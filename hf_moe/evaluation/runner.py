"""Run an evaluation: tasks and domains, one after the other, into `results.json`; interrupted, the same call resumes.

Each task is an lm-eval run of its own, so its metrics depend on nothing but itself. (Several tasks in one such call
share batches, and padding changes the last digits.)
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from hf_moe.data.chat_text import read_chat_template
from hf_moe.data.documents import read_domains
from hf_moe.evaluation.domains import documents_sha256
from hf_moe.evaluation.harness import HfMoeLM
from hf_moe.evaluation.local_data import data_record
from hf_moe.evaluation.measure import Measure, samples_path
from hf_moe.evaluation.model_facts import model_facts
from hf_moe.evaluation.plan import Evaluation
from hf_moe.evaluation.results import FORMAT, NAME, check_results, harness_identity, versions
from hf_moe.evaluation.scoring import group_entry, prepare
from hf_moe.evaluation.tasks import Tasks
from hf_moe.experts.preferred import prefer_hf_moe
from hf_moe.io.console import print_to_stderr
from hf_moe.io.stages import ResumableRun
from hf_moe.io.whole_files import write_json
from hf_moe.loading.pretrained import load_tokenizer
from hf_moe.observability.explain import explain


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
    tasks = Tasks(
        evaluation.tasks,
        data_root=evaluation.data_root,
        num_fewshot=evaluation.num_fewshot,
        seed=evaluation.seed,
    )
    domains = read_domains(evaluation.data, partial(_tokenizer, evaluation), on_bad_row=evaluation.on_bad_row)
    lm = HfMoeLM(evaluation.model, adapter=evaluation.adapter, batch_size=evaluation.batch_size, **evaluation.options)
    if isinstance(evaluation.model, str) and evaluation.options.get("experts_implementation") is None:
        prefer_hf_moe(lm.model)
    if evaluation.template_file is not None:
        lm.tokenizer.chat_template = read_chat_template(evaluation.template_file)
    for warning in explain(lm.model).warnings:
        print_to_stderr(f"warning: {warning}")
    for name, task in tasks.tasks.items():
        prepare(lm, name, task, evaluation)
    return _Run(evaluation, tasks, domains, lm).into(output, command)


def _tokenizer(evaluation: Evaluation) -> PreTrainedTokenizerBase:
    """The one that lm-eval will load."""
    model, options = evaluation.model, evaluation.options
    given = options.get("tokenizer") or (model if isinstance(model, str) else model.name_or_path)
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    tokenizer = load_tokenizer(given, trust_remote_code=bool(options.get("trust_remote_code")))
    if evaluation.template_file is not None:
        tokenizer.chat_template = read_chat_template(evaluation.template_file)
    return tokenizer


class _Run:
    """The stages of one evaluation."""

    def __init__(self, evaluation: Evaluation, tasks: Tasks, domains: Mapping[str, list[str]], lm: HfMoeLM):
        self.evaluation, self.tasks, self.domains, self.lm = evaluation, tasks, domains, lm
        self.facts = model_facts(lm, evaluation.model, evaluation.adapter)
        self.origins = {name: self._origin(name, task) for name, task in tasks.tasks.items()}

    def _origin(self, name: str, task: Any) -> dict[str, Any]:
        """Whose task it is, and on which data."""
        origin = self.tasks.origins[name]
        definition = {"definition": origin.definition, "definition_sha256": origin.sha256}
        return {**definition, "data": data_record(task.config.to_dict(), origin.dataset, origin.config)}

    def into(self, output: Path, command: str) -> dict[str, Any]:
        measure = Measure(self.evaluation, self.lm, output)
        with ResumableRun(output, "evaluation", self._identity(measure)) as run:
            tasks = {
                name: self.origins[name] | _stage(run, name, partial(measure.task, name, task))
                for name, task in self.tasks.tasks.items()
            }
            domains = {
                name: _stage(run, f"domain-{name}", partial(measure.domain, name, documents))
                for name, documents in self.domains.items()
            }
            results = self._results(tasks, domains, command)
            check_results(results, str(output / NAME))
            write_json(output / NAME, results)
        return results

    def _identity(self, measure: Measure) -> dict[str, Any]:
        """Facts by which a later call is the same evaluation."""
        texts = {name: documents_sha256(documents) for name, documents in self.domains.items()}
        data = json.dumps([[origin["data"] for origin in self.origins.values()], texts], sort_keys=True)
        return {
            "tasks": list(self.origins),
            "groups": list(self.tasks.groups),
            "domains": list(self.domains),
            "data": hashlib.sha256(data.encode()).hexdigest()[:12],
            **{f"definition of {name}": origin["definition_sha256"][:12] for name, origin in self.origins.items()},
            "seed": self.evaluation.seed,
            "batch_size": self.lm.batch_size,
            "window": [measure.window, measure.stride] if self.domains else None,
            "device": str(self.lm.device),
            **self.evaluation.settings(),
            **{f"model {key}": value for key, value in self.facts.items()},
            **versions(),
        }

    def _results(self, tasks: dict[str, Any], domains: dict[str, Any], command: str) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "date": date.today().isoformat(),
            "command": command,
            "model": self.facts,
            "harness": harness_identity(),
            "versions": versions(),
            "device": device_name(self.lm.device),
            "seeds": {"random": 0, **dict.fromkeys(("numpy", "torch", "fewshot"), self.evaluation.seed)},
            "settings": {**self.evaluation.settings(), "batch_size": self.lm.batch_size},
            "tasks": tasks,
            "groups": {name: group_entry(group, tasks) for name, group in self.tasks.groups.items()},
            "domains": domains,
        }


def _stage(run: ResumableRun, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run it or take it from an earlier call, and print its metrics."""
    done = run.finished(name)
    entry = run.stage(name, work, leaves=(samples_path(name),))
    metrics = ", ".join(f"{key} {_with_error(metric)}" for key, metric in entry["metrics"].items())
    line = f"{name}: {metrics}{' (from the earlier call)' if done else ''}"
    Console(soft_wrap=True).print(line, highlight=False, markup=False)
    return entry


def _with_error(metric: Mapping[str, Any]) -> str:
    value = "not finite" if metric["value"] is None else f"{metric['value']:.4f}"
    return value if metric["stderr"] is None else f"{value} ± {metric['stderr']:.4f}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
