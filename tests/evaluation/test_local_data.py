"""Which files a task reads, which splits may be missing, and the error when one is."""

import hashlib

import pytest

pytest.importorskip("datasets", reason="needs datasets: pip install hf-moe[eval]")

from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.local_data import data_record, fewshot_split, on_local_data, shots
from tiny_benchmarks import write_dataset

ARC = {
    "task": "arc_easy",
    "dataset_path": "allenai/ai2_arc",
    "dataset_name": "ARC-Easy",
    "training_split": "train",
    "validation_split": "validation",
    "test_split": "test",
}


def test_absent_splits_that_are_not_read_are_left_out(mirror):
    config = on_local_data(ARC, mirror, None)
    assert config["dataset_path"] == str(mirror / "allenai/ai2_arc")
    assert (config["training_split"], config["validation_split"], config["test_split"]) == (None, None, "test")
    assert ARC["training_split"] == "train"


def test_another_split_never_stands_in_for_the_scored_one(mirror):
    boolq = {"task": "boolq", "dataset_path": "aps/super_glue", "dataset_name": "boolq"}
    splits = {"test_split": "test", "validation_split": "validation"}
    with pytest.raises(EvaluationError, match=r"'boolq' reads the split 'test'.*has validation.*boolq/test.jsonl"):
        on_local_data({**boolq, **splits}, mirror, None)


def test_few_shot_examples_need_their_split(mirror):
    with pytest.raises(EvaluationError, match=r"reads the split 'train'.*ARC-Easy/train.jsonl"):
        on_local_data(ARC, mirror, 5)
    with pytest.raises(EvaluationError, match="reads the split 'train'"):
        on_local_data({**ARC, "num_fewshot": 5}, mirror, None)
    # a task that says 0 stays at 0, as in lm-eval
    assert on_local_data({**ARC, "num_fewshot": 0}, mirror, 5)["training_split"] is None


@pytest.mark.parametrize(
    ("config", "asked", "number"),
    [({}, None, 0), ({}, 3, 3), ({"num_fewshot": 5}, None, 5), ({"num_fewshot": 5}, 0, 0), ({"num_fewshot": 0}, 5, 0)],
)
def test_shots_follow_lm_eval(config, asked, number):
    assert shots(config, asked) == number


@pytest.mark.parametrize(
    ("config", "split"),
    [
        ({**ARC, "fewshot_split": "dev"}, "dev"),
        ({**ARC, "fewshot_config": {"split": "dev"}}, "dev"),
        ({**ARC, "fewshot_config": {"samples": [{}]}}, None),
        (ARC, "train"),
        ({**ARC, "training_split": None}, "validation"),
        ({"test_split": "test"}, "test"),
    ],
)
def test_few_shot_split_follows_lm_eval(config, split):
    assert fewshot_split(config) == split


def test_missing_data_says_where_to_put_them(tmp_path):
    with pytest.raises(EvaluationError) as error:
        on_local_data(ARC, tmp_path, None)
    assert f"must lie at {tmp_path}/allenai/ai2_arc/ARC-Easy/test.jsonl" in str(error.value)
    assert "leave out --data-root" in str(error.value)


@pytest.mark.parametrize("damage", ["no readme", "another config", "listed file absent"])
def test_a_copy_that_cannot_be_read_says_what_belongs_there(damage, tmp_path):
    folder = tmp_path / "allenai/ai2_arc"
    write_dataset(folder, "ARC-Easy", test=[{"question": "q"}])
    readme = folder / "README.md"
    if damage == "no readme":
        readme.unlink()
    elif damage == "another config":
        readme.write_text(readme.read_text().replace("ARC-Easy", "ARC-Hard"))
    else:
        (folder / "ARC-Easy/test.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"ARC-Easy/test.jsonl.*README.md"):
        on_local_data(ARC, tmp_path, None)


def test_own_files_and_own_code(mirror, tmp_path):
    own = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "x.jsonl"}}}
    assert on_local_data(own, tmp_path, None) == own
    folder = {**ARC, "dataset_path": str(mirror / "allenai/ai2_arc")}
    assert on_local_data(folder, tmp_path, None) == folder
    with pytest.raises(EvaluationError, match="with code of its own"):
        on_local_data({"task": "squad", "class": object}, mirror, None)


def test_the_record_holds_the_hashes_of_the_splits_that_were_read(mirror):
    gsm8k = {
        "task": "gsm8k",
        "dataset_path": "openai/gsm8k",
        "dataset_name": "main",
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "num_fewshot": 5,
    }
    record = data_record(on_local_data(gsm8k, mirror, None), "openai/gsm8k", "main")
    files = {f"main/{name}.jsonl": mirror / f"openai/gsm8k/main/{name}.jsonl" for name in ("test", "train")}
    assert record["sha256"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert (record["dataset"], record["config"]) == ("openai/gsm8k", "main")
    assert (record["split"], record["fewshot_split"]) == ("test", "train")
    zero = data_record({**on_local_data(gsm8k, mirror, 0), "num_fewshot": 0}, "openai/gsm8k", "main")
    assert list(zero["sha256"]) == ["main/test.jsonl"]
