"""`results.json`, with what is needed to repeat the evaluation, and beside it the samples: the values of single
documents, which paired comparisons need. Both are checked when they are read."""

import json
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from hf_moe.evaluation.errors import EvaluationError
from hf_moe.io.json_files import parse_json, read_json
from hf_moe.io.whole_files import write_text

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

Sample = dict[str, Any]
"""`doc`: SHA-256 of the document; `filter`; `values`: by metric a number or a pair (log-likelihood, weight);
`response`: what the model gave, after the filter."""


def versions() -> dict[str, str]:
    """Versions of the libraries that the metrics depend on, as far as they are installed."""
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


def harness_metrics(results: Mapping[str, Any], higher_is_better: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """lm-eval's `{"acc,none": ..., "acc_stderr,none": ...}` as `{"acc,none": {"value", "stderr", ...}}`.

    A value that is not finite becomes null: JSON has no NaN.
    """
    return {
        key: {
            "value": finite(value),
            "stderr": finite(results.get("_stderr,".join(key.split(",", 1)))),
            "higher_is_better": higher_is_better.get(key.split(",", 1)[0]),
        }
        for key, value in results.items()
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
            for metric, value in entry["metrics"].items():
                _check_fields(value, METRIC_FIELDS, f"{where}: {kind}.{name}.metrics.{metric}")


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


def harness_samples(logged: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """Samples from lm-eval's own log of a task."""
    return [
        {
            "doc": sample["doc_hash"],
            "filter": sample["filter"],
            "values": {metric: plain(sample[metric]) for metric in sample["metrics"]},
            "response": plain(sample["filtered_resps"]),
        }
        for sample in logged
    ]


def plain(value: Any) -> Any:
    """The same as JSON values: numbers of numpy and torch become Python's, booleans 0 or 1, sets sorted lists."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (str, int, float, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(part) for part in value)
    if getattr(value, "ndim", None) == 0:
        return plain(value.item())
    return str(value)


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write one JSON line a sample; the folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # NaN stays: it is what the model gave
    write_text(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))


def read_samples(path: Path) -> list[Sample]:
    """Raises EvaluationError if the file is missing or damaged."""
    try:
        # not splitlines: text may hold line separators of Unicode
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise EvaluationError(
            f"the samples {str(path)!r} cannot be read ({error.strerror}). They lie beside results.json: keep both."
        ) from error
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            sample = parse_json(line, allow_nan=True)
            _ = sample["doc"], sample["filter"], sample["values"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(f"{path}, line {number}: no sample of an evaluation. Run it again.") from error
        samples.append(sample)
    return samples
