"""The values of single documents behind a figure, in a file beside the results: what paired comparisons need."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_moe.evaluation.errors import EvaluationError
from hf_moe.io.json_files import parse_json
from hf_moe.io.whole_files import write_text

Sample = dict[str, Any]
"""`doc`: SHA-256 of the document; `filter`; `values`: by metric a number or a pair (log-likelihood, weight);
`response`: what the model gave, after the filter."""


def harness_samples(logged: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """From lm-eval's own log of a task."""
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
