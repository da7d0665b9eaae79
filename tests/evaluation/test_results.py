"""results.json is checked when it is read: the first wrong field is named."""

import copy
import json

import pytest

from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.results import (
    FORMAT,
    check_results,
    finite,
    harness_metrics,
    plain,
    read_results,
    read_samples,
    write_samples,
)

METRIC = {"value": 0.5, "stderr": None, "higher_is_better": True}
RESULTS = {
    "format": FORMAT,
    "date": "2026-11-22",
    "command": "hf-moe evaluate model",
    "model": {"name": "model"},
    "harness": {},
    "versions": {},
    "device": "cpu",
    "seeds": {},
    "settings": {},
    "tasks": {
        "arc": {
            "version": 1.0,
            "num_fewshot": 0,
            "num_samples": 2,
            "num_available": 2,
            "metrics": {"acc,none": METRIC},
            "definition": "lm-evaluation-harness",
            "definition_sha256": "c" * 64,
            "data": {},
            "documents_sha256": "a" * 64,
            "truncated_prompts": 0,
            "samples": "samples/arc.jsonl",
            "samples_sha256": "b" * 64,
            "seconds": 1,
            "speed": {},
            "experts": None,
        }
    },
    "groups": {},
    "domains": {"novel": {"metrics": {"bits_per_byte": {**METRIC, "value": None}}}},
}


def changed(path, value):
    results = copy.deepcopy(RESULTS)
    *parents, last = path
    record = results
    for key in parents:
        record = record[key]
    if value is KeyError:
        del record[last]
    else:
        record[last] = value
    return results


def test_what_is_written_is_read(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert read_results(tmp_path) == read_results(tmp_path / "results.json") == RESULTS


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other/1", "must have the format 'hf_moe.evaluation/1', got 'other/1'"),
        (["tasks"], KeyError, "has no field 'tasks'"),
        (["device"], 3, "device must be str, got 3"),
        (["tasks", "arc"], [], "tasks.arc must be an object, got list"),
        (["tasks", "arc", "num_samples"], True, "num_samples must be int, got True"),
        (["tasks", "arc", "seconds"], "fast", "seconds must be int or float"),
        (["tasks", "arc", "documents_sha256"], "A" * 64, "64 hexadecimal digits"),
        (["tasks", "arc", "samples"], "/etc/passwd", "must lie below the folder"),
        (["tasks", "arc", "samples"], "samples/../../x", "must lie below the folder"),
        (["tasks", "arc", "metrics", "acc,none"], 0.5, "metrics.acc,none must be an object"),
        (["tasks", "arc", "metrics", "acc,none", "value"], "0.5", "value must be int or float or null"),
        (["tasks", "arc", "metrics", "acc,none", "stderr"], KeyError, "has no field 'stderr'"),
        (["domains", "novel", "metrics"], KeyError, "domains.novel has no field 'metrics'"),
    ],
)
def test_a_wrong_field_is_named(path, value, message):
    check_results(RESULTS, "results.json")
    with pytest.raises(EvaluationError, match=message):
        check_results(changed(path, value), "results.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": NaN}', "[" * 100_000])
def test_damaged_files_are_refused(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(EvaluationError, match=r"results.json"):
        read_results(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="No such file"):
        read_results(tmp_path / "results.json")


def test_metrics_of_lm_eval_keep_their_filters_and_stderrs():
    results = {"alias": "arc", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,a,b": float("nan"),
               "f1_stderr,a,b": "N/A"}  # fmt: skip
    assert harness_metrics(results, {"acc": True}) == {
        "acc,none": {"value": 0.5, "stderr": 0.1, "higher_is_better": True},
        "f1,a,b": {"value": None, "stderr": None, "higher_is_better": None},
    }
    assert [finite(value) for value in (float("inf"), "N/A", None, 2)] == [None, None, None, 2.0]


def test_samples_survive_any_text(tmp_path):
    text = 'line\u2028separator \x85 and "quotes" \ud7ff'
    samples = [{"doc": "d", "filter": "none", "values": {"acc": 1, "ll": [-3.5, 2]}, "response": [text]}]
    write_samples(tmp_path / "samples/a.jsonl", samples)
    assert read_samples(tmp_path / "samples/a.jsonl") == samples


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"doc": "d"}', '{"doc": "d", "filter": "none", "values": 3}', "", "[" * 100_000]
)
def test_damaged_samples_are_refused(line, tmp_path):
    good = '{"doc": "d", "filter": "none", "values": {}}\n'
    (tmp_path / "a.jsonl").write_text(f"{good}{line}\n{good}")
    with pytest.raises(EvaluationError, match="line 2: no sample"):
        read_samples(tmp_path / "a.jsonl")


def test_values_of_other_libraries_become_plain():
    import numpy as np
    import torch

    value = (True, np.float64(0.5), np.int64(3), torch.tensor(2), {"a": {3, 1}}, None, "x")
    assert plain(value) == [1, 0.5, 3, 2, {"a": [1, 3]}, None, "x"]
