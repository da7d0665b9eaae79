"""Compare two evaluations document by document: differences of their metrics with confidence intervals.

Documents are drawn again with replacement, both sides of a document together, and the difference is computed for each
draw: the paired bootstrap. Its percentile interval does not assume any distribution.

Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; Koehn 2004 (EMNLP) for paired systems.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.local_data import file_sha256
from hf_moe.evaluation.results import HARNESS, NAME, Sample, read_results, read_samples

DRAWS = 10_000
CONFIDENCE = 0.95
# below, percentile intervals are too narrow: where nothing differs, 11 % of them exclude 0 at 10 documents, 7 % at 20
ENOUGH_DOCUMENTS = 20
# documents drawn at once: 10,000 draws of 14,000 documents would fill a gigabyte
CHUNK = 4_000_000
# metrics of pairs (log-likelihood, weight), as lm-eval aggregates them
RATIOS = {
    "word_perplexity": lambda nats: np.exp(-nats),
    "byte_perplexity": lambda nats: np.exp(-nats),
    "perplexity": lambda nats: np.exp(-nats),
    "bits_per_byte": lambda nats: -nats / math.log(2),
}


@dataclass(frozen=True)
class Difference:
    """One metric of one task, second minus first.

    Attributes:
        first: Its value in the first evaluation, from the samples.
        second: In the second.
        difference: second - first.
        low: Lower end of the confidence interval of the difference.
        high: Upper end.
        documents: How many were compared.
        first_ahead: Documents on which the first has the larger value.
        second_ahead: On which the second has.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    documents: int
    first_ahead: int
    second_ahead: int

    @property
    def is_enough(self) -> bool:
        """Whether there are the documents that the interval needs, `ENOUGH_DOCUMENTS`."""
        return self.documents >= ENOUGH_DOCUMENTS

    @property
    def is_real(self) -> bool:
        """True if the interval excludes 0, of documents enough. Of 20 comparisons without any difference, one does so
        by chance."""
        return self.is_enough and (self.low > 0 or self.high < 0)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_real": self.is_real}


def paired_differences(
    first: Sequence[Sample], second: Sequence[Sample], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Difference]:
    """By "metric,filter", for every metric whose value is a mean or a ratio over documents.

    Metrics of a whole corpus (BLEU, F1 over classes) and those that are not finite on some document are left out.

    Raises:
        EvaluationError: If the two did not see the same documents in the same order.
    """
    one, two = _by_filter(first), _by_filter(second)
    if one.keys() != two.keys():
        raise EvaluationError(f"the filters differ: {', '.join(one)} and {', '.join(two)}. Compare runs of one task.")
    found = {}
    for name, samples in one.items():
        others = two[name]
        if [sample["doc"] for sample in samples] != [sample["doc"] for sample in others]:
            raise EvaluationError(
                f"the two evaluations did not see the same documents ({len(samples)} and {len(others)}). Run both "
                "with the same data and the same --limit."
            )
        for metric in samples[0]["values"]:
            values = [_values(side, metric) for side in (samples, others)]
            if values[0] is not None and values[1] is not None and values[0].shape == values[1].shape:
                found[f"{metric},{name}"] = _difference(metric, values[0], values[1], draws, seed)
    return found


def _by_filter(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample["filter"], []).append(sample)
    return found


def _values(samples: Sequence[Sample], metric: str) -> Any:
    """`[documents, 2]`: what is summed above and below; None if the metric is neither a mean nor a known ratio."""
    values = [sample["values"].get(metric) for sample in samples]
    if all(isinstance(value, (int, float)) for value in values):
        pairs = [(value, 1) for value in values]
    elif metric in RATIOS and all(isinstance(value, list) and len(value) == 2 for value in values):
        pairs = values
    else:
        return None
    array = np.array(pairs, dtype=np.float64)
    return array if np.isfinite(array).all() and (array[:, 1] > 0).all() else None


def _difference(metric: str, first: Any, second: Any, draws: int, seed: int) -> Difference:
    count = len(first)
    values = [float(_aggregate(metric, side.sum(0))) for side in (first, second)]
    generator = np.random.default_rng(seed)
    drawn = []
    for begin in range(0, draws, step := max(1, CHUNK // count)):
        index = generator.integers(0, count, (min(step, draws - begin), count))
        sums = [_aggregate(metric, side[index].sum(1)) for side in (first, second)]
        drawn.append(sums[1] - sums[0])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    # where the metric falls as the log-likelihood rises, more of one is less of the other
    sign = -1 if metric in RATIOS else 1
    change = sign * (second[:, 0] / second[:, 1] - first[:, 0] / first[:, 1])
    return Difference(
        first=values[0],
        second=values[1],
        difference=values[1] - values[0],
        low=float(low),
        high=float(high),
        documents=count,
        first_ahead=int((change < 0).sum()),
        second_ahead=int((change > 0).sum()),
    )


def _aggregate(metric: str, sums: Any) -> Any:
    ratio = sums[..., 0] / sums[..., 1]
    return RATIOS[metric](ratio) if metric in RATIOS else ratio


def compare_results(first: Path, second: Path, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Two results.json, or their folders, as JSON values: paired differences by task and domain, what was set
    otherwise, and what is not compared: tasks and domains that one of them lacks, metrics that are no mean or ratio.

    Raises:
        EvaluationError: If one cannot be read, its samples are gone or not its own, the two have no task in common, or
            a task's version or documents differ.
    """
    sides = [read_results(path) for path in (first, second)]
    folders = [path if path.is_dir() else path.parent for path in (first, second)]
    compared: dict[str, Any] = {"tasks": {}, "domains": {}}
    not_compared = []
    for kind, entries in compared.items():
        not_compared += sorted(sides[0][kind].keys() ^ sides[1][kind].keys())
        for name, one in sides[0][kind].items():
            two = sides[1][kind].get(name)
            if two is None:
                continue
            _refuse_other_task(name, one, two)
            samples = [_samples(folder, entry) for folder, entry in zip(folders, (one, two), strict=True)]
            differences = _compared(name, samples, draws, seed)
            entries[name] = {key: value.to_dict() for key, value in differences.items()}
            # what a domain's perplexity says its bits per byte say
            left = [key for key in one["metrics"] if key not in differences and kind == "tasks"]
            not_compared += [f"{key} of {name}" for key in left]
    if not any(compared.values()):
        ran = [", ".join([*side["tasks"], *side["domains"]]) or "nothing" for side in sides]
        raise EvaluationError(
            f"the two evaluations have nothing in common: {ran[0]} and {ran[1]}. Compare two that ran the same tasks."
        )
    return {
        "first": _side(first, sides[0]),
        "second": _side(second, sides[1]),
        "confidence": CONFIDENCE,
        "draws": draws,
        "seed": seed,
        "set_otherwise": setting_changes(*sides),
        "not_compared": not_compared,
        **compared,
    }


def _side(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    model = results["model"]
    return {"results": results_name(path), "model": model["name"], "adapter": model.get("adapter")}


def _refuse_other_task(name: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> None:
    if one.get("version") != two.get("version"):
        raise EvaluationError(
            f"the task {name!r} has the versions {one.get('version')!r} and {two.get('version')!r}: its metrics are "
            "not comparable. Run both with one lm-eval."
        )
    # of its own tasks lm-eval says with the version whether metrics are comparable
    own = {one.get("definition"), two.get("definition")} != {HARNESS}
    if own and one.get("definition_sha256") != two.get("definition_sha256"):
        raise EvaluationError(
            f"the task {name!r} is defined otherwise in the two evaluations ({one['definition']} and "
            f"{two['definition']}): its metrics are not comparable. Run both with one task file and one lm-eval."
        )


def _compared(name: str, samples: Sequence[Sequence[Sample]], draws: int, seed: int) -> dict[str, Difference]:
    try:
        return paired_differences(*samples, draws=draws, seed=seed)
    except EvaluationError as error:
        raise EvaluationError(f"{name}: {error}") from error


def _samples(folder: Path, entry: Mapping[str, Any]) -> list[Sample]:
    path = folder / entry["samples"]
    samples = read_samples(path)
    if file_sha256(path) != entry["samples_sha256"]:
        raise EvaluationError(f"{str(path)!r} is not the file that its results.json was written with. Run it again.")
    return samples


def results_name(path: Path) -> str:
    """The last two parts of a path: no folder of this machine."""
    return (path if path.is_dir() else path.parent).name + f"/{NAME}"


def setting_changes(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Settings that differ: by field both values."""
    parts = ("model", "harness", "versions", "seeds", "settings")
    flat = [
        {"device": side["device"], **{f"{part}.{key}": value for part in parts for key, value in side[part].items()}}
        for side in (one, two)
    ]
    return {
        key: [flat[0].get(key), flat[1].get(key)]
        for key in {**flat[0], **flat[1]}
        if flat[0].get(key) != flat[1].get(key)
    }
