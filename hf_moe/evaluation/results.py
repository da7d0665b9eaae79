"""`results.json`: what an evaluation found, and what is needed to repeat it. Checked when it is read."""

import json
import math
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from hf_moe.evaluation.errors import EvaluationError
from hf_moe.io.json_files import read_json

FORMAT = "hf_moe.evaluation/1"
NAME = "results.json"
HARNESS = "lm-evaluation-harness"
LIBRARIES = ("hf-moe", "torch", "transformers", "peft", "datasets", "lm-eval")

# what every results.json holds, with the type of each; None beside a type: may be null
FIELDS: dict[str, Any] = {
    "date": str,
    "command": str,
    "model": dict,
    "harness": dict,
    "versions": dict,
    "device": str,
    "seeds": dict,
    "settings": dict,
    "tasks": dict,
    "groups": dict,
    "domains": dict,
}
TASK_FIELDS: dict[str, Any] = {
    "version": (str, int, float, type(None)),
    "num_fewshot": int,
    "num_samples": int,
    "num_available": int,
    "metrics": dict,
    "definition": str,
    "definition_sha256": str,
    "data": dict,
    "documents_sha256": str,
    "truncated_prompts": int,
    "samples": str,
    "samples_sha256": str,
    "seconds": (int, float),
    "speed": dict,
    "experts": (dict, type(None)),
}
METRIC_FIELDS: dict[str, Any] = {
    "value": (int, float, type(None)),
    "stderr": (int, float, type(None)),
    "higher_is_better": (bool, type(None)),
}
_DIGEST = re.compile(r"[0-9a-f]{64}")


def versions() -> dict[str, str]:
    """Of the libraries that a figure depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def harness_identity() -> dict[str, Any]:
    """lm-eval's version, and the commit where it was installed from a repository."""
    installed = distribution("lm-eval")
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    return {
        "name": HARNESS,
        "version": installed.version,
        "commit": origin.get("vcs_info", {}).get("commit_id"),
    }


def harness_metrics(figures: Mapping[str, Any], higher_is_better: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's `{"acc,none": ..., "acc_stderr,none": ...}` as `{"acc,none": {"value", "stderr", ...}}`.

    A figure that is not finite becomes null: JSON has no NaN.
    """
    return {
        key: {
            "value": finite(value),
            "stderr": finite(figures.get("_stderr,".join(key.split(",", 1)))),
            "higher_is_better": higher_is_better.get(key.split(",", 1)[0]),
        }
        for key, value in figures.items()
        if "," in key and "_stderr," not in key
    }


def finite(value: Any) -> float | None:
    """Python's number, or None for NaN, infinity and lm-eval's "N/A"."""
    if value is None or isinstance(value, str):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def read_results(path: Path) -> dict[str, Any]:
    """A results.json, or the one in a folder.

    Raises:
        EvaluationError: If it is missing, damaged, or was written by something else.
    """
    path = path / NAME if path.is_dir() else path
    try:
        results = read_json(path)
    except OSError as error:
        raise EvaluationError(
            f"the results {str(path)!r} cannot be read: {error.strerror}. Check the path."
        ) from error
    except ValueError as error:
        raise EvaluationError(f"{str(path)!r} is not valid JSON ({error}). Run the evaluation again.") from error
    check_results(results, str(path))
    return results


def check_results(results: Any, where: str) -> None:
    """Raises EvaluationError, naming the first field that is missing or has another type."""
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        found = results.get("format") if isinstance(results, dict) else type(results).__name__
        raise EvaluationError(f"{where} must have the format {FORMAT!r}, got {found!r}. Give a results.json of ours.")
    _check_fields(results, FIELDS, where)
    for name, task in results["tasks"].items():
        at = f"{where}: tasks.{name}"
        _check_fields(task, TASK_FIELDS, at)
        for digest in (task["definition_sha256"], task["documents_sha256"], task["samples_sha256"]):
            if not _DIGEST.fullmatch(digest):
                raise EvaluationError(f"{at}: a SHA-256 must be 64 hexadecimal digits, got {digest!r}.")
        if Path(task["samples"]).is_absolute() or ".." in Path(task["samples"]).parts:
            raise EvaluationError(f"{at}.samples must lie below the folder of results.json, got {task['samples']!r}.")
    for kind in ("tasks", "groups", "domains"):
        for name, entry in results[kind].items():
            _check_fields(entry, {"metrics": dict}, f"{where}: {kind}.{name}")
            for metric, figure in entry["metrics"].items():
                _check_fields(figure, METRIC_FIELDS, f"{where}: {kind}.{name}.metrics.{metric}")


def _check_fields(record: Any, fields: Mapping[str, Any], where: str) -> None:
    if not isinstance(record, dict):
        raise EvaluationError(f"{where} must be an object, got {type(record).__name__}. Run the evaluation again.")
    for name, kind in fields.items():
        if name not in record:
            raise EvaluationError(f"{where} has no field {name!r}. Run the evaluation again.")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        value = record[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("null" if part is type(None) else part.__name__ for part in kinds)
            raise EvaluationError(f"{where}.{name} must be {wanted}, got {value!r}. Run the evaluation again.")
