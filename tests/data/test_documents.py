"""What is measured: files, folders and conversations as documents by domain."""

import json

import pytest
from tokenizers.processors import TemplateProcessing

from chat_cases import assistant, chat_tokenizer, user
from hf_moe.data.bad_rows import DataError
from hf_moe.data.chat_text import ChatText
from hf_moe.data.corpus import Domain
from hf_moe.data.documents import read_documents, read_domains, sample
from hf_moe.data.encoding import Encoder
from hf_moe.data.sources import Source, read_source
from hf_moe.data.tokenizer import encode_documents
from tiny_moe import tiny_tokenizer


def test_domains_are_called_after_their_files(tmp_path):
    (tmp_path / "law.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", "c d")))
    (tmp_path / "sea.txt").write_text("call me")
    domains = read_domains([str(tmp_path / "law.jsonl"), str(tmp_path / "sea.txt")], tiny_tokenizer)
    assert domains == {"law": ["a b", "c d"], "sea": ["call me"]}


def test_two_texts_of_one_name_and_rows_without_text_are_refused(tmp_path, capsys):
    (tmp_path / "sea.txt").write_text("call me")
    with pytest.raises(DataError, match="two texts are called 'sea'"):
        read_domains([str(tmp_path / "sea.txt")] * 2, tiny_tokenizer)
    (tmp_path / "law.jsonl").write_text('{"text": "a", "id": 1}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"1 of 2 rows of .*\(line 2\). Line 2: 'text' is empty"):
        read_domains([str(tmp_path / "law.jsonl")], tiny_tokenizer)
    assert read_domains([str(tmp_path / "law.jsonl")], tiny_tokenizer, on_bad_row="skip") == {"law": ["a"]}
    printed = " ".join(capsys.readouterr().err.split())
    assert "not used: the column 'id'" in printed
    assert "1 bad row left out (line 2)" in printed


CHAT = {"messages": [user("two?"), assistant("four")]}


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (CHAT, "<|user|>\ntwo?\n<|assistant|>\nfour<|endoftext|>"),
        ({"conversations": [{"from": "gpt", "value": "b"}]}, "<|assistant|>\nb<|endoftext|>"),
        ({"prompt": "a ", "completion": "b"}, "a b"),
        ({"instruction": "a", "output": "b"}, "<|user|>\na\n<|assistant|>\nb<|endoftext|>"),
    ],
)
def test_what_the_recipes_train_on_is_measured(record, text, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    tokenizer = chat_tokenizer("olmoe")
    domains = read_domains([str(tmp_path / "a.jsonl")], lambda: tokenizer)
    assert domains == {"a": [text]}
    if record is CHAT:  # token for token
        data_set = read_source(Source(str(tmp_path / "a.jsonl")))
        [example] = data_set.apply(Encoder(tokenizer, max_length=64).encode)[1]
        assert [tokenizer.bos_token_id, *encode_documents(tokenizer, domains["a"])[0]] == example.input_ids


def test_a_long_conversation_that_is_cut_stays_one():
    [cut] = sample([ChatText("<|endoftext|>" * 9)], 2, tiny_tokenizer())
    assert encode_documents(tiny_tokenizer(), [cut]) == [[tiny_tokenizer().eos_token_id] * 2]


def test_a_sample_is_of_the_whole_and_of_the_size_that_was_asked_for():
    documents = [f"{i:02d}" + "x" * 8 for i in range(100)]
    chosen = sample(documents, 200, tiny_tokenizer())
    sizes = [len(row) for row in encode_documents(tiny_tokenizer(), chosen)]
    assert 190 <= sum(sizes) <= 200
    numbers = [int(text[:2]) for text in chosen if len(text) == 10]
    assert min(numbers) < 20
    assert max(numbers) >= 80
    assert sorted(sample(documents, 10**6, tiny_tokenizer())) == documents


def test_a_folder_is_one_domain_and_says_which_of_its_files_cannot_be_read(tmp_path, capsys):
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "a.txt").write_text("sea")
    (folder / "more" / "b.jsonl").write_text('{"text": "law"}\n')
    assert read_domains([str(folder)], tiny_tokenizer) == {"texts": ["sea", "law"]}
    assert read_documents(str(folder), tiny_tokenizer, by_field=True) == {"a": ["sea"], "b": ["law"]}
    (folder / "c.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (folder / "d.csv").write_text("")
    wrong = r"2 of 4 files of the folder '.*texts' cannot be read \(c.jsonl, d.csv\): .*'question', 'answer'"
    with pytest.raises(DataError, match=wrong + r".*leave these out with on_bad_row skip"):
        read_domains([str(folder)], tiny_tokenizer)
    assert read_domains([str(folder)], tiny_tokenizer, on_bad_row="skip") == {"texts": ["sea", "law"]}
    assert "(c.jsonl, d.csv) and are left out" in " ".join(capsys.readouterr().err.split())
    (folder / "a.txt").unlink()
    (folder / "more" / "b.jsonl").unlink()
    with pytest.raises(DataError, match="2 of 2 files"):
        read_domains([str(folder)], tiny_tokenizer, on_bad_row="skip")


def test_what_is_no_file_is_asked_for_once(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hf_moe.data.documents.HfApi.dataset_info", unreachable)
    with pytest.raises(DataError, match=r"no file or folder here is called 'a/b', and the Hub cannot be reached"):
        read_domains(["a/b"], tiny_tokenizer)


@pytest.mark.parametrize("adds_start", [False, True])
def test_a_trace_reads_a_conversation_as_it_is_trained_on(adds_start, tmp_path):
    tokenizer = chat_tokenizer("olmoe")
    if adds_start:
        start = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{start[0]} $A", special_tokens=[start])
    (tmp_path / "a.jsonl").write_text(json.dumps({**CHAT, "domain": "sums"}) + "\n" + json.dumps(CHAT))
    documents = read_documents(str(tmp_path / "a.jsonl"), lambda: tokenizer, by_field=True)
    assert list(documents) == ["sums", "a"]
    assert tokenizer(documents["a"][0])["input_ids"] == tokenizer.apply_chat_template(CHAT["messages"])["input_ids"]
    (tmp_path / "a.jsonl").write_text(json.dumps({**CHAT, "domain": "../up"}))
    with pytest.raises(DataError, match=r"'domain' must be 1 to 32 .* got '../up'"):
        read_documents(str(tmp_path / "a.jsonl"), lambda: tokenizer, by_field=True)


def test_embedded_text_is_the_held_out_part(monkeypatch):
    corpus = {"code": Domain("code", train=("seen",), held_out=("unseen", "new"))}
    monkeypatch.setattr("hf_moe.data.documents.embedded_corpus", lambda **sizes: corpus)
    assert read_domains(["embedded"], tiny_tokenizer) == {"code": ["unseen", "new"]}
