"""Data sets of every format are read; what cannot be used is named with its file and a way out."""

import json

import pytest

from hf_moe.training.corpus import TextError
from hf_moe.training.sources import DataError, Source, hold_out, read_records, read_source


def read(path, **options):
    return [record for _, record in read_records(Source(str(path), **options))[0]]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_path_is_a_source_named_after_its_file():
    assert Source.parse("some/legal texts.jsonl") == Source("some/legal texts.jsonl", domain="legal-texts")


def test_a_mapping_gives_domain_weight_config_and_split():
    source = Source.parse({"path": "openai/gsm8k", "domain": "math", "weight": 2, "config": "main", "split": "test"})
    assert source == Source("openai/gsm8k", "math", 2, "main", "test")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"path": "a.jsonl", "wieght": 1}, "unknown key 'wieght'. Did you mean 'weight'"),
        ({"domain": "a"}, "with the key 'path'"),
        (3, "with the key 'path'"),
        ({"path": "a.jsonl", "weight": "1"}, "'weight' of the data set"),
        ({"path": "a.jsonl", "weight": True}, "'weight' of the data set"),
        ({"path": "a.jsonl", "weight": -1}, "0 or more and finite"),
        ({"path": "a.jsonl", "weight": float("inf")}, "0 or more and finite"),
        ({"path": "a.jsonl", "weight": float("nan")}, "0 or more and finite"),
        ({"path": "a.jsonl", "domain": "../up"}, "characters A-Z"),
        ({"path": "a.jsonl", "split": None}, "'split' of the data set"),
    ],
)
def test_a_bad_source_is_refused(value, message):
    with pytest.raises(DataError, match=message):
        Source.parse(value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_records_of_a_local_file(tmp_path, suffix):
    from datasets import Dataset

    records = [{"prompt": f"{i}?", "completion": str(i)} for i in range(5)]
    path = tmp_path / f"sums{suffix}"
    if suffix == ".parquet":
        Dataset.from_list(records).to_parquet(path)
    elif suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        jsonl(path, records)
    assert read(path) == records


def test_a_text_file_is_cut_into_passages(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("One paragraph of a story.\n\n" * 2000)
    records = read(path)
    assert len(records) > 2
    assert "".join(record["text"] for record in records) == path.read_text()


def test_a_folder_in_the_layout_of_the_hub(tmp_path):
    folder = tmp_path / "owner" / "sums"
    folder.mkdir(parents=True)
    jsonl(folder / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    jsonl(folder / "test.jsonl", [{"text": "three"}])
    assert [r["text"] for r in read(folder)] == ["one", "two"]
    assert [r["text"] for r in read(folder, split="test")] == ["three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "does not exist"),
        ("a.xlsx", "text\n1", "must end in"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"\(line 2\). Line 2: not valid JSON"),
        ("a.jsonl", '{"body": "a"}\n', "has the columns 'body'"),
        ("a.jsonl", "", "is empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_source(Source(str(path)))
    assert name in str(error.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("señor".encode("latin-1") * 100)
    with pytest.raises(TextError, match="not UTF-8"):
        read_source(Source(str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    ("count", "share", "most", "expected"), [(100, 0.05, 64, 5), (100, 0.5, 7, 7), (2, 0.01, 9, 1)]
)
def test_hold_out_splits_without_overlap(count, share, most, expected):
    records = [{"text": str(i)} for i in range(count)]
    train, held_out = hold_out(records, share=share, most=most, where="x")
    assert len(held_out) == expected
    assert sorted(int(r["text"]) for r in train + held_out) == list(range(count))


def test_hold_out_needs_two_records():
    with pytest.raises(DataError, match="needs two"):
        hold_out([{"text": "a"}], share=0.1, most=4, where="a.jsonl")
