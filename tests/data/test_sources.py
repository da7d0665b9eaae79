"""Data sets of every format are read; what cannot be used is named with its file and a way out."""

import gzip
import json

import pytest

from hf_moe.data.formats import Chat, Instruction, Pair, Text
from hf_moe.data.sources import DataError, Source, hold_out, read_records, read_source


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
        ("a.jsonl", "{\n[", r"no row .* can be used. Line 1: not valid JSON"),
        ("a.json", '{"text": 1', "not valid JSON"),
        ("a.json", '"text"', "must hold a list of records, got str"),
        ("a.json", '{"version": 1, "data": [{"text": "a"}]}', r"json.dump\(data\['data'\], file\)"),
        ("a.jsonl.gz", "no gzip", "no whole gzip file"),
        ("a.txt.gz", "text", "must end in"),
        ("a.csv", 'text\n"a', "line 2: unexpected end of data"),
        ("a.jsonl", "  \n", "is empty"),
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


MESSAGES = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
ALPACA = {"instruction": "Add.", "input": "", "output": "3"}
SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": MESSAGES}, Chat(MESSAGES)),
        ({"messages": json.dumps(MESSAGES)}, Chat(MESSAGES)),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, Chat(MESSAGES, prompt=1)),
        ({"prompt": "", "completion": "b", "text": "c"}, Pair("", "b")),
        ({"prompt": "[1]", "completion": "{}"}, Pair("[1]", "{}")),
        ({"messages": None, "text": "a"}, Text("a")),
        ({**ALPACA, "text": "a"}, Instruction("Add.", "", "3")),
        ({"conversations": SHAREGPT}, Chat([{"role": "system", "content": "s"}, *MESSAGES])),
        ({"conversations": SHAREGPT[1:], "system": "s"}, Chat([{"role": "system", "content": "s"}, *MESSAGES])),
        ({"conversations": MESSAGES}, Chat(MESSAGES)),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_the_layouts_that_people_have_are_read(record, expected, suffix, tmp_path):
    if suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list([record]).to_parquet(tmp_path / "a.parquet")
    else:
        text = json.dumps(record)
        (tmp_path / f"a{suffix}").write_bytes(
            gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode()
        )
    source = Source(str(tmp_path / f"a{suffix}"))
    assert source.domain == "a"
    assert list(read_source(source).rows.values()) == [expected]


def test_a_csv_file_is_read_with_quotes_and_byte_order_mark(tmp_path):
    text = '\ufeffinstruction,output,id\n"Add, please","a ""3""\nand more",7\nb,c,8\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    data_set = read_source(Source(str(tmp_path / "a.csv")))
    assert list(data_set.rows.values()) == [
        Instruction("Add, please", "", 'a "3"\nand more'),
        Instruction("b", "", "c"),
    ]
    assert data_set.remarks() == ["not used: the column 'id'"]


@pytest.mark.parametrize("wrapped", [{"data": [{"text": "a"}, {"text": "b"}]}, [{"text": "a"}, {"text": "b"}]])
def test_a_list_of_records_may_lie_in_an_object(wrapped, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(wrapped))
    assert [record["text"] for record in read(tmp_path / "a.json")] == ["a", "b"]


def test_keys_that_arrow_adds_are_gone_and_those_of_the_file_stay(tmp_path):
    from datasets import Dataset

    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"city": "Oslo"})]
    records = [
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [call]}], "tools": [call["function"]]}
        for call in calls
    ]
    Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    jsonl(tmp_path / "a.jsonl", records)
    for name in ("a.parquet", "a.jsonl"):
        rows = list(read_source(Source(str(tmp_path / name))).rows.values())
        assert [(row.messages[0]["tool_calls"], row.tools) for row in rows] == [
            ([call], [call["function"]]) for call in calls
        ], name
    meant = {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"city": None}}]}]}
    jsonl(tmp_path / "null.jsonl", [meant])
    assert read_source(Source(str(tmp_path / "null.jsonl"))).rows[1].messages == meant["messages"]


def test_what_is_left_out_is_reported_once(tmp_path):
    records = [{"text": "a", "id": 1}, {"text": None, "url": "x"}, {"text": "c", "id": 2}]
    jsonl(tmp_path / "a.jsonl", records)
    data_set = read_source(Source(str(tmp_path / "a.jsonl")), on_bad_row="skip")
    assert data_set.apply(lambda row: row.text) == {1: "a", 3: "c"}
    assert data_set.remarks() == [
        "not used: the columns 'id', 'url'",
        "1 bad row left out (line 2). Line 2: 'text' must be a string, got None.",
    ]


def test_bad_lines_are_numbered_as_in_the_file(tmp_path):
    lines = ['{"text": "a"}', "", "{", '{"text": "\\ud800"}', "[1]", '{"text": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"3 of 5 rows .*\(lines 3, 4, 5\). Line 3: not valid JSON"):
        read_source(Source(str(tmp_path / "a.jsonl"))).apply(id)
    (tmp_path / "a.csv").write_text("text,id\na,1\nb\n")
    with pytest.raises(DataError, match=r"\(line 3\). Line 3: it has 1 fields, the header 2"):
        read_source(Source(str(tmp_path / "a.csv"))).apply(id)


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("señor".encode("latin-1") * 100)
    with pytest.raises(DataError, match="not UTF-8"):
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
