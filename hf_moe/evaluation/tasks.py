"""Tasks of lm-evaluation-harness by name, pattern or YAML file, with near names for one that does not exist.

The only file that reaches into lm-eval's private modules (0.4.13): a task factory of ours builds the tasks, so that
their data can come from a folder. Nothing of lm-eval is changed.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.local_data import on_local_data

ORIGIN = ("dataset_path", "dataset_name")


class Tasks:
    """The tasks and groups of one evaluation.

    Args:
        names: Names of tasks, groups or tags of lm-eval, patterns of them (`mmlu_*`), or YAML files.
        data_root: Folder with local copies of the data sets; None loads them as lm-eval does.
        num_fewshot: Few-shot examples that will be asked for; decides which splits a copy must hold.

    Attributes:
        tasks: lm-eval's tasks by name, with their data loaded.
        groups: lm-eval's groups by name.
        origins: By task, `dataset_path` and `dataset_name` of its unmodified config.

    Raises:
        EvaluationError: For an unknown task, or data that is not there.
    """

    def __init__(self, names: Sequence[str], *, data_root: Path | None = None, num_fewshot: int | None = None):
        if data_root is not None and not data_root.is_dir():
            raise EvaluationError(f"the data root {str(data_root)!r} is not a folder. Check --data-root.")
        self.manager = TaskManager(include_defaults=not all(map(_is_task_file, names)))
        factory = _Factory(data_root, num_fewshot)
        self.manager._factory = factory
        # a task that two names stand for runs once
        found = dict.fromkeys(task for name in names for task in self._resolve(name))
        loaded = self._load(list(found), data_root)
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

    def _load(self, names: list[str], data_root: Path | None) -> dict[str, Any]:
        from datasets.exceptions import DatasetNotFoundError

        try:
            return self.manager.load([self._spec(name) for name in names])
        except EvaluationError:
            raise
        except (ConnectionError, DatasetNotFoundError) as error:
            where = "the folder given with --data-root" if data_root is None else f"{data_root}"
            raise EvaluationError(
                f"the data cannot be loaded from the Hub: {error}. Put a copy of it into {where}, as "
                "<owner>/<dataset>/<config>/<split>.jsonl with the data set's README.md."
            ) from error
        except (KeyError, ValueError, TypeError) as error:
            raise EvaluationError(f"the tasks {', '.join(names)} cannot be loaded: {error}") from error

    def _spec(self, name: str) -> Any:
        """What lm-eval's manager takes; of a group's file, which it cannot take, the group that it describes."""
        if not _is_file_of_group(name):
            return name
        entry = TaskIndex.entry_from_config(load_yaml(name))
        return self.manager._factory.build(entry, registry=self.manager.task_index)


def _is_file_of_group(name: str) -> bool:
    return _is_file(name) and "group" in load_yaml(name, resolve_func=False)


def _is_task_file(name: str) -> bool:
    """Whether this is a file of one task: a group's may name registered tasks."""
    return _is_file(name) and not _is_file_of_group(name)


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


class _Factory(TaskFactory):
    """Builds tasks whose data lie below a folder, and remembers where they came from."""

    def __init__(self, data_root: Path | None, num_fewshot: int | None):
        super().__init__()
        self.data_root, self.num_fewshot = data_root, num_fewshot
        self.origins: dict[str, dict[str, Any]] = {}

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        if TaskIndex._kind_of(config).name == "GROUP":
            return config
        self.origins[config["task"]] = {key: config.get(key) for key in ORIGIN}
        if self.data_root is None:
            return config
        return on_local_data(config, self.data_root.resolve(), self.num_fewshot)
