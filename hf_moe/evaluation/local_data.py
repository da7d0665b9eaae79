"""Standard tasks on local copies of their data, in the Hub's layout: `ROOT/<owner>/<dataset>/README.md` and its files.

A copy is what the Hub itself holds (`hf download --repo-type dataset OWNER/NAME --local-dir ROOT/OWNER/NAME`), or the
splits that a task reads, as `<config>/<split>.jsonl` with a README.md that lists them:

    ---
    configs:
    - config_name: ARC-Easy
      data_files:
      - split: test
        path: ARC-Easy/test.jsonl
    ---

Only where the data lie is changed, and the names of splits that a task declares but this evaluation does not read and
the copy does not hold. Prompts, few-shot draws, filters and metrics stay the task's own.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hf_moe.evaluation.errors import EvaluationError

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
# builders of `datasets` that read files which the task itself names
FILE_BUILDERS = ("arrow", "csv", "json", "pandas", "parquet", "text")


def scored_split(config: Mapping[str, Any]) -> str | None:
    """The split whose documents are scored: lm-eval takes the test split, or else the validation split."""
    return config.get("test_split") or config.get("validation_split")


def fewshot_split(config: Mapping[str, Any]) -> str | None:
    """The split that few-shot examples are drawn from, by lm-eval's rule; None if the task holds its own examples."""
    own = config.get("fewshot_config") or {}
    if split := config.get("fewshot_split") or own.get("split"):
        return split
    if own.get("samples") is not None:
        return None
    return config.get("training_split") or config.get("validation_split") or config.get("test_split")


def shots(config: Mapping[str, Any], asked: int | None) -> int:
    """Few-shot examples: those asked for, but a task that says 0 stays at 0 (lm-eval's rule)."""
    own = config.get("num_fewshot")
    return own or 0 if asked is None or own == 0 else asked


def on_local_data(config: Mapping[str, Any], root: Path, num_fewshot: int | None) -> dict[str, Any]:
    """The config of a task, with its data below `root`.

    A task that names files of its own, or an existing folder, keeps them.

    Args:
        config: A task's whole config, as lm-eval builds it.
        num_fewshot: As asked for; None leaves the task's own number.

    Raises:
        EvaluationError: If the copy is missing, cannot be read, or lacks a split that this evaluation reads.
    """
    name = config.get("task")
    if "class" in config or callable(config.get("custom_dataset")):
        raise EvaluationError(
            f"the task {name!r} loads its data with code of its own, so that a local copy cannot stand in. Run it "
            "without --data-root."
        )
    path = config["dataset_path"]
    if path in FILE_BUILDERS or (Path(path).is_absolute() and Path(path).exists()):
        return dict(config)
    folder = root / path
    found = _files_by_split(folder, config)
    needed = [scored_split(config), fewshot_split(config) if shots(config, num_fewshot) else None]
    if missing := [split for split in needed if split is not None and split not in found]:
        raise EvaluationError(
            f"the task {name!r} reads the split {missing[0]!r} of {path}; the local copy has {', '.join(found)}. "
            f"Put it at {_expected(folder, config, missing[0])} and list it in {folder / 'README.md'}."
        )
    return _without_absent_splits({**config, "dataset_path": str(folder)}, found)


def _files_by_split(folder: Path, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Absolute paths of the copy's files, by split."""
    name, path = config.get("dataset_name"), config["dataset_path"]
    where = _expected(folder, config, scored_split(config) or "test")
    if not folder.is_dir():
        raise EvaluationError(
            f"the data of the task {config.get('task')!r} ({path}{f', config {name}' if name else ''}) must lie at "
            f"{where}, with a README.md in {folder} that lists it; that folder does not exist. Put the files there, "
            "or leave out --data-root to load them from the Hub."
        )
    try:
        return files_by_split(str(folder), name, config.get("dataset_kwargs"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"the local copy of {path} in {folder} cannot be read: {error}. Put the data of the task "
            f"{config.get('task')!r} at {where}, and list it under `configs:` in {folder / 'README.md'}."
        ) from error


def files_by_split(path: str, name: str | None, options: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Files that `load_dataset(path, name, **options)` would read: local paths, or `hf://` addresses with revision."""
    from datasets import load_dataset_builder

    known = {key: value for key, value in (options or {}).items() if key != "trust_remote_code"}
    files = load_dataset_builder(path, name, **known).config.data_files or {}
    return {str(split): [str(file) for file in listed] for split, listed in files.items()}


def _expected(folder: Path, config: Mapping[str, Any], split: str) -> Path:
    return folder / (config.get("dataset_name") or "default") / f"{split}.jsonl"


def _without_absent_splits(config: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval opens every split that a config names, also those that it does not use."""
    for key in SPLITS:
        if config.get(key) not in found:
            config[key] = None
    own = config.get("fewshot_config")
    if own and own.get("split") is not None and own["split"] not in found:
        config["fewshot_config"] = {**own, "split": None}
    return config


def data_record(config: Mapping[str, Any], dataset: str | None, name: str | None) -> dict[str, Any]:
    """Record of the data that a task reads, as JSON values.

    Args:
        config: The task's config as it ran, with its final number of few-shot examples.
        dataset: `dataset_path` of the unmodified config.
        name: Its `dataset_name`.

    Returns:
        The data set, its config and the splits that were read, and their files: of local ones the SHA-256 by the path
        below the data set's folder, of others the address on the Hub, which holds the revision.
    """
    splits = {"split": scored_split(config), "fewshot_split": None}
    if config.get("num_fewshot"):
        splits["fewshot_split"] = fewshot_split(config)
    record = {"dataset": dataset, "config": name, **splits}
    if config.get("custom_dataset") is not None or not config.get("dataset_path"):
        return {**record, "sha256": {}, "hub_files": []}
    found = files_by_split(config["dataset_path"], config.get("dataset_name"), config.get("dataset_kwargs"))
    files = sorted({file for split in splits.values() if split is not None for file in found.get(split, [])})
    folder = Path(config["dataset_path"])
    local = {_below(Path(file), folder): file_sha256(Path(file)) for file in files if Path(file).is_file()}
    return {**record, "sha256": local, "hub_files": [file for file in files if not Path(file).is_file()]}


def _below(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name


def file_sha256(path: Path) -> str:
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
