"""Tasks of lm-evaluation-harness by name, pattern or YAML file, with near names for one that does not exist.

The only file that reaches into lm-eval's private modules (0.4.13): a task factory of ours builds the tasks, so that
their data can come from a folder. Nothing of lm-eval is changed.
"""

import hashlib
import inspect
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from jinja2 import TemplateError
from lm_eval import tasks as harness_tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.local_data import on_local_data
from hf_moe.evaluation.plan import SEED
from hf_moe.evaluation.results import HARNESS

# what a task's file, its code and its data can raise while it is built
BUILD_ERRORS = (
    AttributeError,
    DatasetsError,
    ImportError,
    KeyError,
    OSError,
    TemplateError,
    TypeError,
    ValueError,
    yaml.YAMLError,
)


@dataclass(frozen=True)
class Origin:
    """Source of a task.

    Attributes:
        dataset: `dataset_path` of the unmodified config.
        config: Its `dataset_name`.
        definition: `HARNESS` for one of lm-eval's own, unmodified; otherwise the name of its file.
        sha256: Of the config as it was read: prompts, filters, metrics, and the functions that it names.
    """

    dataset: str | None
    config: str | None
    definition: str
    sha256: str


class Tasks:
    """The tasks and groups of one evaluation.

    Args:
        names: Names of tasks, groups or tags of lm-eval, patterns of them (`mmlu_*`), or YAML files.
        data_root: Folder with local copies of the data sets; None loads them as lm-eval does.
        num_fewshot: Few-shot examples that will be asked for; decides which splits a copy must hold.
        seed: Of numpy's and torch's generators while a task is built; Python's gets 0, as in lm-eval.

    Attributes:
        tasks: lm-eval's tasks by name, with their data loaded.
        groups: lm-eval's groups by name.
        origins: `Origin` by task.

    Raises:
        EvaluationError: For an unknown task, or data that is not there.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        data_root: Path | None = None,
        num_fewshot: int | None = None,
        seed: int = SEED,
    ):
        if data_root is not None and not data_root.is_dir():
            raise EvaluationError(f"the data root {str(data_root)!r} is not a folder. Check --data-root.")
        self.manager = TaskManager(include_defaults=not all(map(_is_task_file, names)))
        factory = _Factory(data_root, num_fewshot, seed)
        self.manager._factory = factory
        # a task that two names stand for runs once
        found = dict.fromkeys(task for name in names for task in self._resolve(name))
        try:
            loaded = self.manager.load([self._spec(name) for name in found])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, EvaluationError):
                raise
            raise EvaluationError(f"the tasks {', '.join(found)} cannot be loaded: {error}") from error
        self.tasks, self.groups = loaded["tasks"], loaded["groups"]
        self.origins = factory.origins

    def _resolve(self, name: str) -> list[str]:
        """The registered names or the file that a user's name stands for."""
        known = self.manager.all_tasks
        if name in known or Path(name).is_file():
            return [name]
        if found := self.manager.match_tasks([name]):
            return found
        if Path(name).suffix in (".yaml", ".yml"):
            raise EvaluationError(f"the task file {name!r} does not exist. Check the path.")
        near = get_close_matches(name, known, n=3)
        hint = f"Did you mean {', '.join(map(repr, near))}?" if near else "`lm_eval ls tasks` lists them."
        raise EvaluationError(f"unknown task {name!r}. {hint}")

    def _spec(self, name: str) -> Any:
        """Form of a name that lm-eval's manager takes; of a group's file, which it does not take, the group itself."""
        if not _is_file_of_group(name):
            return name
        entry = TaskIndex.entry_from_config(load_yaml(name))
        return self.manager._factory.build(entry, registry=self.manager.task_index)


def _is_file_of_group(name: str) -> bool:
    if not _is_file(name):
        return False
    try:
        return "group" in load_yaml(name, resolve_func=False)
    except BUILD_ERRORS as error:
        raise EvaluationError(f"the task file {name!r} cannot be read: {error}") from error


def _is_task_file(name: str) -> bool:
    """True for a file of one task: a group's may name registered tasks."""
    return _is_file(name) and not _is_file_of_group(name)


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


class _Factory(TaskFactory):
    """Builds tasks whose data lie below a folder, and remembers where they came from."""

    def __init__(self, data_root: Path | None, num_fewshot: int | None, seed: int):
        super().__init__()
        self.data_root, self.num_fewshot, self.seed = data_root, num_fewshot, seed
        self.origins: dict[str, Origin] = {}

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        # some tasks draw as they read their data (GPQA shuffles the choices): each as if it were the only one
        seed_generators(self.seed)
        try:
            return super()._build_task(entry, overrides)
        except EvaluationError:
            raise
        except (ConnectionError, DatasetNotFoundError) as error:
            where = "the folder given with --data-root" if self.data_root is None else str(self.data_root)
            raise EvaluationError(
                f"the data of the task {entry.name!r} cannot be loaded from the Hub: {error}. Put a copy of it into "
                f"{where}, as <owner>/<dataset>/<config>/<split>.jsonl with the data set's README.md."
            ) from error
        except BUILD_ERRORS as error:
            what = f"{type(error).__name__}: {error}"
            raise EvaluationError(f"the task {entry.name!r} cannot be loaded: {what}") from error

    def _build_group_members(
        self, member_list: list[Any], group_name: str, overrides: Any, registry: dict[str, Entry]
    ) -> list[Any]:
        """Build a group's tasks as lm-eval does, but those that its file describes itself like all others."""
        named = []
        for item in member_list:
            if isinstance(item, dict) and "task" in item and item["task"] not in registry:
                item = {**item, "task": f"{group_name}::{item['task']}"}
                registry[item["task"]] = Entry(item["task"], Kind.TASK, yaml_path=None, cfg=item)
            named.append(item)
        return super()._build_group_members(named, group_name, overrides, registry)

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        if TaskIndex._kind_of(config) is Kind.GROUP:
            return config
        own = super()._load_full_config(entry, None) if overrides else config
        self.origins[config["task"]] = Origin(
            config.get("dataset_path"),
            config.get("dataset_name"),
            _definition(entry.yaml_path, is_changed=_digest(own) != _digest(config)),
            _digest(config),
        )
        if self.data_root is None:
            return config
        return on_local_data(config, self.data_root.resolve(), self.num_fewshot)


def seed_generators(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators as lm-eval's `simple_evaluate` does."""
    random.seed(0)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _definition(file: Path | None, *, is_changed: bool) -> str:
    if file is None:
        return "inline"
    if is_changed:
        return f"{file.name}, changed by its group"
    return HARNESS if file.is_relative_to(Path(harness_tasks.__file__).parent) else file.name


def _digest(config: Mapping[str, Any]) -> str:
    metadata = config.get("metadata") or {}
    # config_source is a path of this machine
    kept = {**config, "metadata": {key: value for key, value in metadata.items() if key != "config_source"}}
    text = json.dumps(kept, sort_keys=True, default=_source)
    return hashlib.sha256(text.encode()).hexdigest()


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return re.sub(r" at 0x[0-9a-f]+", "", str(value))
